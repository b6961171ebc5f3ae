"""The 3x3 convolution by a method of `ops.methods`, and its derivatives, as primitives of JAX.

A convolution is bilinear. So `product` and `kernel_gradient` suffice for derivatives of every order: each is the
other's transpose. Reverse mode uses `gradients`, which computes all gradients of a convolution in one loop:

| primitive | computes | derivative |
|---|---|---|
| conv3x3 | product(x, kernel) + bias | conv3x3_tangent |
| conv3x3_tangent | product(tx, kernel) + product(x, tkernel) + tbias | of its parts; transpose: conv3x3_gradients |
| conv3x3_gradients | the gradients of x, kernel and bias | of its parts |
| conv3x3_product | product(x, kernel) | bilinear |
| conv3x3_kernel_gradient | kernel_gradient(x, dy) | bilinear |
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching
from jax.sharding import NamedSharding, PartitionSpec

from vgg_jax.ops import methods
from vgg_jax.ops.bias import add_bias
from vgg_jax.ops.forms import by_platform
from vgg_jax.ops.primitives import batch_product, define, over_leading_axes, transform_as, vary_alike

Wanted = tuple[bool, bool, bool]  # of x, kernel and bias, those that have tangents or whose gradients are wanted


def conv_by_method(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, method: str, precision: str | None = None
) -> jax.Array:
    """Return the 3x3 convolution by a method on a CPU, and by XLA's convolution on accelerators.

    A CPU multiplies float32 in float32, so the methods ignore the precision.

    Args:
      x: feature maps (N, H, W, C).
      kernel: (3, 3, C, D).
      bias: (D,).
      method: a key of `methods.METHODS`.
      precision: that of XLA's products on accelerators, and of those of all derivatives there.

    Returns:
      (N, H, W, D).
    """
    y: jax.Array = _conv.bind(*vary_alike(x, kernel, bias), method=method, precision=precision)
    return y


def conv_by_xla(x: jax.Array, kernel: jax.Array, bias: jax.Array, precision: str | None = None) -> jax.Array:
    """Return the convolution by XLA, by a kernel of any size; for the arguments see `conv_by_method`."""
    return add_bias(_product_by_xla(x, kernel, precision=precision), bias)


def _product_by_xla(x: jax.Array, kernel: jax.Array, *, precision: str | None, method: str = "") -> jax.Array:
    if x.shape[-1] > 4 or x.dtype.itemsize > 2:
        return _as_it_is(x, kernel, precision)
    forms = {name: functools.partial(form, precision=precision) for name, form in FEW_CHANNELS.items()}
    y: jax.Array = by_platform("few_channels", forms, x, kernel)
    return y


def _as_it_is(x: jax.Array, kernel: jax.Array, precision: str | None) -> jax.Array:
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions, precision=precision)


def _filled_up(x: jax.Array, kernel: jax.Array, precision: str | None) -> jax.Array:
    """Return the convolution of maps whose channels are filled up with zeros to 8.

    In 16 bits cuDNN's kernels for tensor cores read 8 numbers at once. XLA leaves 3 channels as they are. A training
    step of VGG-16, 256 images of 224x224 in bfloat16, takes 47.2 instead of 50.0 ms (H200), mostly by the gradient of
    the kernel of conv1_1.
    """
    missing = 8 - x.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))
    return _as_it_is(x, jnp.pad(kernel, ((0, 0), (0, 0), (0, missing), (0, 0))), precision)


FEW_CHANNELS = {"as_it_is": _as_it_is, "filled_up": _filled_up}  # of images, in 16 bits


def product(x: jax.Array, kernel: jax.Array, **params: Any) -> jax.Array:
    """Return the convolution without bias; `x` and `kernel` may have the same leading axes."""
    y: jax.Array = _product.bind(x, kernel, **params)
    return y


def kernel_gradient(x: jax.Array, dy: jax.Array, **params: Any) -> jax.Array:
    """Return the gradient (3, 3, C, D) of the kernel; `x` and `dy` may have the same leading axes."""
    dkernel: jax.Array = _kernel_gradient.bind(x, dy, **params)
    return dkernel


def _without_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of a CPU, which ignores the precision."""
    return lambda *arrays, precision, **params: function(*arrays, **params)


def _flipped(kernel: jax.Array) -> jax.Array:
    """Return the kernel (3, 3, D, C) of the transposed convolution, whose product with `dy` is the gradient of `x`."""
    return kernel.swapaxes(-2, -1)[..., ::-1, ::-1, :, :]


def _product_output(x: Any, kernel: Any, *_: Any, **__: Any) -> Any:
    return x.update(shape=(*x.shape[:-1], kernel.shape[-1]))


_product = define(
    "conv3x3_product",
    over_leading_axes(_without_precision(methods.convolution), 4),
    over_leading_axes(_product_by_xla, 4),
    _product_output,
    ["method", "precision"],
)
ad.defbilinear(
    _product,
    lambda dy, x, kernel, **params: product(dy, _flipped(kernel), **params),
    lambda dy, x, kernel, **params: kernel_gradient(x, dy, **params),
)
batching.primitive_batchers[_product] = functools.partial(batch_product, _product, 4, ((-4, -4), (-1, -1)))


