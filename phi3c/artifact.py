"""The artifact: a folder with everything a compiled model needs to run.

    manifest.json            what the rest is (manifest.py)
    model.so                 kernels and VM bytecode; or model.tar, its objects, for `phi3c link`
    params.safetensors       parameters in the kernels' layout, 64-byte aligned (tensor_file.py)
    tokenizer.json, …        taken over from the source
    __init__.py              makes the folder an importable package

Converted weights are the same without a library: weights.json, parameters and tokenizer files. The
same inputs give the same bytes. How a folder is put into its place: output_folder.py.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .errors import ArtifactError
from .manifest import TEXT_FILES as TEXT_FILES
from .manifest import Manifest, WeightsManifest
from .tensor_file import map_tensors

MANIFEST = "manifest.json"
WEIGHTS_MANIFEST = "weights.json"
LIBRARY = "model.so"
OBJECTS = "model.tar"
PARAMETERS = "params.safetensors"
_PACKAGE = "__init__.py"
# All that a folder of ours may hold; Python adds its cache where one is imported.
FILES = {*TEXT_FILES, MANIFEST, WEIGHTS_MANIFEST, LIBRARY, OBJECTS, PARAMETERS, _PACKAGE}
FILES |= {"__pycache__"}

_INIT = '''"""A model compiled by phi3c. `load()` gives a CompiledPhi3, `model` one made once."""

from functools import cache
from pathlib import Path


@cache
def _shared():
    return load()


def load(device=None, threads=None):
    import phi3c

    return phi3c.load(Path(__file__).parent, device=device, threads=threads)


def __getattr__(name):
    if name == "model":
        return _shared()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
'''


@dataclass(frozen=True)
class ConvertedWeights:
    """Weights on disk in a target's layout, whose manifest has been read."""

    MANIFEST: ClassVar[str] = WEIGHTS_MANIFEST
    _FILES: ClassVar[set[str]] = {WEIGHTS_MANIFEST, PARAMETERS}

    path: Path
    manifest: WeightsManifest

    @staticmethod
    def open(path: str | Path) -> ConvertedWeights:
        """Reads the manifest. Raises ArtifactError."""
        path, text = _manifest_text(path, WEIGHTS_MANIFEST, "converted weights")
        return ConvertedWeights(path, WeightsManifest.from_json(text, path / WEIGHTS_MANIFEST))

    @property
    def parameters(self) -> Path:
        return self.path / PARAMETERS

    def check_parameters(self) -> None:
        """Raises ArtifactError unless the parameter file is the one that was written (reads it)."""
        _check_file(self.parameters, self.manifest.parameters_sha256)

    def check_integrity(self) -> None:
        """Raises ArtifactError unless every file is byte for byte what was written.

        Names the parameter where it is one of the parameters that has changed, and a file that was
        not written.
        """
        own = {*self.manifest.files, *self._FILES, "__pycache__"}
        if foreign := sorted({file.name for file in self.path.iterdir()} - own):
            raise ArtifactError(f"{self.path / foreign[0]}: no part of what was written")
        for name, digest in self.manifest.files.items():
            _check_file(self.path / name, digest)
        try:
            self.check_parameters()
        except ArtifactError:
            for info, array in zip(
                self.manifest.parameters, self.map_parameters().values(), strict=True
            ):
                _check_sum(f"{self.parameters}: {info.name}", _sha256(array), info.sha256)
            raise

    def map_parameters(self) -> dict[str, Any]:
        """Name → mapped array, in the manifest's order. Raises ArtifactError on a misfit."""
        arrays = map_tensors(self.parameters)
        for info in self.manifest.parameters:
            array = arrays.get(info.name)
            if array is None or array.shape != info.shape or array.dtype != info.dtype:
                found = "nothing" if array is None else f"{list(array.shape)} {array.dtype}"
                raise ArtifactError(
                    f"{self.parameters}: {info.name}: found {found}; the manifest says "
                    f"{list(info.shape)} {info.dtype}"
                )
        return {info.name: arrays[info.name] for info in self.manifest.parameters}


@dataclass(frozen=True)
class Artifact(ConvertedWeights):
    """An artifact on disk whose manifest has been read."""

    MANIFEST: ClassVar[str] = MANIFEST
    _FILES: ClassVar[set[str]] = {MANIFEST, PARAMETERS, LIBRARY, OBJECTS, _PACKAGE}

    manifest: Manifest

    @staticmethod
    def open(path: str | Path) -> Artifact:
        """Reads the manifest. Raises ArtifactError; executes nothing."""
        path, text = _manifest_text(path, MANIFEST, "a compiled artifact")
        return Artifact(path, Manifest.from_json(text, path / MANIFEST))

    @property
    def linked(self) -> bool:
        """Whether it has a library; else it has the objects of one."""
        return not (self.path / OBJECTS).exists()

    @property
    def library(self) -> Path:
        """What the manifest's sum is of: the library, or its objects."""
        return self.path / (LIBRARY if self.linked else OBJECTS)

    def check_library(self) -> None:
        """Raises ArtifactError unless the library is byte for byte the one that was compiled."""
        _check_file(self.library, self.manifest.library_sha256)

    def check_integrity(self) -> None:
        self.check_library()
        _check_file(self.path / _PACKAGE, _sha256(_INIT.encode()))
        super().check_integrity()


def manifest_name(folder: Path) -> str | None:
    """The name of the manifest if the folder is one of ours, whole or not; else None."""
    for name, kind in ((MANIFEST, Manifest), (WEIGHTS_MANIFEST, WeightsManifest)):
        try:
            found = json.loads((folder / name).read_text())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict) and found.get("format") == kind.FORMAT:
            return name
    return None


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_text_files(folder: Path, files: dict[str, bytes]) -> dict[str, str]:
    """Writes them; returns name → sha256."""
    for name, data in files.items():
        assert name in TEXT_FILES, name
        (folder / name).write_bytes(data)
    return {name: _sha256(data) for name, data in files.items()}


def write_manifest(folder: Path, manifest: WeightsManifest) -> None:
    """The last file of a folder: it is whole when this is there."""
    if isinstance(manifest, Manifest):
        (folder / _PACKAGE).write_text(_INIT)
        (folder / MANIFEST).write_text(manifest.to_json())
    else:
        (folder / WEIGHTS_MANIFEST).write_text(manifest.to_json())


def _manifest_text(path: str | Path, name: str, what: str) -> tuple[Path, str]:
    path = Path(path)
    file = path / name
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such folder; accepted: {what}")
    try:
        return path, file.read_text()
    except FileNotFoundError:
        raise ArtifactError(f"{path}: not {what}: it has no {name}") from None
    except (OSError, UnicodeDecodeError) as err:
        raise ArtifactError(f"{file}: cannot be read ({err})") from None


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _check_file(path: Path, sha256: str) -> None:
    try:
        found = file_sha256(path)
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be read ({err.strerror})") from None
    _check_sum(str(path), found, sha256)


def _check_sum(what: str, found: str, sha256: str) -> None:
    if found != sha256:
        raise ArtifactError(
            f"{what}: changed: sha256 {found[:12]}…, the manifest says {sha256[:12]}…"
        )
