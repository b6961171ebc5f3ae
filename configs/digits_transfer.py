"""Transfer learning on the digits: frozen features trained on 0 to 4, a new head on ten images each of 5 to 9.

Source: our own experiment. The head is that of configs/transfer.py.
Command: python train.py --config configs/digits_transfer.py
         after python train.py --config configs/digits_features.py
Cost: 100 steps; a step takes 0.34 times as long as one of the whole network (experiments/transfer.md).
Result: 93.00 %, mean of five seeds; 87.78 % on random features (experiments/transfer.md).
"""

from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig


def get_config() -> Config:
    """Return the configuration of a new head on frozen features, on the digits 5 to 9."""
    return Config(
        model=ModelConfig(depth=11, pool_after=(1, 2, 3, 4), pool_size=2, hidden=(4096, 1024)),
        data=DataConfig(
            dataset="digits", classes=(5, 6, 7, 8, 9), images_per_class=10, flip=False, mean=(0.3057,), std=(0.3235,)
        ),
        optimizer=OptimizerConfig(name="adam", learning_rate=1e-3, weight_decay=0.0, schedule="constant"),
        init_from="runs/digits_features",
        freeze=("features",),
        batch_size=50,
        num_epochs=100,
        eval_every_epochs=20,
        checkpoint_every_epochs=20,
        log_every_steps=10,
    )
