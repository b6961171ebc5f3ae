"""Primitives of JAX for operations that are computed in one way and transformed in another."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Function = Callable[..., Any]


def define(
    name: str,
    on_cpu: Function,
    elsewhere: Function,
    output: Function,
    static: Sequence[str] = (),
    several: bool = False,
    on_tpu: Function | None = None,
) -> Primitive:
    """Return a primitive that is computed by one function on a CPU and by another on accelerators.

    The functions are lowered inline, so that XLA sees their operations.

    Args:
      name: its name in a jaxpr.
      on_cpu: from arrays and the static parameters to an array, or to a list of arrays.
      elsewhere: likewise.
      output: from the abstract arrays and the static parameters to those of the output.
      static: the names of the static parameters.
      several: the output is a list.
      on_tpu: likewise, if TPUs differ from other accelerators.
    """
    primitive = Primitive(name)
    primitive.multiple_results = several
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=tuple(static)))
    primitive.def_abstract_eval(output)
    for function, platform in ((on_cpu, "cpu"), (on_tpu or elsewhere, "tpu"), (elsewhere, None)):
        mlir.register_lowering(primitive, mlir.lower_fun(function, several), platform=platform)
    return primitive


def transform_as(primitive: Primitive, function: Function, transpose: Function | None = None) -> None:
    """Register a function that computes the same as a primitive, for derivatives, transposes and batches.

    Args:
      primitive: the primitive, which is linear in each of its arguments, or in several of them together.
      function: from the arguments of the primitive to its output.
      transpose: the rule of the transpose, if it is not that of `function`.
    """

    def of_some(places: Sequence[int], arguments: Sequence[Any], params: dict[str, Any]) -> Function:
        def of_values(*values: Any) -> Any:
            given = dict(zip(places, values, strict=True))
            return function(*(given.get(i, argument) for i, argument in enumerate(arguments)), **params)

        return of_values

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        places = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
        values = of_some(places, primals, params)
        _, tangent = jax.jvp(values, [primals[i] for i in places], [tangents[i] for i in places])
        return primitive.bind(*primals, **params), tangent

    def transposed(cotangent: Any, *arguments: Any, **params: Any) -> list[Any]:
        places = [i for i, argument in enumerate(arguments) if ad.is_undefined_primal(argument)]
        types = [jax.ShapeDtypeStruct(arguments[i].aval.shape, arguments[i].aval.dtype) for i in places]
        cotangent = jax.tree.map(ad.instantiate_zeros, cotangent, is_leaf=lambda leaf: isinstance(leaf, ad.Zero))
        results = jax.linear_transpose(of_some(places, arguments, params), *types)(cotangent)
        given = dict(zip(places, results, strict=True))
        return [given.get(i) for i in range(len(arguments))]

    def batch(arguments: Sequence[Any], axes: Sequence[int | None], **params: Any) -> tuple[Any, Any]:
        output = jax.vmap(functools.partial(function, **params), tuple(axes))(*arguments)
        return output, jax.tree.map(lambda _: 0, output)

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose or transposed
    batching.primitive_batchers[primitive] = batch


def batch_product(
    primitive: Primitive,
    rank: int,
    merged: Sequence[tuple[int, int]],
    arguments: Sequence[jax.Array],
    axes: Sequence[int | None],
    **params: Any,
) -> tuple[jax.Array, int]:
    """Return the product of batches, and its batch axis: the batching rule of a bilinear primitive.

    If one argument is a batch, its batch axis is merged into another axis. If both are, both get a leading axis, as
    `jax.vmap` adds it; the primitive takes arguments with any number of leading axes.

    Args:
      primitive: the primitive.
      rank: the number of axes of each argument without leading axes.
      merged: for each argument, the axis that its batch may be merged into, and the axis of the output that holds it
        then. They count from the end.
      arguments: two arrays.
      axes: their batch axes, None for an argument that is not a batch.
      **params: the static parameters of the primitive.
    """
    batches = [i for i, axis in enumerate(axes) if axis is not None]
    size = arguments[batches[0]].shape[axes[batches[0]] or 0]
    arguments = list(arguments)
    place = batches[0]
    if len(batches) == 1 and arguments[1 - place].ndim == rank:
        source, target = (axis + rank for axis in merged[place])
        x = jnp.moveaxis(arguments[place], axes[place] or 0, source)
        arguments[place] = x.reshape(*x.shape[:source], size * x.shape[source + 1], *x.shape[source + 2 :])
        y = primitive.bind(*arguments, **params)
        return y.reshape(*y.shape[:target], size, -1, *y.shape[target + 1 :]), target
    leading = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arguments, axes, strict=True)
    ]
    return primitive.bind(*leading, **params), 0


def over_leading_axes(function: Function, rank: int) -> Function:
    """Return the function for arguments with leading axes that `jax.vmap` added to those of a rank."""

    def batched(*arguments: jax.Array, **params: Any) -> Any:
        mapped = functools.partial(function, **params)
        for _ in range(arguments[0].ndim - rank):
            mapped = jax.vmap(mapped)
        return mapped(*arguments)

    return batched


def vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Return the arrays, all varying over the same manual axes of `jax.shard_map`, as operations of JAX do it."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*varying)
    return [
        jax.lax.pcast(array, tuple(axes - own), to="varying") if axes - own else array
        for array, own in zip(arrays, varying, strict=True)
    ]
