"""Puts a folder of ours in its place: whole, or not at all.

It is written beside its place and renamed into it when whole, so that a folder with a manifest is
complete. What a killed process left half-written is removed, and what it had put aside is put back,
by the next one that writes there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .artifact import FILES, manifest_name
from .errors import ArtifactError
from .memory import in_units


def check_output(path: Path) -> None:
    """Raises ArtifactError unless a folder of ours may be written to `path`.

    Accepted: a path that does not exist, an empty folder, an earlier artifact or converted weights
    with nothing else beside them (they are replaced).
    """
    real = path.resolve()
    if real == Path.cwd() or real in Path.cwd().parents:
        raise ArtifactError(f"{path}: output is or holds the working folder; accepted: another")
    if path.is_symlink() and not path.exists():
        raise ArtifactError(f"{path}: output exists and is not a folder")
    if not path.exists():
        return
    if not path.is_dir():
        raise ArtifactError(f"{path}: output exists and is not a folder")
    if os.path.ismount(real):
        raise ArtifactError(f"{path}: output is a mount point; accepted: a folder in it")
    found = {file.name for file in path.iterdir()}
    if found and manifest_name(path) is None:
        raise ArtifactError(
            f"{path}: output exists and is not a phi3c artifact; accepted: a new or empty "
            "folder, or an artifact to replace"
        )
    if foreign := sorted(found - FILES):
        raise ArtifactError(
            f"{path}: output exists and holds {foreign[0]}, which would be lost; accepted: an "
            "artifact with nothing else in its folder"
        )


def check_space(path: Path, needed: int) -> None:
    """Raises ArtifactError unless the disk that `path` is on has `needed` bytes free."""
    place = existing_parent(path)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ArtifactError(
            f"{path}: needs {in_units(needed)} of disk; found {in_units(free)} free in {place}"
        )


def existing_parent(path: Path) -> Path:
    """The folder that exists above `path`, in which it will be made."""
    place = path.resolve().parent
    while not place.exists():
        place = place.parent
    return place


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that becomes `path` if the block succeeds and vanishes if it does not.

    Raises ArtifactError as `check_output` does; OSError, with `path` where the disk becomes full.
    """
    check_output(path)
    real = path.resolve()
    real.parent.mkdir(parents=True, exist_ok=True)
    with _locked(real.parent):
        _recover(real)
    scratch, owned = _own_scratch(real)
    try:
        scratch.chmod(0o755)
        yield scratch
        with _locked(real.parent):
            _replace(real, scratch)
    except OSError as err:
        if err.errno == errno.ENOSPC:  # a write that fails does not say where
            raise OSError(err.errno, err.strerror, str(path)) from None
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(owned)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time moves folders of ours in here, and no signal comes between."""
    with _uninterrupted():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals of the main thread wait; others do not get any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _own_scratch(path: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that owns it: locked until this process ends, anyhow."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.new.", dir=path.parent))
        owned = os.open(scratch, os.O_RDONLY)
        fcntl.flock(owned, fcntl.LOCK_EX)
        if scratch.exists():  # nobody took it for abandoned before it was locked
            return scratch, owned
        os.close(owned)


def _recover(path: Path) -> None:
    """Clears up after processes that were killed while they wrote to `path`."""
    for folder in list(path.parent.iterdir()):
        if folder.name.startswith(f".{path.name}.old."):
            with suppress(OSError):
                if not path.exists():
                    (folder / path.name).rename(path)
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.name.startswith(f".{path.name}.new."):
            with suppress(OSError):  # a living process owns it
                owned = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(owned, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(owned)


def _replace(path: Path, new: Path) -> None:
    """Puts folder `new` at `path`; what was there goes only if that worked."""
    if not path.exists():
        new.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.rename(aside / path.name)
    try:
        new.rename(path)
    except BaseException:
        (aside / path.name).rename(path)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
