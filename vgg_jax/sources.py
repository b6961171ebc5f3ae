"""What `load` accepts: pretrained names, files, runs, folders in timm's shape, and repositories of the hub."""

import os

from vgg_jax.errors import UserError
from vgg_jax.export.folders import PREFIX, is_network_folder, read_folder
from vgg_jax.weights.download import NAMES, load_weights
from vgg_jax.weights.formats import Announce, Loaded


def read_source(source: str, features_only: bool, step: str | int, announce: Announce | None) -> Loaded:
    """Read a network from wherever it is.

    Args:
      source: as for `network.load`.
      features_only: leave out the head if it is unknown.
      step: the checkpoint of a run; "latest" for every other source.
      announce: as for `formats.load_file`; not called for a run.

    Raises:
      UserError: if the source is missing, damaged or not a VGG, or a step is given for one that is no run.
    """
    is_remote = source.startswith(PREFIX)
    is_folder = not is_remote and source not in NAMES and os.path.isdir(source)
    if is_folder and not is_network_folder(source):
        from vgg_jax.training.run_weights import load_run  # here, because only a run needs Orbax

        return load_run(source, step)
    if not is_remote and source not in NAMES and not os.path.exists(source):
        raise UserError(
            f"{source} does not exist; expected a .pth, .safetensors, .h5, .keras or .onnx file, a run's directory, a "
            f"folder in timm's shape, hf-hub:OWNER/NAME, or one of {', '.join(NAMES)}"
        )
    if step != "latest":
        raise UserError(f"step is {step}, but {source} is not the directory of a run; expected one: leave out the step")
    if is_remote:
        from vgg_jax.export.hub import load_from_hub

        return load_from_hub(source, features_only, announce)
    return read_folder(source, features_only, announce) if is_folder else load_weights(source, features_only, announce)
