"""Files of weights: .safetensors, PyTorch's .pth, Keras' .h5, and a run's directory."""

import contextlib
import dataclasses
import json
import os
import stat
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.preprocess import AUTHORS, FEATURES, IMAGENET, Preprocessing
from vgg_jax.weights import Variables, from_keras, from_torch, to_torch

NOT_SAVED = ("parent", "name", "dtype", "param_dtype", "fast", "head_sharding")
MODEL_FIELDS = [field.name for field in dataclasses.fields(VGG) if field.name not in NOT_SAVED]
LARGEST = 4 * 2**30  # bytes of one file's arrays: a VGG-19 in float64 has 1.15 GB


def load(path: str | os.PathLike) -> tuple[VGG, Variables]:
    """Loads a network: .pth or .pt, .safetensors, Keras' .h5, or a run's directory.

    Depth, batch norm, classes and head are read off the file. PyTorch's files need torch 2.10 or newer, and are read
    with `weights_only=True`: nothing in them is executed.

    Raises:
      UserError: a ValueError, where the file is missing or damaged, or no VGG's weights, with every mismatch.
    """
    return load_with_preprocessing(path)[:2]


def load_with_preprocessing(path: str | os.PathLike) -> tuple[VGG, Variables, Preprocessing]:
    """`load`, and what the weights want of an image: as the file says, or else as its format's ImageNet weights do."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; expected a .pth, .safetensors or .h5 file, or a run's directory")
    if os.path.isdir(path):
        return _load_run(path)
    suffix = os.path.splitext(path)[1]
    reader = {".pth": _load_pth, ".pt": _load_pth, ".safetensors": _load_safetensors, ".h5": _load_h5}.get(suffix)
    if reader is None:
        raise UserError(f"{path} ends in {suffix!r}; expected .pth, .pt, .safetensors, .h5, or a run's directory")
    try:
        return reader(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def save(
    path: str | os.PathLike, model: VGG, variables: Mapping[str, Any], preprocessing: Preprocessing = IMAGENET
) -> None:
    """Saves a network under torchvision's names, as .safetensors or .pth by its suffix; the file appears whole.

    A .safetensors file holds the model's fields and the preprocessing in its metadata. A .pth file, for which torch is
    needed, holds the arrays alone, and torchvision loads it.

    Raises:
      UserError: a ValueError, for another suffix, or variables that do not fit the model.
    """
    path = os.fspath(path)
    check_target(path)
    suffix = os.path.splitext(path)[1]
    state_dict = to_torch(model, variables)
    partial = f"{path}.partial"
    try:
        if suffix == ".safetensors":
            _write_safetensors(partial, model, state_dict, preprocessing)
        else:
            _write_pth(partial, state_dict)
        os.replace(partial, path)
    except Exception as error:  # whatever the libraries raise where the disk is full or read-only
        with contextlib.suppress(OSError):
            os.remove(partial)
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot write {path}: {error}") from None


def check_target(path: str | os.PathLike) -> None:
    """Checks that `save` could write to `path`.

    Raises:
      UserError: for a suffix that is not one of its formats, or a folder that does not exist.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1]
    if suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(f"{path} ends in {suffix!r}; expected .safetensors or .pth")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UserError(f"{folder}, where {os.path.basename(path)} should go, is no folder; make it first")


def _write_safetensors(path: str, model: VGG, state_dict: dict[str, np.ndarray], preprocessing: Preprocessing) -> None:
    from safetensors.numpy import save_file

    metadata = {
        "vgg": json.dumps({name: getattr(model, name) for name in MODEL_FIELDS}),
        "dtype": np.dtype(model.dtype).name,
        "preprocessing": json.dumps(dataclasses.asdict(preprocessing)),
    }
    save_file(state_dict, path, metadata)


def _write_pth(path: str, state_dict: dict[str, np.ndarray]) -> None:
    torch = _import_torch()
    tensors = {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype.name == "bfloat16"
        else torch.from_numpy(array)
        for name, array in state_dict.items()
    }
    torch.save(tensors, path)


def _load_safetensors(path: str) -> tuple[VGG, Variables, Preprocessing]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, MemoryError, ValueError) as error:
        raise UserError(f"not a whole .safetensors file: {error}") from None
    if "vgg" not in metadata:
        return (*_from_state_dict(arrays), IMAGENET)
    try:
        fields = _tuples(json.loads(metadata["vgg"]))
        param_dtype = arrays["features.0.weight"].dtype
        model = VGG(**fields, dtype=np.dtype(metadata["dtype"]), param_dtype=param_dtype)
        preprocessing = Preprocessing(**_tuples(json.loads(metadata["preprocessing"])))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"its metadata do not describe a VGG: {error}") from None
    return (*_from_state_dict(arrays, model), preprocessing)


