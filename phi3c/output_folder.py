"""Puts a folder of ours in its place: whole, or not at all.

It is written beside its place and renamed into it when whole, so that a folder with a manifest is
complete. What a killed process left half-written is removed by the next one that writes there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .artifact import MANIFEST, WEIGHTS_MANIFEST
from .errors import ArtifactError
from .manifest import Manifest, WeightsManifest

_FORMATS = {MANIFEST: Manifest.FORMAT, WEIGHTS_MANIFEST: WeightsManifest.FORMAT}


def check_output(path: Path) -> None:
    """Raises ArtifactError unless a folder of ours may be written to `path`.

    Accepted: a path that does not exist, an empty folder, an earlier artifact or converted weights
    (they are replaced).
    """
    if path.resolve() == Path.cwd():
        raise ArtifactError(f"{path}: output is the working folder; accepted: another folder")
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise ArtifactError(f"{path}: output exists and is not a folder")
    if any(path.iterdir()) and not any(_is_ours(path / name, name) for name in _FORMATS):
        raise ArtifactError(
            f"{path}: output exists and is not a phi3c artifact; accepted: a new or empty "
            "folder, or an artifact to replace"
        )


def check_space(path: Path, needed: int) -> None:
    """Raises ArtifactError unless the disk of `path` has `needed` bytes free."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ArtifactError(
            f"{path}: needs {needed / 1e9:.2f} GB of disk; found {free / 1e9:.2f} GB free in "
            f"{place}"
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that becomes `path` if the block succeeds and vanishes if it does not."""
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    scratch, owned = _own_scratch(path)
    try:
        scratch.chmod(0o755)
        yield scratch
        _replace(path, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(owned)


def _scratch_prefix(path: Path) -> str:
    return f".{path.name}.new."


def _own_scratch(path: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that owns it: locked until this process ends, anyhow."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=_scratch_prefix(path), dir=path.parent))
        owned = os.open(scratch, os.O_RDONLY)
        fcntl.flock(owned, fcntl.LOCK_EX)
        if scratch.exists():  # nobody took it for abandoned before it was locked
            return scratch, owned
        os.close(owned)


def _remove_abandoned(path: Path) -> None:
    """Removes scratch folders of `path` that no living process owns."""
    for scratch in path.parent.iterdir():
        if not scratch.name.startswith(_scratch_prefix(path)):
            continue
        with suppress(OSError):  # another process was faster, or owns it
            owned = os.open(scratch, os.O_RDONLY)
            try:
                fcntl.flock(owned, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(scratch, ignore_errors=True)
            finally:
                os.close(owned)


def _is_ours(manifest: Path, name: str) -> bool:
    try:
        found = json.loads(manifest.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == _FORMATS[name]


def _replace(path: Path, new: Path) -> None:
    """Puts folder `new` at `path`; what was there goes only if that worked."""
    if not path.exists():
        new.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    try:
        path.rename(aside / path.name)
        try:
            new.rename(path)
        except BaseException:
            (aside / path.name).rename(path)
            raise
        shutil.rmtree(aside / path.name, ignore_errors=True)
    finally:
        with suppress(OSError):  # not empty only if the old artifact could not be put back
            aside.rmdir()
