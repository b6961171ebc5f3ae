"""Keras' configurations of networks: JSON, brought to a chain of layers. No layer is built, and nothing is executed."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vgg_jax.errors import UserError

MODELS = ("Functional", "Model", "Sequential")  # classes that contain layers
DEEPEST = 8  # models in models


class Step(NamedTuple):
    """One layer of a chain."""

    path: tuple[str, ...]  # its name, after those of the models around it
    auto: tuple[str, ...]  # the names of its group in a .weights.h5 file: its class, with a number
    kind: str  # its class in snake case
    settings: Mapping[str, Any]


def steps_of(config: Any) -> tuple[list[Step], list[str]]:
    """Return the layers of a network in the order of the computation, with those of nested models in place.

    Args:
      config: the configuration as Keras writes it to config.json or to the attribute model_config.

    Returns:
      The layers, and the names of layers before the chain that form no chain, such as those of `preprocess_input`.

    Raises:
      UserError: if the network has branches, several outputs or an unknown class.
    """
    try:
        return _model_steps(config, (), ())
    except RecursionError:
        raise UserError(f"its configuration is nested more than {DEEPEST} deep") from None


def snake_case(name: str) -> str:
    """Return Keras' snake case of a class name: max_pooling2d of MaxPooling2D."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _model_steps(model: Any, path: tuple[str, ...], auto: tuple[str, ...]) -> tuple[list[Step], list[str]]:
    if len(path) > DEEPEST:
        raise UserError(f"its models are nested more than {DEEPEST} deep; expected a VGG and its head")
    inner = model["config"]
    entries = inner if isinstance(inner, list) else inner["layers"]  # a list in Keras 1
    groups, counts = {}, dict[str, int]()
    for entry in entries:
        kind = snake_case(entry["class_name"])
        counts[kind] = counts.get(kind, -1) + 1
        groups[_name(entry)] = kind if not counts[kind] else f"{kind}_{counts[kind]}"
    chain, front = (entries, []) if model["class_name"] == "Sequential" else _chain(inner)
    steps: list[Step] = []
    for entry in chain:
        name = _name(entry)
        place = ((*path, name), (*auto, groups[name]))
        if entry["class_name"] in MODELS:
            nested, before = _model_steps(entry, *place)
            if before and any(step.kind == "conv2d" for step in steps):
                raise UserError(f"its layers {', '.join(before)} form no chain; expected a VGG")
            steps += nested
            front += before
        else:
            steps.append(Step(*place, snake_case(entry["class_name"]), entry["config"]))
    return steps, front


def _chain(config: Any) -> tuple[list[Any], list[str]]:
    """Return the layers of a functional model from the input to the output, and the names of layers in front."""
    entries = {_name(entry): entry for entry in config["layers"]}
    outputs = sorted(set(_sources(config["output_layers"])))
    if len(outputs) != 1:
        raise UserError(
            f"has {len(outputs)} outputs, {', '.join(outputs)}; expected one: save a model with one of them"
        )
    chain, name = list[Any](), outputs[0]
    while True:
        entry = entries.pop(name)  # a KeyError if the chain returns to a layer
        nodes = entry.get("inbound_nodes", [])
        sources = sorted(set(_sources(nodes)))
        if len(nodes) > 1:
            raise UserError(f"its layer {name} is used {len(nodes)} times; expected a VGG, whose layers form a chain")
        if len(sources) > 1:
            return chain[::-1], _front(name, entry, entries)
        chain.append(entry)
        if not sources:
            return chain[::-1], []
        name = sources[0]


def _front(name: str, entry: Any, entries: dict[str, Any]) -> list[str]:
    """Return the names of the layers up to `entry`, which joins several; raise UserError if they have weights."""
    found, waiting = [name], list(_sources(entry["inbound_nodes"]))
    while waiting:
        source = entries.pop(waiting.pop(), None)
        if source is None:
            continue
        if source["class_name"] in MODELS or source["config"].get("filters") or source["config"].get("units"):
            raise UserError(
                f"its layer {name} joins the outputs of several layers, {_name(source)} among them; expected a VGG, "
                "whose layers form a chain"
            )
        if source["class_name"] != "InputLayer":
            found.append(_name(source))
        waiting += _sources(source.get("inbound_nodes", []))
    return found[::-1]


def _sources(node: Any) -> Iterator[str]:
    """Yield the names of the layers that a node takes its input from, in the notation of Keras 2 or 3."""
    if isinstance(node, dict):
        history = node.get("config", {}).get("keras_history") if isinstance(node.get("config"), dict) else None
        if history:
            yield history[0]
        else:
            for value in node.values():
                yield from _sources(value)
    elif isinstance(node, list):
        if len(node) > 2 and isinstance(node[0], str) and all(isinstance(i, int) for i in node[1:3]):
            yield node[0]
            node = node[3:]
        for value in node:
            yield from _sources(value)


def _name(entry: Any) -> str:
    inner = entry["config"]
    name: str = entry.get("name") or inner["name"]
    return name
