"""What the tests of the preparation share: neither TensorFlow nor a network, and ImageNet's stand-in."""

import sys

import pytest

from tests.data.archives import prepare_imagenet


@pytest.fixture(autouse=True)
def no_tensorflow():
    yield
    assert "tensorflow" not in sys.modules  # no code under test has imported it


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody answers here


@pytest.fixture(autouse=True)
def own_checksums(monkeypatch):
    """Keep TFDS from caching one test's checksums for the next test."""
    from tensorflow_datasets.core.download import checksums

    monkeypatch.setattr(checksums, "get_all_url_infos", checksums.get_all_url_infos.__wrapped__)


@pytest.fixture(autouse=True, scope="module")
def no_progress_bars():
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()


@pytest.fixture(scope="session")
def synsets():
    """Return the names of ImageNet's classes."""
    import tensorflow_datasets as tfds

    return tfds.builder("imagenet2012", data_dir="/nonexistent").info.features["label"].names


@pytest.fixture(scope="session")
def imagenet_dir(tmp_path_factory):
    """Return a data directory with ImageNet prepared from stand-in archives."""
    return prepare_imagenet(tmp_path_factory.mktemp("imagenet"))
