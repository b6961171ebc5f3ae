"""`python -m vgg_jax statistics`: constants that a configuration takes."""

import numpy as np

from tests.conftest import photographs
from tests.data.archives import encoded
from vgg_jax.cli import statistics
from vgg_jax.config import Config, DataConfig
from vgg_jax.training.validation import check_config


def test_statistics_prints_fields_of_a_configuration(tmp_path, capsys):
    """The first axis of photographs is brightness, as ImageNet's is."""
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
    for i, photo in enumerate(photographs(6)):
        (tmp_path / "train" / "ab"[i % 2] / f"{i}.jpg").write_bytes(encoded(photo))
    assert statistics.main([str(tmp_path)]) == 0
    comment, *lines = capsys.readouterr().out.splitlines()
    assert comment == f"# 6 images of {tmp_path}/train"
    fields = {}
    for line in lines:
        name, _, value = line.removeprefix("--config.data.").partition("=")
        fields[name] = eval(value)
    config = Config(data=DataConfig(**fields, color_shift=0.1))
    check_config(config)
    values, vectors = np.array(fields["color_eigenvalues"]), np.array(fields["color_eigenvectors"])
    assert values[0] > values[1] > values[2] > 0
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=5e-4)
    assert (vectors[:, 0] < -0.4).all()
