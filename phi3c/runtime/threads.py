"""TVM's thread pool: its size, and how its workers wait.

TVM's own default is half of the hardware threads on x86, whether or not they are hyperthreads. Its
pool belongs to the Python thread that calls it, so the size is set once in each.

A launch gives every worker one equal part and ends with the slowest. So where a busy process has
half of one core, a step takes twice as long, whatever the workers do. But workers that spin lose
far more: they wait by yielding, and who yields beside a busy process gets the core back only after
that process's time slice, milliseconds for a kernel of half a millisecond. A worker that sleeps is
mostly woken in front of the busy process. Phi-3-mini beside two of them: 1.3 s a step with spinning
workers, 0.14 s with sleeping ones; with the machine to itself, sleeping costs 1 to 5 %
(docs/notes.md).
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path

import tvm

from ..errors import InputError

_SHARE_ALL_CORES = -3  # workers are not pinned: the system may move them off a busy core
# How often an idle worker yields before it sleeps; TVM's default is 300,000. Even 1 is too many: it
# yields once after each kernel, and may not be back for the next. TVM has no other way to set it,
# and reads it when the first pool of the process starts.
_SPIN_COUNT = ("TVM_THREAD_POOL_SPIN_COUNT", "0")
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
    """Gives the calling Python thread a pool of that size.

    Warns where TVM started a smaller pool in this Python thread before, as that cannot grow.
    """
    if getattr(_configured, "threads", None) == threads:
        return
    os.environ.setdefault(*_SPIN_COUNT)  # the user's own value stays
    configure = tvm.get_global_func("runtime.config_threadpool")
    configure(_SHARE_ALL_CORES, threads, [str(cpu) for cpu in _allowed()])
    _configured.threads = threads
    found = pool_size()
    if found < threads:
        warnings.warn(
            f"threads: found {found}, asked for {threads}: TVM's thread pool was started in this "
            "Python thread before phi3c could set its size; use a new Python thread",
            RuntimeWarning,
            stacklevel=2,
        )


def pool_size() -> int:
    """Threads of the calling Python thread's pool, which TVM starts if there is none."""
    return tvm.get_global_func("runtime.NumThreads")()


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
