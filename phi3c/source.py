"""What a user names as a model: a checkpoint folder, a config JSON, or a Hugging Face repo id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .config import Phi3Config
from .errors import CheckpointError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = ("*.json", "*.jinja", "*.safetensors")


@dataclass(frozen=True)
class Source:
    """folder: the checkpoint, or None for random weights."""

    config: Phi3Config
    folder: Path | None


def resolve_source(source: str | Path) -> Source:
    """Raises CheckpointError or ConfigError. Downloads a repo id's files (HF_HUB_OFFLINE holds)."""
    path = Path(source).expanduser()
    if path.is_dir():
        return Source(Phi3Config.from_file(path), path)
    if path.is_file():
        if path.suffix != ".json":
            raise CheckpointError(
                f"{path}: a file; accepted: a checkpoint folder, a config .json, or a repo id"
            )
        return Source(Phi3Config.from_file(path), None)
    if not _REPO_ID.fullmatch(str(source)):
        raise CheckpointError(
            f"{source}: no such file or folder; accepted: a checkpoint folder, a config .json, "
            "or a Hugging Face repo id (owner/name)"
        )
    folder = _download(str(source))
    return Source(Phi3Config.from_file(folder), folder)


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as err:
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise CheckpointError(
            f"{repo_id}: no such folder, and the hub gave no such repo: {reason}"
        ) from None
