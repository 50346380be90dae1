"""What this machine can do: read bandwidth, int8 products, and who else is using it."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tvm

from ..kernels.cpu.calibration import DOTS, READ_LANES, STREAMS, int8_products, read_stream
from ..targets import parse_target
from .kernel import load_kernel

_READ_BYTES = 1 << 30  # far more than any cache
_STEPS = 200_000


@dataclass(frozen=True)
class Rates:
    """read: bytes/s of a streaming read; int8: multiplications and additions/s of the instruction
    that the kernels use, with operands in cache.
    """

    read: float
    int8: float

    def beside(self, other: Rates) -> Rates:
        """The mean of what was measured before and after something."""
        return Rates((self.read + other.read) / 2, (self.int8 + other.int8) / 2)


class Calibration:
    """Measures the rates of `threads` threads when asked: a shared machine has its phases.

    nbytes: what it keeps in memory.
    """

    def __init__(self, threads: int):
        place = parse_target("cpu")
        dot = place.kernels.isa.dot.for_bits(4)
        self._read = load_kernel(read_stream(threads), place, threads)
        products = int8_products(place.kernels.isa, threads)
        self._multiply = load_kernel(products, place, threads)
        rows = _READ_BYTES // (4 * threads * STREAMS * READ_LANES)
        stream = tvm.runtime.empty((threads, rows, STREAMS, READ_LANES), "float32")
        np.from_dlpack(stream)[:] = 1
        self.nbytes = 4 * threads * rows * STREAMS * READ_LANES
        sums = np.zeros((threads, STREAMS, READ_LANES), np.float32)
        self._stream = [stream, tvm.runtime.tensor(sums)]
        operands = [
            np.full((8, dot.lanes), 0x01020304, np.uint32),
            np.full(8, 0x01010101, np.int32),
            np.zeros(_STEPS, np.int8),
            np.zeros((threads, DOTS * dot.acc_len), dot.acc_dtype),
        ]
        self._operations = 2 * 4 * dot.lanes * DOTS * 8 * _STEPS * threads
        self._operands = [tvm.runtime.tensor(array) for array in operands]

    def rates(self, runs: int = 3) -> Rates:
        """Medians of `runs`, after one that is not counted."""
        read = [_timed(self._read, *self._stream) for _ in range(runs + 1)][1:]
        multiply = [_timed(self._multiply, *self._operands) for _ in range(runs + 1)][1:]
        return Rates(
            self.nbytes / statistics.median(read), self._operations / statistics.median(multiply)
        )


def _timed(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


class Others:
    """The share of the machine's CPU time that other processes took since it was made."""

    def __init__(self):
        self._start = self._now()

    def share(self) -> float | None:
        """0 … 1; None where the system does not say (not Linux)."""
        if self._start is None:
            return None
        busy, own, total = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return max(0.0, busy - own) / total if total else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of all CPUs that were busy, of this process, and in all."""
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields)
        tick = os.sysconf("SC_CLK_TCK")
        busy = (user + nice + system + irq + softirq + steal) / tick
        own = sum(os.times()[:2])
        return busy, own, busy + (idle + iowait) / tick


def peak_memory(but: int = 0) -> dict[str, int]:
    """Bytes. peak: the most that was resident; of what is now, anonymous and mapped from files.

    but: bytes that were there all the time and do not count.
    """
    names = {"VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file"}
    found = {}
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        key, _, value = line.partition(":")
        if key in names:
            found[names[key]] = int(value.split()[0]) * 1024 - (0 if key == "RssFile" else but)
    return found
