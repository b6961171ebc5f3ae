"""The model card of a network: README.md with a header that the Hugging Face hub reads."""

import dataclasses
import json
import re
from collections.abc import Mapping

import jax

from vgg_jax.weights.formats import Loaded

MOST_NAMES = 10  # class names that a card lists


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a network.

    Attributes:
      dataset: the data set, such as "CIFAR-10, JPEG copy".
      split: the images that were evaluated, such as "10,000 test images".
      accuracy: the share of right answers from 0 to 1, by the name of the view, such as "with horizontal flip".
      command: the command that trained and evaluated the network.
      machine: the machine, and the versions of the packages.
      details: further rows of the card, such as the training images, the epochs and the license.
    """

    dataset: str
    split: str
    accuracy: Mapping[str, float]
    command: str
    machine: str
    details: Mapping[str, str] = dataclasses.field(default_factory=dict)


def model_card(network: Loaded, name: str, is_timms: bool, sha256: str = "", measured: Measured | None = None) -> str:
    """Return a model card that states what the network carries, what was measured, and how to load it.

    Without `measured` it claims no accuracy. It claims a license only if `measured.details` has one.

    Args:
      network: the network.
      name: the title.
      is_timms: whether timm reads the folder.
      sha256: the SHA-256 of model.safetensors.
      measured: the figures; the header then has them for the hub too.

    Returns:
      Markdown with a YAML header.
    """
    tags = ["image-classification", "vgg_jax", "jax", *(["timm"] if is_timms else [])]
    header = ["---", "library_name: " + ("timm" if is_timms else "vgg_jax"), "tags:", *(f"- {tag}" for tag in tags)]
    if network.model.num_classes is not None and network.outputs in (None, "softmax"):
        header.append("pipeline_tag: image-classification")
    facts = _facts(network) + ([("SHA-256 of model.safetensors", f"`{sha256}`")] if sha256 else [])
    rows = [f"| {subject} | {fact} |" for subject, fact in facts]
    lines = [f"# {name}", "", "| property | value |", "|---|---|", *rows, "", *_usage(is_timms)]
    if measured:
        header += _model_index(name, measured)
        lines += ["", *_measured_lines(measured)]
    return "\n".join([*header, "---", "", *lines]) + "\n"


def _model_index(name: str, measured: Measured) -> list[str]:
    """Return the lines of the header that give the hub the figures. JSON's strings are YAML's."""
    kind = re.sub(r"[^a-z0-9]+", "-", measured.dataset.partition(",")[0].lower())
    lines = ["model-index:", f"- name: {json.dumps(name)}", "  results:", "  - task:"]
    lines += ["      type: image-classification", "    dataset:", f"      type: {json.dumps(kind)}"]
    lines += [f"      name: {json.dumps(f'{measured.dataset}: {measured.split}', ensure_ascii=False)}", "    metrics:"]
    for view, accuracy in measured.accuracy.items():
        label = json.dumps(f"accuracy, {view}", ensure_ascii=False)
        lines += ["    - type: accuracy", f"      value: {100 * accuracy:.4g}", f"      name: {label}"]
    return lines


def _measured_lines(measured: Measured) -> list[str]:
    """Return the section of the card with the figures, the command and the machine."""
    rows = [f"| accuracy, {view} | {accuracy:.2%} |" for view, accuracy in measured.accuracy.items()]
    rows += [f"| {subject} | {fact} |" for subject, fact in measured.details.items()]
    return [
        "## Measured",
        "",
        f"{measured.dataset}: {measured.split}.",
        "",
        *("| | |", "|---|---|", *rows, ""),
        *("```sh", measured.command, "```", "", f"Machine: {measured.machine}."),
    ]


def _facts(network: Loaded) -> list[tuple[str, str]]:
    """Return the subjects and facts of the card's table."""
    model, preprocessing = network.model, network.preprocessing
    norm = " with batch normalization" if model.batch_norm else ""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(network.variables["params"]))
    facts = [
        ("network", f"VGG-{model.depth} (column {model.column}){norm}"),
        ("parameters", f"{parameters:,}"),
        ("input channels", str(network.variables["params"]["conv1_1"]["kernel"].shape[2])),
        (
            "outputs",
            "features" if model.num_classes is None else f"{model.num_classes} ({network.outputs or 'softmax'})",
        ),
    ]
    if network.classes is not None:
        names = ", ".join(json.dumps(name, ensure_ascii=False) for name in network.classes[:MOST_NAMES])
        more = len(network.classes) - MOST_NAMES
        facts.append(("classes", (names + (f" and {more:,} more" if more > 0 else "")).replace("|", "\\|")))
    if preprocessing is None:
        return [*facts, ("preprocessing", "not stated")]
    return [
        *facts,
        ("images", f"short side {preprocessing.resize}, bilinear; center crop {preprocessing.crop}"),
        ("channel order", preprocessing.channel_order),
        ("mean", ", ".join(f"{value:.6g}" for value in preprocessing.mean)),
        ("std", ", ".join(f"{value:.6g}" for value in preprocessing.std)),
    ]


def _usage(is_timms: bool) -> list[str]:
    """Return the lines that say how to load the network."""
    lines = ["```python", "import vgg_jax", "", 'net = vgg_jax.load("FOLDER")  # or "hf-hub:OWNER/NAME"']
    lines += ['net.predict("photo.jpg")', "```"]
    if is_timms:
        return [
            *lines,
            "",
            "```python",
            "import timm",
            "",
            'timm.create_model("local-dir:FOLDER", pretrained=True)',
            "```",
        ]
    return [*lines, "", "timm has no name for this network and does not read this folder."]
