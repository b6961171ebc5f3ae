"""The choices of an ONNX file: its input, its size and its output."""

import dataclasses

from vgg_jax.errors import UserError
from vgg_jax.weights.formats import Loaded

LAYOUTS = ("NCHW", "NHWC")
DEFAULT_SIDE = 224  # of the images if the network states no preprocessing, as in the paper


@dataclasses.dataclass(frozen=True)
class OnnxOptions:
    """The choices of an ONNX file. The defaults keep everything that the network carries."""

    layout: str = "NCHW"  # axes of the images: NCHW or NHWC
    uint8: bool = False  # the input is RGB or gray pixels from 0 to 255; the graph normalizes them
    batch: int | None = None  # number of images; None: any number
    size: tuple[int, int] | None = None  # height and width of the images; None: the crop of the preprocessing, or 224
    dynamic_size: bool = False  # any height and width, if the head allows it
    fold: bool = False  # fold the batch norm into the convolutions
    softmax: bool = False  # end with the softmax; if the outputs are sigmoid, with the sigmoid

    def checked_size(self, network: Loaded) -> tuple[int, int] | None:
        """Return the height and width of the images, or None if they are dynamic.

        Args:
          network: the network to write.

        Raises:
          UserError: if an option is not valid, or does not fit the network.
        """
        self._check(network)
        if self.dynamic_size:
            return None
        crop = network.preprocessing.crop if network.preprocessing else DEFAULT_SIDE
        size = self.size or (crop, crop)
        smallest, sides = network.model.smallest_image(), network.sides
        if min(size) < smallest:
            raise UserError(
                f"the size is {size[0]}x{size[1]}; expected at least {smallest}x{smallest}, which the max pools need: "
                "choose a larger size"
            )
        if sides is not None and not (size[0] in sides and size[1] in sides):
            raise UserError(
                f"the size is {size[0]}x{size[1]}, and the network takes images of {sides[0]} to {sides[-1]} pixels a "
                "side: choose a size in this range"
            )
        return size

    def _check(self, network: Loaded) -> None:
        model, preprocessing = network.model, network.preprocessing
        channels = network.variables["params"]["conv1_1"]["kernel"].shape[2]
        flattens = model.final_layer is None and not model.conv_head
        problems = [
            (self.layout in LAYOUTS, f"the layout is {self.layout!r}; expected {' or '.join(LAYOUTS)}"),
            (self.batch is None or self.batch > 0, f"the batch is {self.batch}; expected 1 or more images"),
            (not (self.dynamic_size and self.size), "found a size and a dynamic size; expected one of them"),
            (not self.dynamic_size or network.sides is None,
             "a dynamic size needs a network for images of any size; found one for "
             f"{network.sides and network.sides[0]} to {network.sides and network.sides[-1]} pixels a side: give a "
             "size"),
            (not (self.dynamic_size and flattens) or model.pool_size == 1,
             f"a dynamic size needs pool_size 1; found {model.pool_size}, whose windows depend on the size: give a "
             "size"),
            (not self.uint8 or preprocessing is not None,
             "uint8 images need the preprocessing, which the network does not state: add --preprocessing imagenet, "
             "authors or cifar10, or pass preprocessing to vgg_jax.load"),
            (not (self.uint8 and preprocessing) or channels == len(preprocessing.mean),
             f"the network takes images of {channels} channel(s), and its preprocessing gives "
             f"{len(preprocessing.mean) if preprocessing else 0}: pass the preprocessing of its training"),
            (not self.softmax or model.num_classes is not None,
             "a softmax needs classes; found a network without them: leave out the softmax"),
            (not self.softmax or network.outputs != "values",
             "a softmax needs logits; the outputs of the network are values: leave out the softmax"),
            (not self.softmax or model.num_classes != 1 or network.outputs == "sigmoid",
             "the softmax of one output is always 1; expected outputs that mean a sigmoid: add --outputs sigmoid"),
        ]  # fmt: skip
        for holds, problem in problems:
            if not holds:
                raise UserError(problem)


DEFAULT = OnnxOptions()
