"""The labels of a data set in the numbering of a network: classes are matched by name."""

from collections.abc import Sequence

from vgg_jax.data.listing import normal, shortened
from vgg_jax.errors import UserError
from vgg_jax.weights.imagenet_classes import imagenet_classes, imagenet_synsets


def network_labels(data: str, names: Sequence[str], classes: Sequence[str]) -> tuple[int, ...]:
    """Return the network's label for each class of a data set.

    ImageNet's classes are found under ImageNet's names and under WordNet identifiers, such as n01440764. Names are
    compared in Unicode's form NFC.

    Args:
      data: the name of the data set, for messages.
      names: the class names of the data set.
      classes: the class names of the network.

    Raises:
      UserError: if the network lacks some of the classes, or has two of one name.
    """
    places: dict[str, list[int]] = {}
    for label, name in enumerate(map(normal, classes)):
        places.setdefault(name, []).append(label)
    if tuple(classes[: len(imagenet_classes())]) == imagenet_classes():  # unused outputs may follow
        places |= {synset: [label] for label, synset in enumerate(imagenet_synsets())}
    names = [normal(name) for name in names]
    if names == list(map(normal, classes)):
        return tuple(range(len(names)))
    if unknown := [name for name in names if name not in places]:
        raise UserError(
            f"{data} has classes that the network lacks: {shortened(unknown)}; expected some of {shortened(classes)}: "
            "rename or remove the folders, or pass the network's names with --classes FILE"
        )
    if doubtful := [name for name in names if len(places[name]) > 1]:
        raise UserError(
            f"the network has several classes of one name: {shortened(doubtful)}; expected a different name for each "
            "class: pass --classes FILE"
        )
    return tuple(places[name][0] for name in names)
