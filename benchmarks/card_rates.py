"""What a GPU can do at most, measured: the rates that floors are made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import tvm

_COPY_BYTES = 1 << 30  # more than any cache holds
_SIDE = 8192  # of the matrices


@dataclass(frozen=True)
class CardRates:
    """bandwidth: bytes/s of a copy on the device, read and written together; matrix: float16
    multiplications and additions/s of torch's matmul, None where torch has no such device."""

    bandwidth: float
    matrix: float | None

    def seconds(self, nbytes: float, operations: float = 0) -> float | None:
        """That these must take, one beside the other; None if a rate that it needs is not known."""
        if operations and self.matrix is None:
            return None
        return max(nbytes / self.bandwidth, operations / (self.matrix or 1))


def card_rates(device: tvm.runtime.Device, most: int) -> CardRates:
    """Of an idle device that takes buffers of up to `most` bytes."""
    copy_bytes = min(most, _COPY_BYTES)
    there = tvm.runtime.empty((copy_bytes,), "uint8", device)
    other = tvm.runtime.empty((copy_bytes,), "uint8", device)

    def copy() -> None:
        there.copyto(other)
        device.sync()

    return CardRates(2 * copy_bytes / median_seconds(copy), _matrix_rate(device))


def _matrix_rate(device: tvm.runtime.Device) -> float | None:
    try:
        import torch
    except ImportError:
        return None
    if str(device.type) != "cuda" or not torch.cuda.is_available():
        return None
    a, b = (torch.randn(_SIDE, _SIDE, dtype=torch.float16, device="cuda") for _ in range(2))

    def multiply() -> None:
        torch.matmul(a, b)
        torch.cuda.synchronize()

    return 2 * _SIDE**3 / median_seconds(multiply)


def median_seconds(run: Callable[[], object], rounds: int = 9) -> float:
    """Of `rounds`, after two that warm up."""
    return statistics.median(seconds_of(run, rounds))


def seconds_of(run: Callable[[], object], rounds: int) -> list[float]:
    """Of each round, after two that warm up."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times[2:]
