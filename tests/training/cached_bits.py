"""Train with and without cached features as a user does, and print whether all bits are equal.

`PYTHONPATH=. python tests/training/cached_bits.py FOLDER WIDTH CASE` is a program of its own, because the tests compile
without LLVM's optimizations. There XLA orders the sums of small products by what is fused around them.
"""

import dataclasses
import os
import sys

import jax
import numpy as np
from PIL import Image

from tests.narrow import NARROW_TABLE
from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.model import TABLE_1
from vgg_jax.training.checkpoints import read_latest
from vgg_jax.training.loop import train_and_evaluate
from vgg_jax.training.metric_writer import read_metrics
from vgg_jax.training.validation import check_config


def write_images(folder):
    random = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 10)):
        for name, color in (("cat", 60), ("dog", 160)):
            os.makedirs(f"{folder}/{split}/{name}", exist_ok=True)
            for i in range(count):
                pixels = np.clip(random.normal(color, 60, (40, 36, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(f"{folder}/{split}/{name}/{i}.png")


def main(folder, width, case):
    if width == "narrow":
        TABLE_1.update(NARROW_TABLE)
    write_images(f"{folder}/data")
    config = Config(
        model=ModelConfig(depth=11, batch_norm=case != "plain", hidden=(256, 64), pool_size=1),
        data=DataConfig(dataset=f"{folder}/data", pad=0, alternating_flip=case == "alternating"),
        optimizer=OptimizerConfig(name="adam", learning_rate=1e-3, schedule="constant", weight_decay=0.0),
        **dict(batch_size=32, eval_batch_size=16, num_epochs=3, flip_eval=True, features_dir=f"{folder}/features"),
        freeze=("stage1", "stage2", "stage3", "stage4") if case == "stage5" else ("features",),
    )
    found = []
    for name, cached in (("without", False), ("computed", True), ("read", True)):
        config = dataclasses.replace(config, cache_features=cached)
        check_config(config)
        workdir = f"{folder}/{name}"
        train_and_evaluate(config, workdir)
        lines = [line for line in read_metrics(f"{workdir}/metrics.jsonl") if line["kind"] == "eval"]
        found.append((jax.tree.leaves(read_latest(f"{workdir}/checkpoints")), lines))
    for arrays, lines in found[1:]:
        same = all(np.array_equal(a, b) for a, b in zip(arrays, found[0][0], strict=True))
        print("arrays", same, "evaluations", lines == found[0][1])


if __name__ == "__main__":
    main(*sys.argv[1:])
