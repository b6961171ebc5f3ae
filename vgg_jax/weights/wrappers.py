"""The state dicts in the content of a checkpoint, which is often a dict of dicts."""

from typing import Any

from vgg_jax.errors import UserError

MOST_NAMES = 10_000  # in one state dict; a VGG-19 with batch norm has 118
MOST_DICTS = 100_000  # in one checkpoint; the state of an optimizer has one for each parameter


def find_state_dicts(content: Any) -> dict[str, dict[str, Any]]:
    """Return the dicts of tensors in the content of a checkpoint that hold kernels.

    Args:
      content: what `torch.load` returned: dicts in dicts of any depth, even with cycles.

    Returns:
      From the path of each dict, such as `state_dict` or `ema.model`, or "" for the content itself, to its tensors.

    Raises:
      UserError: if there is no convolution, or a dict is far larger than a checkpoint's.
    """
    if not isinstance(content, dict):
        raise UserError(f"holds a {type(content).__name__}; expected a state dict, from names to tensors")
    found: dict[str, dict[str, Any]] = {}
    has_convolution = False
    seen, waiting = {id(content)}, [("", content)]
    while waiting:
        path, current = waiting.pop()
        tensors = {name: value for name, value in current.items() if isinstance(name, str) and hasattr(value, "detach")}
        if len(tensors) > MOST_NAMES or len(seen) > MOST_DICTS:
            raise UserError(
                f"holds more than {MOST_NAMES:,} tensors or {MOST_DICTS:,} dicts; expected a state dict of a VGG"
            )
        # The state of an optimizer has tensors of such shapes too, under names such as exp_avg.
        kernels = [tensor.ndim for name, tensor in tensors.items() if name.endswith(("weight", "weights", "kernel"))]
        if kernels and max(kernels) > 1:
            found[path] = tensors
        has_convolution |= 4 in kernels
        for name, value in current.items():
            if isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                # A path of more than 200 characters is no checkpoint's; the limit keeps hostile ones short.
                waiting.append((f"{path}.{name}"[-200:] if path else str(name)[:200], value))
    if not has_convolution:
        keys = ", ".join(repr(name) for name in list(content)[:5] if isinstance(name, str))
        raise UserError(
            f"holds a {type(content).__name__}; expected a state dict, from names to tensors, with convolutions"
            + (f"; found the keys {keys}" if keys else "")
        )
    return dict(reversed(found.items()))
