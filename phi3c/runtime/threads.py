"""The size of TVM's thread pool.

TVM's own default is half of the hardware threads on x86, whether or not they are hyperthreads. Its
pool belongs to the Python thread that calls it, so the size is set once in each.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import tvm

from ..errors import InputError

_SHARE_ALL_CORES = -3  # workers are not pinned: the system may move them off a busy core
_configured = threading.local()


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


def use_threads(threads: int) -> None:
    """Gives the calling Python thread a pool of that size."""
    if getattr(_configured, "threads", None) != threads:
        configure = tvm.get_global_func("runtime.config_threadpool")
        configure(_SHARE_ALL_CORES, threads, [str(cpu) for cpu in _allowed()])
        _configured.threads = threads


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
