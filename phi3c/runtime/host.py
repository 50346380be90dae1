"""Whether this machine can run an artifact: its CPU and its memory."""

from __future__ import annotations

from pathlib import Path

from ..artifact import Artifact
from ..errors import ArtifactError, OutOfMemoryError
from ..memory import in_units
from ..triple import runs_here, this_machine


def check_cpu(artifact: Artifact) -> None:
    """Raises ArtifactError if the code is for another system, needs what this CPU lacks, or is not
    linked."""
    target = artifact.manifest.target
    if not artifact.linked:
        raise ArtifactError(
            f"{artifact.library}: objects for {target.mtriple} that are not linked; run `phi3c "
            f"link {artifact.path}` on a Mac with Xcode's command line tools, or anywhere with the "
            "package ziglang"
        )
    if not runs_here(target.mtriple):
        raise ArtifactError(
            f"{artifact.path}: compiled for {target.mtriple}; this machine is {this_machine()}; "
            "compile it for this machine (target cpu)"
        )
    have = _linux_cpu_flags()
    if have is None:
        return  # no way to ask; other systems are compiled for by name
    if missing := [flag for flag in target.cpu_flags if flag not in have]:
        raise ArtifactError(
            f"{artifact.path}: compiled for {target.mcpu}, whose {missing[0]} this CPU lacks; "
            "compile it for this machine (target cpu)"
        )


def check_memory(what: str, parts: dict[str, int]) -> None:
    """Raises OutOfMemoryError if the machine cannot hold `parts` (name → bytes) now."""
    needed, available = sum(parts.values()), available_memory()
    if available is not None and needed > available:
        detail = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items())
        raise OutOfMemoryError(
            f"{what}: needs {in_units(needed)} of memory ({detail}); found "
            f"{in_units(available)} available"
        )


def available_memory() -> int | None:
    """Bytes that a process can still take without swapping; None where the system does not say.

    Pages of mapped files count as available, as they can be dropped and read again.
    """
    machine, group = _linux_available(), _cgroup_available()
    return machine if group is None else group if machine is None else min(machine, group)


def _linux_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit (cgroup v2) leaves, without what it could drop."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    droppable = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
    return max(0, int(limit) - used + droppable)


def _linux_cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str] | None:
    """Of the first CPU; None where the system does not list them."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(("flags", "Features")):  # x86, aarch64
            return set(line.partition(":")[2].split())
    return None
