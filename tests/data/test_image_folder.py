"""Images in folders, as SPLIT/CLASS/IMAGE."""

import numpy as np
import PIL.Image

from tests.conftest import raises_user_error
from tests.data.archives import encoded
from vgg_jax.data.dataset import open_split
from vgg_jax.data.transforms import Views


def test_images_in_folders(tmp_path):
    random = np.random.default_rng(0)
    for split, classes in (("train", ("cat", "dog", "emu")), ("test", ("cat", "emu"))):
        for name in classes:
            directory = tmp_path / split / name
            directory.mkdir(parents=True)
            for i in range(3):
                image = PIL.Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8))
                (directory / f"{i}.png").write_bytes(encoded(image, "PNG"))
            (directory / "notes.txt").write_text("no image")

    def open_folder(split):
        return open_split(str(tmp_path), split, Views(image_size=16, resize=16), data_dir="")

    split = open_folder("test")
    assert (len(split), split.num_classes, split.channels) == (6, 3, 3)
    assert [split.test_view(i)[1] for i in range(6)] == [0, 0, 0, 2, 2, 2]
    expected = np.asarray(PIL.Image.open(tmp_path / "test" / "emu" / "1.png"))
    np.testing.assert_array_equal(split.pixels(4)[0], expected)
    assert open_split(str(tmp_path), "test", data_dir="", class_split="test").num_classes == 2
    with raises_user_error("has no folder 'validation'; found test, train"):
        open_folder("validation")
    (tmp_path / "none" / "cat").mkdir(parents=True)
    with raises_user_error("none has no images"):
        open_folder("none")
    (tmp_path / "test" / "cat" / "0.png").unlink()
    with raises_user_error(f"{tmp_path}/test/cat/0.png cannot be read: No such file"):
        split.test_view(0)
    (tmp_path / "test" / "bee").mkdir()
    with raises_user_error("has classes that train lacks: bee"):
        open_folder("test")
