"""Links an artifact that has only the objects of its library."""

from __future__ import annotations

import os
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

from .artifact import LIBRARY, MANIFEST, Artifact, file_sha256, write_manifest
from .errors import ArtifactError
from .linker import find_linker
from .output_folder import new_folder
from .targets import parse_target


def link(path: str | Path) -> Artifact:
    """The artifact with a library in place of its objects, in the same folder.

    Raises ArtifactError for one that is linked already or was changed, and TargetError where no
    linker for its machine is found.
    """
    artifact = Artifact.open(path)
    if artifact.linked:
        raise ArtifactError(f"{path}: linked already; accepted: an artifact with a model.tar")
    run_linker = find_linker(parse_target(artifact.manifest.target.name))
    artifact.check_library()
    with new_folder(artifact.path) as folder, tempfile.TemporaryDirectory() as scratch:
        left = {artifact.library.name, MANIFEST, "__init__.py"}  # the last two are written anew
        objects = _extract(artifact.library, Path(scratch))
        run_linker(str(folder / LIBRARY), objects)
        for file in artifact.path.iterdir():
            if file.name not in left and file.is_file():
                os.link(file, folder / file.name)
        linked = replace(artifact.manifest, library_sha256=file_sha256(folder / LIBRARY))
        write_manifest(folder, linked)
    return Artifact.open(path)


def _extract(archive: Path, folder: Path) -> list[str]:
    """The paths of its files, which linker.pack_objects put there."""
    paths = []
    with tarfile.open(archive) as opened:
        for entry in opened.getmembers():
            data = opened.extractfile(entry)
            if data is None:
                raise ArtifactError(f"{archive}: {entry.name}: not a file")
            path = folder / Path(entry.name).name
            path.write_bytes(data.read())
            paths.append(str(path))
    return paths
