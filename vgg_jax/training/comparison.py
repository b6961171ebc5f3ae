"""Comparison of the processes of a run before they train: configuration, data and checkpoints must agree."""

import hashlib
import json
import os
from typing import Any

import jax

from vgg_jax.config import Config
from vgg_jax.data.dataset import Split
from vgg_jax.training.agreement import process_total, require_equal
from vgg_jax.training.run_directory import flat_fields

MAY_DIFFER = ("data.data_dir", "data.num_threads")  # they depend on the machine
SAMPLES = 32  # examples of a split that are compared byte by byte, evenly spaced


def compare_runs(config: Config, train_split: Split, eval_split: Split) -> None:
    """Raise UserError in all processes if one of them has another configuration or other data.

    Args:
      config: the configuration of this process, with its dtype and classes resolved.
      train_split: the training split of this process. A few of its examples are read.
      eval_split: the evaluation split of this process, likewise.
    """
    if process_total() == 1:
        return
    fields = {f"config.{name}": value for name, value in flat_fields(config).items() if name not in MAY_DIFFER}
    versions = {"the version of JAX": jax.__version__}
    require_equal(versions | fields, "start all processes with the same command and packages")
    facts = split_facts(train_split, "training") | split_facts(eval_split, "evaluation")
    require_equal(facts, "give all processes the same data")


def compare_checkpoints(directory: str, steps: list[int]) -> None:
    """Raise UserError in all processes if they see different checkpoints.

    Args:
      directory: the directory of the checkpoints.
      steps: the steps of the checkpoints that this process sees.
    """
    require_equal({"the list of checkpoints": steps}, f"put {directory} on a disk that all processes share")


def compare_start(step: int) -> None:
    """Raise UserError in all processes if they start from different steps."""
    require_equal({"the start step": step}, "put --workdir on a disk that all processes share")


def split_facts(split: Split, name: str) -> dict[str, Any]:
    """Return what identifies the examples of a split: their number, classes and files, and the content of some.

    Args:
      split: the split.
      name: the name of the split, for the names of the facts.
    """
    records = split.records
    while hasattr(records, "records"):  # a selection, or other labels, of records
        records = records.records
    count = len(split)
    facts: dict[str, Any] = {
        f"the number of {name} examples": count,
        f"the digest of the class names of the {name} examples": _digest(split.class_names),
        f"the digest of the files of the {name} examples": _digest(_files(records)),
    }
    for index in sorted({i * (count - 1) // (SAMPLES - 1) for i in range(SAMPLES)}):
        record = split.records[index]
        content = hashlib.sha256(record["image"])
        content.update(str(record["label"]).encode())
        facts[f"the digest of {name} example {index}"] = content.hexdigest()[:12]
    return facts


def _files(records: Any) -> list[Any]:
    """Return the names of the files of records, without the directory that depends on the machine."""
    if hasattr(records, "labels"):  # a folder: each image is a file
        paths = [records.locate(index).split(os.sep)[-2:] for index in range(len(records))]
        return list(zip(paths, records.labels, strict=True))
    files = getattr(records, "files", ())
    return [(os.path.basename(file.filename), file.skip, file.take, file.examples_in_shard) for file in files]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