def _kernel_gradient_by_method(x: jax.Array, dy: jax.Array, *, method: str) -> jax.Array:
    kernel = jnp.zeros((3, 3, x.shape[-1], dy.shape[-1]), x.dtype)
    return methods.gradients(x, kernel, dy, method=method, wanted=(False, True, False))[0]


def _kernel_gradient_by_xla(x: jax.Array, dy: jax.Array, **params: Any) -> jax.Array:
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], dy.shape[-1]), x.dtype)
    (dkernel,) = jax.linear_transpose(functools.partial(_product_by_xla, x, **params), kernel)(dy)
    gradient: jax.Array = dkernel
    return gradient


_kernel_gradient = define(
    "conv3x3_kernel_gradient",
    over_leading_axes(_without_precision(_kernel_gradient_by_method), 4),
    over_leading_axes(_kernel_gradient_by_xla, 4),
    lambda x, dy, **_: x.update(shape=(*x.shape[:-4], 3, 3, x.shape[-1], dy.shape[-1])),
    ["method", "precision"],
)
ad.defbilinear(
    _kernel_gradient,
    lambda dkernel, x, dy, **params: product(dy, _flipped(dkernel), **params),
    lambda dkernel, x, dy, **params: product(x, dkernel, **params),
)
batching.primitive_batchers[_kernel_gradient] = functools.partial(
    batch_product, _kernel_gradient, 4, ((-1, -2), (-1, -1))
)


def _gradients_in_parts(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, *, wanted: Wanted, **params: Any
) -> list[jax.Array]:
    parts: tuple[Callable[[], jax.Array], ...] = (
        lambda: product(dy, _flipped(kernel), **params),
        lambda: kernel_gradient(x, dy, **params),
        lambda: methods.bias_gradient(dy),
    )
    return [part() for part, is_wanted in zip(parts, wanted, strict=True) if is_wanted]


def _gradients_by_xla(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, *, wanted: Wanted, **params: Any
) -> list[jax.Array]:
    def input_gradient() -> jax.Array:
        (dx,) = jax.linear_transpose(lambda x: _product_by_xla(x, kernel, **params), x)(dy)
        gradient: jax.Array = dx
        return gradient

    parts: tuple[Callable[[], jax.Array], ...] = (
        input_gradient,
        lambda: _kernel_gradient_by_xla(x, dy, **params),
        lambda: dy.sum((0, 1, 2)),
    )
    return [part() for part, is_wanted in zip(parts, wanted, strict=True) if is_wanted]


def _gradients_output(x: Any, kernel: Any, dy: Any, *, wanted: Wanted, **_: Any) -> list[Any]:
    sharding = NamedSharding(dy.sharding.mesh, PartitionSpec(None))
    bias = dy.update(shape=dy.shape[-1:], sharding=sharding)
    return [gradient for gradient, is_wanted in zip((x, kernel, bias), wanted, strict=True) if is_wanted]


_gradients = define(
    "conv3x3_gradients",
    _without_precision(methods.gradients),
    _gradients_by_xla,
    _gradients_output,
    ["method", "precision", "wanted"],
    several=True,
)
transform_as(_gradients, _gradients_in_parts)


def _tangent_in_parts(
    x: jax.Array, kernel: jax.Array, *tangents: jax.Array, wanted: Wanted, **params: Any
) -> jax.Array:
    given = iter(tangents)
    terms = [product(next(given), kernel, **params)] if wanted[0] else []
    terms += [product(x, next(given), **params)] if wanted[1] else []
    total = sum(terms[1:], terms[0]) if terms else jnp.zeros((*x.shape[:-1], kernel.shape[-1]), x.dtype)
    return total + next(given) if wanted[2] else total


def _tangent_transpose(dy: Any, x: jax.Array, kernel: jax.Array, *tangents: Any, **params: Any) -> list[Any]:
    gradients = iter(_gradients.bind(x, kernel, ad.instantiate_zeros(dy), **params))
    return [None, None, *(g if ad.is_undefined_primal(t) else None for g, t in zip(gradients, tangents, strict=True))]


_tangent = define(
    "conv3x3_tangent", _tangent_in_parts, _tangent_in_parts, _product_output, ["method", "precision", "wanted"]
)
transform_as(_tangent, _tangent_in_parts, _tangent_transpose)


def _conv_in_parts(x: jax.Array, kernel: jax.Array, bias: jax.Array, **params: Any) -> jax.Array:
    return add_bias(product(x, kernel, **params), bias)


def _conv_by_xla(x: jax.Array, kernel: jax.Array, bias: jax.Array, *, method: str, precision: str | None) -> jax.Array:
    return conv_by_xla(x, kernel, bias, precision)


def _conv_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[jax.Array, jax.Array]:
    x, kernel, _ = primals
    wanted = tuple(not isinstance(tangent, ad.Zero) for tangent in tangents)
    given = [tangent for tangent, is_given in zip(tangents, wanted, strict=True) if is_given]
    tangent = _tangent.bind(x, kernel, *given, wanted=wanted, **params)
    return _conv.bind(*primals, **params), tangent


_conv = define(
    "conv3x3", _without_precision(methods.convolution), _conv_by_xla, _product_output, ["method", "precision"]
)
transform_as(_conv, _conv_in_parts)
ad.primitive_jvps[_conv] = _conv_jvp
