"""Reads that Orbax abandons print nothing; all other errors that cannot be raised are still shown."""

import logging
import sys

import pytest

from vgg_jax.training.abandoned_reads import silence_abandoned_reads


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Event loop is closed", 0),
        ("Encountered error while reading array index: (). See full TensorStore details: ...", 0),  # Orbax 0.11
        ("NOT_FOUND: ... [tensorstore_spec='{...}']", 0),
        ("the disk is full", 1),
    ],
)
def test_abandoned_read_shows_nothing(message, shown, monkeypatch):
    reports = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reports.append(str(unraisable.exc_value)))
    monkeypatch.setattr(logging.getLogger("asyncio"), "filters", [])
    silence_abandoned_reads.__wrapped__()  # not the cached one: it has wrapped another hook

    def read():
        try:
            yield
        except GeneratorExit as error:
            raise RuntimeError(message) from error

    waiting = read()
    next(waiting)
    del waiting  # closes the read, whose error nothing can catch
    assert reports == [message] * shown
