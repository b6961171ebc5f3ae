"""The model card of a network: README.md with a header that the Hugging Face hub reads."""

import json

import jax

from vgg_jax.weights.formats import Loaded

MOST_NAMES = 10  # class names that a card lists


def model_card(network: Loaded, name: str, is_timms: bool) -> str:
    """Return a model card that states what the network carries, and how to load it. It claims no accuracy or license.

    Args:
      network: the network.
      name: the title.
      is_timms: whether timm reads the folder.
    """
    tags = ["image-classification", "vgg_jax", "jax", *(["timm"] if is_timms else [])]
    header = ["---", "library_name: " + ("timm" if is_timms else "vgg_jax"), "tags:", *(f"- {tag}" for tag in tags)]
    if network.model.num_classes is not None and network.outputs in (None, "softmax"):
        header.append("pipeline_tag: image-classification")
    facts = "\n".join(f"| {subject} | {fact} |" for subject, fact in _facts(network))
    lines = [*header, "---", "", f"# {name}", "", "| property | value |", "|---|---|", facts, "", *_usage(is_timms)]
    return "\n".join(lines) + "\n"


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
