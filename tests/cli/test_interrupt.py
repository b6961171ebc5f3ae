"""Ctrl-C during training: the exit code, no traceback, no process left."""

import json
import os
import signal
import subprocess

import pytest

from tests.cli.test_train import NARROW, SMALL_IMAGES, command, train
from tests.data.archives import prepare_imagenet


def interrupt(arguments, after):
    """Start train.py, send SIGINT when it prints `after`, and return its exit code and its standard error."""
    process = subprocess.Popen(
        command(*arguments, script=NARROW),
        **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True),
    )
    while after not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    with pytest.raises(ProcessLookupError):  # no process of its group is left
        os.killpg(process.pid, 0)
    return process.returncode, stderr


@pytest.mark.slow
def test_interrupted_epoch_of_imagenet_resumes(tmp_path):
    """The first run is interrupted between two steps; the second one finishes."""
    imagenet_dir = prepare_imagenet(tmp_path / "tfds")
    fields = (
        *SMALL_IMAGES[3:],
        *("data.dataset=imagenet2012", "data.eval_split=validation", "model.num_classes=1000", "model.depth=11"),
        *("data.train_view=scale_crop", "data.train_scale=(20, 40)", "data.image_size=16", "data.resize=20"),
        *("data.color_shift=0.1", "batch_size=100", "eval_batch_size=20", "num_epochs=1", "optimizer.warmup_epochs=0"),
        "log_every_steps=1",
    )
    arguments = ("vgg16.py", tmp_path / "run", imagenet_dir, *fields)
    returncode, stderr = interrupt(arguments, after="step 2/10")
    assert (returncode, stderr) == (130, "")
    output = train(*arguments, script=NARROW)
    assert "resuming from the checkpoint of step" in output
    assert "1,002 training and 20 evaluation images; 10 steps" in output
    assert "finished: step 10" in output
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line)["count"] for line in metrics.splitlines() if '"eval"' in line] == [20]


def test_ctrl_c_before_the_first_step_ends_at_once(data_dir, tmp_path):
    """There is nothing to save: the process ends by the signal, which a shell reports as 130 too."""
    returncode, stderr = interrupt(("digits.py", tmp_path / "run", data_dir), after="evaluation images")
    assert (returncode, stderr) == (-signal.SIGINT, "")
