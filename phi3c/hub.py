"""Checkpoints and adapters on the Hugging Face hub: only the files that phi3c needs.

The work is huggingface_hub's, in its own cache, with its settings (HF_ENDPOINT, HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS). What is here: which files, in which order, and one
line for whatever goes wrong. A cut connection is resumed where it broke; an interrupted download
keeps the files that were whole, so weights come one file at a time, and last.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .config import Phi3Config
from .errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth")
_NO_HUB = "(HF_ENDPOINT) does not answer as a Hugging Face hub does"


def is_repo_id(source: str) -> bool:
    """Whether it has the form owner/name. Paths may have it too: look for those first."""
    return _REPO_ID.fullmatch(source) is not None


def download(
    repo_id: str,
    text_files: Sequence[str],
    accept: Callable[[Phi3Config], None] = lambda config: None,
) -> Path:
    """The folder with config.json, the weights, and those of text_files that the repo has.

    Where the hub does not give the repo (no network, HF_HUB_OFFLINE, …), a cached folder that has
    config.json and all weights serves as it is. Raises CheckpointError; ConfigError, and what
    `accept` raises for the config, before any weight is downloaded.
    """
    with _quiet():
        try:
            repo = _list_files(repo_id)
        except _hub_errors() as err:
            return _cached_folder(repo_id, _CONFIG, _cached_weight_files, err)
        with _one_line_errors(repo_id):
            return _download(repo_id, repo, text_files, accept)


def download_files(repo_id: str, names: Sequence[str], kind: str) -> Path:
    """The folder with these files, all of which the repo must have. kind: of the repo, for errors.

    Where the hub does not give the repo, a cached folder that has them all serves as it is. Raises
    CheckpointError.
    """
    from huggingface_hub import hf_hub_download

    with _quiet():
        try:
            repo = _list_files(repo_id)
        except _hub_errors() as err:
            return _cached_folder(repo_id, names[0], lambda folder: names, err)
        with _one_line_errors(repo_id):
            files = {file.rfilename: file for file in repo.siblings}
            if missing := [name for name in names if name not in files]:
                raise CheckpointError(
                    f"{repo_id}: no {missing[0]} in the repo{_pickle_beside(missing[0], files)}; "
                    f"accepted: the repo of {kind}"
                )
            _check_disk_space(repo_id, [files[name] for name in names])
            for name in names:
                path = Path(hf_hub_download(repo_id, name, revision=repo.sha))
            _name_as_main(repo_id, path.parent, names[0])
            return path.parent


def _pickle_beside(name: str, files: dict[str, RepoSibling]) -> str:
    """What to say of a pickle that the repo has instead of a file."""
    pickles = (str(Path(name).with_suffix(suffix)) for suffix in _PICKLES)
    found = next((pickle for pickle in pickles if pickle in files), None)
    return f" (but {found}, a pickle, which can run code when read)" if found else ""


def _download(
    repo_id: str,
    repo: ModelInfo,
    text_files: Sequence[str],
    accept: Callable[[Phi3Config], None],
) -> Path:
    from huggingface_hub import hf_hub_download

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repo_id, name, revision=repo.sha))

    files = {file.rfilename: file for file in repo.siblings}
    if _CONFIG not in files:
        raise CheckpointError(f"{repo_id}: no {_CONFIG} in the repo; accepted: a model's repo")
    folder = fetch(_CONFIG).parent
    accept(Phi3Config.from_file(folder))  # refused here, before gigabytes are fetched
    weights = _weight_files(repo_id, files, fetch)
    texts = [name for name in text_files if name in files]
    _check_disk_space(repo_id, [files[name] for name in [*texts, *weights]])
    for name in [*texts, *weights]:
        fetch(name)
    _name_as_main(repo_id, folder, _CONFIG)
    return folder


def _list_files(repo_id: str) -> ModelInfo:
    """What the hub says the repo has at its newest commit: sha, and siblings with their sizes."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except ValueError:
        raise CheckpointError(
            f"{repo_id!r}: not a repo id; accepted: owner/name, each of letters, digits, '-', '_' "
            "and '.', without '--', '..', a '-' or '.' at an end, or '.git'; up to 96 characters"
        ) from None
    try:
        # Without a timeout, a network that drops packets would hang this for minutes.
        repo = HfApi().model_info(
            repo_id, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        if repo.sha and repo.siblings:
            return repo
    except _hub_errors():
        raise
    except (ValueError, TypeError, KeyError, AttributeError):
        pass  # not the hub's JSON: a proxy's log-in page, another kind of server
    raise CheckpointError(f"{repo_id}: {constants.ENDPOINT} {_NO_HUB}")


def _weight_files(
    repo_id: str, files: dict[str, RepoSibling], fetch: Callable[[str], Path]
) -> list[str]:
    """The repo's safetensors, all of them there. Fetches the index if the repo has one."""
    if _INDEX in files:
        names = _indexed_files(fetch(_INDEX))
        if missing := [name for name in names if name not in files]:
            raise CheckpointError(f"{repo_id}: {_INDEX} names {_some(missing)}, not in the repo")
        return names
    if _SINGLE in files:
        return [_SINGLE]
    if pickles := sorted(n for n in files if n.endswith(_PICKLES) and "/" not in n):
        raise CheckpointError(
            f"{repo_id}: found {pickles[0]}, a pickle, which can run code when read; accepted: "
            f"{_SINGLE}, or {_INDEX} and its files. Convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(repo).save_pretrained(new_folder)"
        )
    is_gguf = any(name.endswith(".gguf") for name in files)
    hint = ", or one of its .gguf files, downloaded and named by its path" if is_gguf else ""
    raise CheckpointError(
        f"{repo_id}: no weights in the repo; accepted: {_SINGLE}, or {_INDEX} and its files{hint}"
    )


def _indexed_files(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"{index}: not a weight index (no weight_map)") from None
    for name in names:
        is_plain = isinstance(name, str) and Path(name).name == name
        if not is_plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: found file {name!r}; accepted: names of *.safetensors, no folders"
            )
    if not names:
        raise CheckpointError(f"{index}: names no file")
    return sorted(names)


