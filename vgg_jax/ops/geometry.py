"""What one position of a map sees of an image: its receptive field."""

from typing import NamedTuple


class Geometry(NamedTuple):
    """The channels of a layer's output, and the square of pixels that one of its positions sees.

    Position i of a row or column sees the pixels from `i * stride - padding` to `i * stride - padding +
    receptive_field - 1`. Those outside the image are zeros of the convolutions' padding. The output for an image of
    H x W pixels has H // stride x W // stride positions. A layer of the head, as in dense evaluation, has
    `pool_size - 1` fewer in each direction.
    """

    channels: int  # of the output
    stride: int  # pixels from one position to the next
    receptive_field: int  # side of the square in pixels
    padding: int  # pixels of the first position's square before the image's edge

    def pixels(self, position: int) -> range:
        """Return the rows or columns of the image that a position sees; some may lie outside the image."""
        first = position * self.stride - self.padding
        return range(first, first + self.receptive_field)

    def after(self, kind: str, features: int, kernel_size: int) -> "Geometry":
        """Return the geometry of the next layer.

        Args:
          kind: conv (padded, stride 1), dense (a convolution without padding), pool (2x2, stride 2), or a kind that
            computes each position from itself.
          features: channels of a convolution or dense layer.
          kernel_size: side of its kernel.
        """
        channels, stride, receptive_field, padding = self
        if kind in ("conv", "dense"):
            grown = receptive_field + (kernel_size - 1) * stride
            return Geometry(features, stride, grown, padding + (kind == "conv") * (kernel_size // 2) * stride)
        if kind == "pool":
            return Geometry(channels, 2 * stride, receptive_field + stride, padding)
        return self


PIXEL = Geometry(0, 1, 1, 0)  # an image's own; the number of its channels is not known
