"""How many threads a model runs on, and the pool in its library that they belong to.

A library brings its own threads (phi3c/thread_pool.c), as TVM's lose milliseconds beside a busy
process or tens of microseconds at every kernel (docs/notes.md). TVM's runtime leaves the address of
its own launcher in the library when it loads it; a `ThreadPool` puts the library's there instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

from ..errors import ArtifactError, InputError

_LAUNCHER = "__TVMBackendParallelLaunch"  # the variable from which compiled code takes it


class ThreadPool:
    """Of a library that TVM has just loaded. Any thread may call into the library.

    Models of one library in one process share its pool. Raises ArtifactError if it has none.
    """

    def __init__(self, library: Path):
        try:
            self._library = ctypes.CDLL(str(library))  # the one that is loaded, not a second
            launch = ctypes.cast(self._library.phi3c_parallel_launch, ctypes.c_void_p)
        except (OSError, AttributeError):
            raise ArtifactError(f"{library}: not a library that phi3c has linked") from None
        with contextlib.suppress(ValueError):  # it has no parallel loop
            ctypes.c_void_p.in_dll(self._library, _LAUNCHER).value = launch.value

    def use(self, threads: int) -> None:
        """The next calls run on so many threads, the caller's among them."""
        self._library.phi3c_set_threads(threads)

    def end(self) -> None:
        """Ends the threads but the caller's; they begin again when they are needed."""
        self._library.phi3c_end_workers()


def physical_cores() -> int:
    """Physical cores this process may run on."""
    cpus = _allowed()
    cores = set()
    for cpu in cpus:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = (topology / "physical_package_id").read_text().strip()
            cores.add((package, (topology / "core_id").read_text().strip()))
        except OSError:
            return max(1, len(cpus))
    return max(1, len(cores))


def check_threads(threads: int | None) -> int:
    """The thread count to use; None means all physical cores. Raises InputError."""
    most = len(_allowed())
    if threads is None:
        return physical_cores()
    if type(threads) is not int or not 1 <= threads <= most:
        raise InputError(
            f"threads: found {threads!r}; accepted: 1 to {most}, or None for all cores"
        )
    return threads


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
