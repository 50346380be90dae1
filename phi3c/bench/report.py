"""Runs the workloads of `phi3c bench` and tells what they show."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..runtime.compiled import CompiledPhi3
from .machine import Calibration, Others, Rates, peak_memory
from .workloads import Work, bytes_read, check, kernel_seconds, linear_operations, seconds


@dataclass(frozen=True)
class Result:
    """One workload. low, median, high: seconds; bytes and operations: what it cannot do without;
    rates: what the machine could do just before and after it.

    kernels: name → (seconds, calls), with profiling.
    """

    name: str
    tokens: int
    low: float
    median: float
    high: float
    bytes: int
    operations: int
    rates: Rates
    kernels: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.median

    @property
    def linear_seconds(self) -> float:
        """In the linears, with profiling."""
        return sum(t for name, (t, _) in self.kernels.items() if "linear" in name)


@dataclass(frozen=True)
class BenchReport:
    """others: share of the machine's CPU time that other processes took, None if unknown."""

    artifact: str
    quantization: str
    threads: int
    cpu: str
    results: tuple[Result, ...]
    memory: dict[str, int]
    others: float | None


def bench(
    model: CompiledPhi3,
    works: Sequence[Work],
    samples: int = 7,
    profile: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchReport:
    """Medians of `samples` runs of each workload. Raises InputError past the artifact's limits."""
    report = progress or (lambda stage, done, total: None)
    for work in works:
        check(model.manifest, work, samples)
    others = Others()
    calibration = Calibration(model.threads)
    rates = [calibration.rates()]
    results = []
    for done, work in enumerate(works):
        report("bench", done, len(works))
        times = seconds(model, work, samples)
        rates.append(calibration.rates())
        results.append(
            Result(
                work.name,
                work.tokens,
                min(times),
                statistics.median(times),
                max(times),
                bytes_read(model.manifest, work),
                linear_operations(model.manifest, work),
                rates[-2].beside(rates[-1]),
            )
        )
    if profile:  # after all timing, as the instrument that it leaves in the VM costs something
        results = [
            replace(result, kernels=kernel_seconds(model, work, max(2, samples // 3)))
            for result, work in zip(results, works, strict=True)
        ]
    report("bench", len(works), len(works))
    return BenchReport(
        str(model.artifact.path),
        model.manifest.quantization,
        model.threads,
        cpu_name(),
        tuple(results),
        peak_memory(but=calibration.nbytes),
        others.share(),
    )


def facts(report: BenchReport) -> dict[str, Any]:
    """As JSON types."""
    results = [
        asdict(result)
        | {
            "tokens_per_second": result.tokens_per_second,
            "bytes_per_second": result.bytes / result.median,
            "operations_per_second": result.operations / result.median,
            "read_share": result.bytes / result.median / result.rates.read,
            "int8_share": result.operations / result.median / result.rates.int8,
        }
        for result in report.results
    ]
    return asdict(report) | {"results": results}


def render(report: BenchReport) -> str:
    """A table, and with profiling a table of kernels for each workload."""
    lines = [
        f"{report.artifact}: {report.quantization}, {report.threads} threads, {report.cpu}",
        f"{'workload':22}{'tokens/s':>10}{'spread':>16}{'GB/s':>8}{'machine':>9}{'share':>7}"
        f"{'Gop/s':>8}{'machine':>9}{'share':>7}",
    ]
    for r in report.results:
        spread = f"{r.tokens / r.high:.1f}–{r.tokens / r.low:.1f}"
        read, int8 = r.bytes / r.median, r.operations / r.median
        lines.append(
            f"{r.name:22}{r.tokens_per_second:10.1f}{spread:>16}"
            f"{read / 1e9:8.1f}{r.rates.read / 1e9:9.1f}{read / r.rates.read:7.0%}"
            f"{int8 / 1e9:8.0f}{r.rates.int8 / 1e9:9.0f}{int8 / r.rates.int8:7.0%}"
        )
    for r in report.results:
        if r.kernels:
            lines += ["", *_profile(r)]
    memory = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in report.memory.items())
    lines.append(f"memory: {memory}" if memory else "memory: unknown")
    if report.others is not None:
        lines.append(f"other processes took {report.others:.1%} of the CPU time")
    return "\n".join(lines)


def _profile(result: Result) -> list[str]:
    total = sum(t for t, _ in result.kernels.values())
    lines = [f"{result.name}: {total * 1e3:.2f} ms in kernels of {result.median * 1e3:.2f} ms"]
    for name, (spent, calls) in sorted(result.kernels.items(), key=lambda k: -k[1][0]):
        lines.append(f"  {name:28}{spent * 1e3:9.2f} ms{spent / total:7.1%}{calls:6} calls")
    linears = result.linear_seconds
    if linears:
        rate, read = result.operations / linears / 1e9, result.bytes / linears / 1e9
        lines.append(f"  linears: {rate:.0f} Gop/s, {read:.1f} GB/s at most")
    return lines


def cpu_name() -> str:
    """As the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
