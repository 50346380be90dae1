"""Artifacts that are compiled when first asked for and kept in a folder, for `generate` and `chat`.

    <cache_dir>/<model>-<hash of source path and options>/<hash of everything else>/   an artifact

The second hash is of what can change under the same name: the checkpoint's files (by size and time
of change), this machine's CPU, and the versions and code of phi3c and TVM. A new artifact replaces
its outdated neighbours.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import Artifact
from .errors import ArtifactError
from .manifest import FORMAT_VERSION

if TYPE_CHECKING:
    from .converter import Progress


def cached_artifact(
    source: str | Path,
    cache_dir: str | Path,
    *,
    target: str = "cpu",
    quantization: str = "q4f16_1",
    max_batch_size: int = 8,
    context_length: int | None = None,
    prefill_chunk_size: int = 512,
    max_loras: int = 0,
    max_rank: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """The artifact of `source` with these options, compiled now unless a whole one is kept.

    Arguments are those of `phi3c.compile`, whose errors it raises; OSError if cache_dir cannot be
    written.
    """
    from .sources import resolve_source
    from .targets import parse_target

    found = resolve_source(source)
    path = found.path.resolve()
    options = {
        "target": target,
        "quantization": quantization,
        "max_batch_size": max_batch_size,
        "context_length": context_length,
        "prefill_chunk_size": prefill_chunk_size,
        "max_loras": max_loras,
        "max_rank": max_rank,
        "seed": seed,
    }
    name = re.sub(r"[^\w.-]", "_", path.stem if path.is_file() else path.name)
    group = Path(cache_dir) / f"{name}-{_hash([str(path), options])}"
    place = parse_target(target)
    artifact = group / _hash(
        [_files(found.input_files()), place.mcpu, place.cpu_flags, place.arch, _versions()]
    )
    if not _is_whole(artifact):
        _compile(path, artifact, options, progress)
    return artifact


def _compile(
    source: Path, artifact: Path, options: dict[str, Any], progress: Progress | None
) -> None:
    from .compiler import compile

    if artifact.exists():
        shutil.rmtree(artifact)  # broken; what compile() would refuse to replace
    try:
        compile(source, output=artifact, **options, progress=progress)
    except OSError:
        if not _is_whole(artifact):  # another process may have put it there meanwhile
            raise
    for other in artifact.parent.iterdir():
        if other != artifact and not other.name.startswith("."):  # dots: being written
            shutil.rmtree(other, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    """Whether it can be run: sums of the library, names and sizes of the parameters."""
    try:
        artifact = Artifact.open(path)
        artifact.check_library()
        artifact.map_parameters()
    except ArtifactError:
        return False
    return True


def _files(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Name, bytes and time of change (ns) of each."""
    return [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]


def _versions() -> list[str | int]:
    """Of the format, phi3c, TVM, and phi3c's own code, which changes between versions too."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    packages = ("phi3c", "apache-tvm", "apache-tvm-ffi")
    return [FORMAT_VERSION, *map(metadata.version, packages), code.hexdigest()]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
