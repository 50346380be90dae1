"""What a device has done, and how long its kernels take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from .library import load_runtime, runtime_function


@dataclass(frozen=True)
class Statistics:
    """Of a device, since the process began."""

    dispatches: int  # of kernels
    submissions: int  # of batches of commands
    bytes_in_use: int  # of device memory, staging and kept workspaces among them
    peak_bytes: int
    allocations: int  # of device memory, at present; drivers allow some thousand


@dataclass(frozen=True)
class KernelTime:
    """Of all dispatches of a kernel."""

    count: int
    seconds: float


def statistics(device: int = 0) -> Statistics:
    """Raises DeviceError if there is no such device, or it was lost."""
    load_runtime()
    return Statistics(**{str(k): int(v) for k, v in runtime_function("statistics")(device).items()})


@contextlib.contextmanager
def profiled(device: int = 0) -> Iterator[dict[str, KernelTime]]:
    """Times every kernel that is dispatched inside, in any thread.

    The dict is filled at the end: name of the kernel → its time on the device. Raises DeviceError
    if there is no such device, it was lost, or it has no timestamps.
    """
    load_runtime()
    runtime_function("profile_begin")(device)
    times: dict[str, KernelTime] = {}
    try:
        yield times
    finally:
        for name, (count, seconds) in runtime_function("profile_end")(device).items():
            times[str(name)] = KernelTime(int(count), float(seconds))
