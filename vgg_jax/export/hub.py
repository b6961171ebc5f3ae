"""Networks on the Hugging Face hub: push a folder as one commit, and download one whose checksums are compared here.

The token, the cache and the server are those of huggingface_hub: `hf auth login` or HF_TOKEN, HF_HUB_CACHE and
HF_ENDPOINT.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from vgg_jax.errors import UserError, first_line
from vgg_jax.export.card import Measured
from vgg_jax.export.folders import CARD, CONFIG, PREFIX, WEIGHT_FILES, read_folder, write_folder
from vgg_jax.weights.formats import Announce, Loaded

SHA256_LENGTH, SHA1_LENGTH = 64, 40  # hexadecimal digits: the hub names large files by SHA-256, small ones by git's


def push(
    repo: str,
    network: Loaded,
    *,
    card: str | None = None,
    measured: Measured | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str = "Add the network",
) -> tuple[str, tuple[str, ...]]:
    """Upload a network's folder to the hub as one commit; make the repository if it is missing.

    Args:
      repo: the repository, owner/name, or name for one of the token's owner.
      network: the network.
      card: the model card; by default one that states what the network carries, unless the repository has a README.md.
      measured: the figures that this card states; it then replaces the repository's README.md.
      private: make a new repository private.
      revision: the branch; by default main.
      message: the first line of the commit's message.

    Returns:
      The commit's URL, and notes as `folders.write_folder` has them.

    Raises:
      UserError: if the network cannot be written, the hub refuses, or it cannot be reached. The repository then has no
        new commit.
    """
    import huggingface_hub  # here, because a network from a file does not need it

    with tempfile.TemporaryDirectory() as temporary, _explained(repo, "push"):
        folder = os.path.join(temporary, "network")
        notes = write_folder(folder, network, card, repo.partition("/")[2] or repo, measured)
        api = huggingface_hub.HfApi(library_name="vgg_jax")
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        names = sorted(os.listdir(folder))
        if card is None and measured is None and api.file_exists(repo, CARD, revision=revision):
            names.remove(CARD)
        additions = [huggingface_hub.CommitOperationAdd(name, os.path.join(folder, name)) for name in names]
        commit = api.create_commit(repo, additions, commit_message=message, revision=revision)
    return str(commit.commit_url), notes


def load_from_hub(source: str, features_only: bool = False, announce: Announce | None = None) -> Loaded:
    """Load a network of the hub; the first time, download it and compare its checksums.

    Args:
      source: hf-hub:owner/name, or hf-hub:owner/name@revision with a branch, a tag or a commit.
      features_only: as for `formats.load_file`.
      announce: as for `formats.load_file`.

    Returns:
      The network, as `folders.read_folder` reads it.

    Raises:
      UserError: if the repository is missing, refused or unreachable, a checksum differs, or the files are those of no
        VGG.
    """
    import huggingface_hub  # here, because a network from a file does not need it

    repo, _, revision = source.removeprefix(PREFIX).partition("@")
    with _explained(source, "load"):
        path = huggingface_hub.hf_hub_download(repo, CONFIG, revision=revision or None)
        folder = os.path.dirname(path)
        commit = os.path.basename(folder)  # all files are of one commit, even if the branch moves meanwhile
        _check(path)
        for name in WEIGHT_FILES:
            with contextlib.suppress(huggingface_hub.errors.RemoteEntryNotFoundError):
                _check(huggingface_hub.hf_hub_download(repo, name, revision=commit))
                break
        else:
            raise UserError(
                f"{source} holds no weights; expected {' or '.join(WEIGHT_FILES)}: choose another repository"
            )
    try:
        return read_folder(folder, features_only, announce)
    except UserError as error:
        raise UserError(str(error).replace(folder, source)) from None


def _check(path: str) -> None:
    """Compare a downloaded file with the checksum by which the cache names it; remove the file if it differs."""
    blob = os.path.realpath(path)
    expected = os.path.basename(blob)
    if len(expected) not in (SHA256_LENGTH, SHA1_LENGTH):
        return  # a cache on a file system without links names its files otherwise
    with open(blob, "rb") as file:
        if len(expected) == SHA256_LENGTH:
            name, found = "sha256", hashlib.file_digest(file, "sha256").hexdigest()
        else:
            content = file.read()
            name, found = "git sha1", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if found != expected:
        for wrong in (path, blob):
            os.remove(wrong)
        raise UserError(
            f"{os.path.basename(path)} has {name} {found}, expected {expected}: the file was removed; load it again"
        )


@contextlib.contextmanager
def _explained(source: str, verb: str) -> Iterator[None]:
    """Raise UserError in place of the errors of huggingface_hub and of the network below it."""
    from huggingface_hub import errors

    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except Exception as error:  # of huggingface_hub, and of two libraries for HTTP below it, by its version
        raise UserError(f"cannot {verb} {source}: {_reason(error, errors)}") from None


def _reason(error: Exception, errors: Any) -> str:
    """Return what went wrong and what to do."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
    response = getattr(cause, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401 or isinstance(cause, errors.LocalTokenNotFoundError):
        return "the hub does not know this repository or this token (401); check the name, or run `hf auth login`"
    if isinstance(cause, errors.GatedRepoError):
        return "the hub refuses access (403); accept the conditions of the repository on its page, then rerun"
    if status == 403:
        return "the hub refuses this token (403); use a token with the right to write to the repository"
    if isinstance(cause, errors.RevisionNotFoundError):
        return "the repository has no such revision; choose a branch, a tag or a commit that it has"
    if isinstance(cause, errors.RemoteEntryNotFoundError):
        return f"the repository has no {CONFIG}; expected a folder of timm or vgg_jax: choose another repository"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return "the hub has no such repository; check the name"
    if isinstance(cause, errors.HFValidationError):
        return f"{first_line(cause)}; expected owner/name"
    if isinstance(cause, errors.LocalEntryNotFoundError):
        return "it is not cached, and the hub cannot be reached; check the connection, then rerun"
    return f"{first_line(cause)}; check the connection, then rerun"