def _check_disk_space(repo_id: str, files: Sequence[RepoSibling]) -> None:
    """Refuses a download that cannot end well. Counts the bytes that are not in the cache yet."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / repo_folder_name(repo_id=repo_id, repo_type="model") / "blobs"
    needed = 0
    for file in files:
        # The hub's etag names the cached file: the sha256 of large files, else git's id.
        etag = file.lfs["sha256"] if file.lfs else file.blob_id
        if not (etag and (blobs / etag).exists()):
            needed += file.size or 0
    existing = next(path for path in [cache, *cache.absolute().parents] if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{repo_id}: {needed / 1e9:,.2f} GB are still to be downloaded, but the disk of "
            f"{cache} (HF_HOME) has {free / 1e9:,.2f} GB free"
        )


def _name_as_main(repo_id: str, folder: Path, name: str) -> None:
    """Makes the folder the one that is used without a network. Last, so that it is a whole one.

    name: of a file in it.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if try_to_load_from_cache(repo_id, name) != str(folder / name):
        with suppress(*_hub_errors()):  # the download is done: the next one can do this
            hf_hub_download(repo_id, name)


def _cached_weight_files(folder: Path) -> list[str]:
    return _indexed_files(folder / _INDEX) if (folder / _INDEX).exists() else [_SINGLE]


def _cached_folder(
    repo_id: str, first: str, needed: Callable[[Path], Sequence[str]], err: Exception
) -> Path:
    """The newest folder of the cache, if whole; else raises err as a CheckpointError.

    first: the file by which it is found; needed: the files without which it is not whole.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, first)
    if isinstance(found, str):
        folder = Path(found).parent
        missing = [name for name in needed(folder) if not (folder / name).exists()]
        if not missing:
            return folder
        lacks = f"{_some(missing)} of {repo_id} not in the cache {constants.HF_HUB_CACHE}"
    else:
        lacks = f"{repo_id}: no such folder, and not in the cache {constants.HF_HUB_CACHE}"
    why = _explain(repo_id, err)
    raise CheckpointError(why if _status(err) else f"{why}; {lacks}") from None


# Errors


def _hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises for the network, the hub and the disk; never ours."""
    from huggingface_hub.errors import HTTPError

    return (HTTPError, OSError)


@contextmanager
def _one_line_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except _hub_errors() as err:
        raise CheckpointError(_explain(repo_id, err)) from None
    except RuntimeError as err:  # hf_xet's, of a download that fails
        raise CheckpointError(f"{repo_id}: {_one_line(err)}") from None


def _explain(repo_id: str, err: Exception) -> str:
    """One line: what happened, and what the user can do."""
    from huggingface_hub import constants, errors

    if isinstance(err, errors.LocalEntryNotFoundError) and isinstance(err.__cause__, Exception):
        err = err.__cause__
    endpoint, log_in = constants.ENDPOINT, "`hf auth login` or set HF_TOKEN"
    if isinstance(err, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set (or TRANSFORMERS_OFFLINE)"
    if isinstance(err, errors.GatedRepoError):
        return f"{repo_id}: a gated repo: accept its terms at {endpoint}/{repo_id}, then {log_in}"
    if isinstance(err, errors.RepositoryNotFoundError):
        return f"{repo_id}: no such folder, nor such a repo at {endpoint}; if private: {log_in}"
    status = _status(err)
    if status == 401:
        return f"{repo_id}: {endpoint} refused the token (401): {log_in} to a valid one"
    if status == 429:
        wait = err.response.headers.get("Retry-After", "")
        when = f"in {wait} s" if wait.isdigit() else "later"
        return (
            f"{repo_id}: too many requests for {endpoint} (429): try again {when}; "
            f"it may allow you more: {log_in}"
        )
    if status:
        what = getattr(err, "server_message", None) or "no reason given"
        return f"{repo_id}: {endpoint} answered with HTTP {status}: {_one_line(what)}"
    if isinstance(err, errors.FileMetadataError):
        return f"{repo_id}: {endpoint} {_NO_HUB}"
    if isinstance(err, OSError) and err.strerror and not isinstance(err, ConnectionError):
        return f"{repo_id}: {err.filename or constants.HF_HUB_CACHE}: {err.strerror}"
    if isinstance(err, OSError) and not isinstance(err, ConnectionError | errors.HTTPError):
        return f"{repo_id}: {_one_line(err)}"
    return f"no network: {_host(err)} cannot be reached ({_one_line(err)})"


def _status(err: Exception) -> int:
    """The HTTP status that the hub answered with; 0: it gave no answer."""
    return getattr(getattr(err, "response", None), "status_code", 0)


def _host(err: Exception) -> str:
    """Where the failed request went: the hub, or a server that it sent us to."""
    from huggingface_hub import constants

    try:
        url = str(err.request.url)
    except (AttributeError, RuntimeError):  # no request, or none kept
        url = constants.ENDPOINT
    return urlsplit(url).netloc or url


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:300] or type(message).__name__


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides huggingface_hub's warnings (retries, "unauthenticated requests"), unless asked for."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    if level == logging.WARNING:  # the default
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
