"""The artifact: a folder with everything a compiled model needs to run.

    manifest.json            what the rest is (Manifest)
    model.so                 kernels and VM bytecode
    params.safetensors       parameters in the kernels' layout, 64-byte aligned (tensor_file.py)
    tokenizer.json, …        copied from the checkpoint
    __init__.py              makes the folder an importable package

It is written beside its place and renamed into it when whole, so that a folder with a manifest is
complete. The same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import Phi3Config
from .errors import ArtifactError, ConfigError
from .tensor_file import TensorInfo, map_tensors

FORMAT = "phi3c"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LIBRARY = "model.so"
PARAMETERS = "params.safetensors"
COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

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
class TensorSpec:
    """Shape (named extents are symbolic) and dtype of an input, output or page tensor."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class FunctionInfo:
    """One function of the library. `pages` and the parameters follow the inputs, as tuples.

    workspace_bytes: storage that the memory planner gave it, at the artifact's limits.
    """

    inputs: tuple[TensorSpec, ...]
    takes_pages: bool
    takes_parameters: bool
    workspace_bytes: int


@dataclass(frozen=True)
class Limits:
    """What the artifact was compiled for.

    max_batch_size: sequences in a forward; context_length: tokens in a sequence;
    prefill_chunk_size: new tokens in a forward.
    """

    max_batch_size: int
    context_length: int
    prefill_chunk_size: int


@dataclass(frozen=True)
class KVLayout:
    """page_shape: of one layer's tensor without its leading extent, the number of blocks.

    block_tokens: tokens in a block; bytes_per_token: keys and values of all layers.
    """

    block_tokens: int
    page_shape: tuple[int, ...]
    dtype: str
    layers: int
    bytes_per_token: int


@dataclass(frozen=True)
class TargetInfo:
    """cpu_flags: what the code needs of the CPU, by Linux's names."""

    name: str
    mcpu: str
    mtriple: str
    cpu_flags: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """All that is known of an artifact before it is run."""

    config: Phi3Config
    quantization: str
    target: TargetInfo
    limits: Limits
    kv_layout: KVLayout
    functions: dict[str, FunctionInfo]
    parameters: tuple[TensorInfo, ...]
    library_sha256: str
    parameters_sha256: str
    files: tuple[str, ...]
    versions: dict[str, str]

    def to_json(self) -> str:
        body = asdict(self) | {"config": self.config.to_dict()}
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **body}, indent=1)

    @staticmethod
    def from_json(text: str, path: Path) -> Manifest:
        """Raises ArtifactError: not JSON, not ours, another version, fields missing."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise ArtifactError(f"{path}: not JSON") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ArtifactError(f"{path}: not the manifest of a phi3c artifact")
        if data.get("format_version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: format_version: found {data.get('format_version')!r}; accepted: "
                f"{FORMAT_VERSION}. Compile the checkpoint again with this phi3c"
            )
        try:
            return _manifest(data)
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as err:
            raise ArtifactError(f"{path}: broken manifest: {type(err).__name__} {err}") from None


def _manifest(data: dict[str, Any]) -> Manifest:
    functions = {
        name: FunctionInfo(
            inputs=tuple(
                TensorSpec(t["name"], tuple(t["shape"]), t["dtype"]) for t in entry["inputs"]
            ),
            takes_pages=bool(entry["takes_pages"]),
            takes_parameters=bool(entry["takes_parameters"]),
            workspace_bytes=int(entry["workspace_bytes"]),
        )
        for name, entry in data["functions"].items()
    }
    if foreign := sorted(set(data["files"]) - set(COPIED_FILES)):
        raise ValueError(f"files: found {foreign[0]!r}; accepted: {', '.join(COPIED_FILES)}")
    target, kv = data["target"], data["kv_layout"]
    return Manifest(
        config=Phi3Config.from_dict(data["config"], MANIFEST),
        quantization=str(data["quantization"]),
        target=TargetInfo(**target | {"cpu_flags": tuple(target["cpu_flags"])}),
        limits=Limits(**data["limits"]),
        kv_layout=KVLayout(**kv | {"page_shape": tuple(kv["page_shape"])}),
        functions=functions,
        parameters=tuple(
            TensorInfo(t["name"], tuple(t["shape"]), t["dtype"], t["sha256"])
            for t in data["parameters"]
        ),
        library_sha256=str(data["library_sha256"]),
        parameters_sha256=str(data["parameters_sha256"]),
        files=tuple(data["files"]),
        versions=dict(data["versions"]),
    )


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk whose manifest has been read."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | Path) -> Artifact:
        """Reads the manifest. Raises ArtifactError; executes nothing."""
        path = Path(path)
        file = path / MANIFEST
        if not path.is_dir():
            raise ArtifactError(f"{path}: no such folder; accepted: a compiled artifact")
        try:
            text = file.read_text()
        except FileNotFoundError:
            raise ArtifactError(f"{path}: not an artifact: it has no {MANIFEST}") from None
        except (OSError, UnicodeDecodeError) as err:
            raise ArtifactError(f"{file}: cannot be read ({err})") from None
        return Artifact(path, Manifest.from_json(text, file))

    @property
    def library(self) -> Path:
        return self.path / LIBRARY

    @property
    def parameters(self) -> Path:
        return self.path / PARAMETERS

    def check_library(self) -> None:
        """Raises ArtifactError unless the library is byte for byte the one that was compiled."""
        self._check_file(self.library, self.manifest.library_sha256)

    def check_parameters(self) -> None:
        """Raises ArtifactError unless the parameter file is the one that was written (reads it)."""
        self._check_file(self.parameters, self.manifest.parameters_sha256)

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

    @staticmethod
    def _check_file(path: Path, sha256: str) -> None:
        try:
            found = file_sha256(path)
        except OSError as err:
            raise ArtifactError(f"{path}: cannot be read ({err.strerror})") from None
        if found != sha256:
            raise ArtifactError(
                f"{path}: changed: sha256 {found[:12]}…, the manifest says {sha256[:12]}…"
            )


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_output(path: Path) -> None:
    """Raises ArtifactError unless an artifact may be written to `path`.

    Accepted: a path that does not exist, an empty folder, an earlier artifact (it is replaced).
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise ArtifactError(f"{path}: output exists and is not a folder")
    if not any(path.iterdir()):
        return
    try:
        found = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ArtifactError(
            f"{path}: output exists and is not a phi3c artifact; accepted: a new or empty "
            "folder, or an artifact to replace"
        )


@contextmanager
def new_artifact(path: Path) -> Iterator[Path]:
    """A scratch folder that becomes `path` if the block succeeds and vanishes if it does not."""
    check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        _replace(path, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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


def write_package_files(folder: Path, manifest: Manifest) -> None:
    """The last files of an artifact: `__init__.py` and the manifest."""
    (folder / "__init__.py").write_text(_INIT)
    (folder / MANIFEST).write_text(manifest.to_json() + "\n")
