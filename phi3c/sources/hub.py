"""Checkpoints on the Hugging Face hub: only the files that a compilation needs, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError


def download(repo_id: str, text_files: Sequence[str]) -> Path:
    """The folder with the repository's files. Raises CheckpointError, ConfigError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*text_files, "*.safetensors", "*.index.json"]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as err:
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise CheckpointError(
            f"{repo_id}: no such folder, and the hub gave no such repo: {reason}"
        ) from None
