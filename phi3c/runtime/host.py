"""Whether this machine can run an artifact."""

from __future__ import annotations

from pathlib import Path

from ..artifact import Artifact
from ..errors import ArtifactError


def check_cpu(artifact: Artifact) -> None:
    """Raises ArtifactError if the code needs instructions that this CPU lacks."""
    needed = artifact.manifest.target.cpu_flags
    have = _linux_cpu_flags()
    if have is None:
        return  # no way to ask; other systems are compiled for by name
    if missing := [flag for flag in needed if flag not in have]:
        raise ArtifactError(
            f"{artifact.path}: compiled for {artifact.manifest.target.mcpu}, whose {missing[0]} "
            "this CPU lacks; compile it for this machine (target cpu)"
        )


def _linux_cpu_flags() -> set[str] | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return None