def _load_pth(path: str) -> tuple[VGG, Variables, Preprocessing]:
    torch = _import_torch()
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise UserError(f"not a whole archive: {error}") from None
        size = sum(member.file_size for member in members)
        # torch.save stores without compression: what would grow when it is read is not its work.
        if size > LARGEST or any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise UserError(f"an archive of {size:,} bytes, some compressed; expected one that torch.save wrote")
        for member in members:
            outside = member.filename.startswith("/") or ".." in member.filename.split("/")
            if outside or stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"an archive with {member.filename!r}, a link or a path outside; expected torch.save's")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"refused by torch.load(weights_only=True), which executes nothing: {reason}") from None
    if isinstance(state_dict, dict) and isinstance(state_dict.get("state_dict"), dict):
        state_dict = state_dict["state_dict"]
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state_dict.items()
    ):
        raise UserError(f"holds a {type(state_dict).__name__}; expected a state dict, of names and tensors")
    classifier = [a for name, a in state_dict.items() if name.startswith("classifier.")]
    if classifier and all(bool(a.isnan().all()) for a in classifier):
        # torchvision's IMAGENET1K_FEATURES: its classifier is filled with NaN.
        state_dict = {name: a for name, a in state_dict.items() if not name.startswith("classifier.")}
        return (*_from_state_dict(state_dict), FEATURES)
    return (*_from_state_dict(state_dict), IMAGENET)


def _load_h5(path: str) -> tuple[VGG, Variables, Preprocessing]:
    try:
        import h5py
    except ImportError:
        raise UserError("h5py, which reads Keras' files, is not installed: pip install h5py") from None
    arrays = {}
    try:
        with h5py.File(path, "r") as file:
            root = file.get("model_weights", file)
            for layer in root:
                names = root[layer].attrs.get("weight_names", [])
                if len(names):
                    arrays[layer] = [np.asarray(root[layer][n if isinstance(n, str) else n.decode()]) for n in names]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"not a whole file of Keras weights: {error}") from None
    return (*from_keras(arrays), AUTHORS)


def _load_run(path: str) -> tuple[VGG, Variables, Preprocessing]:
    from vgg_jax.checkpoint import read_latest, saved_steps
    from vgg_jax.config import create_model
    from vgg_jax.run_directory import read_config
    from vgg_jax.training import evaluated_variables

    config = read_config(path)
    directory = os.path.abspath(os.path.join(path, "checkpoints"))
    if not saved_steps(directory):
        raise UserError(f"{path} holds no checkpoint yet")
    if config.model.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise UserError(
            f"{path} is a run in float64, which JAX holds only in 64-bit mode: set JAX_ENABLE_X64=1, or call "
            'jax.config.update("jax_enable_x64", True), first'
        )
    try:
        model = create_model(config.model)
    except ValueError as error:
        raise UserError(f"{path} is not a run's directory: config.json: model.{error}") from None
    variables = jax.tree.map(jnp.asarray, evaluated_variables(read_latest(directory)))
    if not variables["batch_stats"]:
        del variables["batch_stats"]
    data = config.data
    _check_fits(path, model, variables, (data.image_size, data.image_size, len(data.mean)))
    order = "L" if len(data.mean) == 1 else "RGB"
    return model, variables, Preprocessing(data.resize, data.image_size, data.mean, data.std, order)


def _check_fits(path: str, model: VGG, variables: Variables, image_shape: tuple[int, int, int]) -> None:
    """Raise UserError if the variables of a run's checkpoint are not those of the model of its configuration."""
    from vgg_jax.integrity import named_leaves

    images = jax.ShapeDtypeStruct((1, *image_shape), model.dtype)
    shapes = [named_leaves(tree) for tree in (variables, jax.eval_shape(model.init, jax.random.key(0), images))]
    found, expected = ({name: leaf.shape for name, leaf in leaves.items()} for leaves in shapes)
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        raise UserError(
            f"{path}: the checkpoint is of another network than config.json: {wrong[0]} is "
            f"{found.get(wrong[0], 'absent')}, expected {expected.get(wrong[0], 'none')}; "
            "restore the config.json of the run"
        )


def _from_state_dict(arrays: Mapping[str, Any], model: VGG | None = None) -> tuple[VGG, Variables]:
    model, variables = from_torch(arrays, model)
    bad = [
        "/".join(key.key for key in keys)
        for keys, array in jax.tree_util.tree_leaves_with_path(variables)
        if not jnp.isfinite(array).all()
    ]
    if bad:
        raise UserError(f"holds numbers that are not finite, in {', '.join(bad)}")
    return model, variables


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError("PyTorch, which reads and writes .pth files, is not installed: pip install torch") from None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise UserError(
            f"PyTorch {torch.__version__} can be made to execute what a .pth file holds (CVE-2026-24747); "
            "expected 2.10 or newer: pip install -U torch"
        )
    return torch


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
