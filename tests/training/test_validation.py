"""The configuration is checked against the data and the devices."""

from tests.conftest import raises_user_error
from vgg_jax.config import Config, DataConfig
from vgg_jax.training.inputs import open_splits
from vgg_jax.training.validation import check_data


def test_configuration_against_data_and_devices(data_dir):
    data = DataConfig(dataset="digits", data_dir=data_dir, mean=(0.3,), std=(0.3,))
    config = Config(data=data, batch_size=100)
    train, test = open_splits(config)
    check_data(config, train, test, 4)
    with raises_user_error("batch_size is 100", "a multiple of 8, for 8 devices; use 96 or 104"):
        check_data(config, train, test, 8)
    config.accumulation_steps = 4
    with raises_user_error("batch_size is 100", "a multiple of 32, for 8 devices and 4 micro-batches; use 96 or 128"):
        check_data(config, train, test, 8)
    config.accumulation_steps = 1
    config.shard_head, config.model.hidden = True, (60,)
    with raises_user_error("config.shard_head divides", "inputs of the dense layers, 512, 60, among 8 devices"):
        check_data(config, train, test, 8)
    config.shard_head = False
    config.batch_size = 2000
    with raises_user_error("expected at most 1437"):
        check_data(config, train, test, 1)
    config.batch_size, config.model.num_classes = 4, 5
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    with raises_user_error(
        "expected at least 10, the classes of digits/train", "expected 1, the channels of digits/train"
    ):
        check_data(config, train, test, 1)
