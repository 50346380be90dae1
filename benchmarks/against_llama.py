"""phi3c and llama.cpp on the same weights, alternating in one run: the table of ratios.

    pip install -e '.[bench]'     # builds llama-cpp-python
    python benchmarks/against_llama.py configs/phi-3-mini-4k.json --figure docs/against_llama.svg

Both read one GGUF file of random Q4_0 weights (phi3c compiled from it, its blocks taken over) with
the same number of threads. Each round runs every workload in both, in turn. For a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import phi3c
from phi3c.bench.machine import Calibration
from phi3c.bench.report import cpu_name
from phi3c.bench.workloads import Work, bytes_read, linear_operations
from phi3c.config import Phi3Config
from phi3c.runtime.threads import physical_cores

sys.path.insert(0, str(Path(__file__).parent))
import random_gguf

WORKS = (Work(1, 0, 128), Work(1, 0, 512), Work(1, 128, 1), Work(1, 1024, 1), Work(8, 128, 1))


class Worker:
    """A process that times work when it is told to."""

    def __init__(self, script: str, model: Path, threads: int):
        path = Path(__file__).parent / script
        self._process = subprocess.Popen(
            [sys.executable, str(path), str(model), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.load_seconds = self._answer()["load_seconds"]

    def seconds(self, work: Work, samples: int) -> float:
        """Median of the samples."""
        asked = {"batch": work.batch, "context": work.context, "new": work.new, "samples": samples}
        return statistics.median(self._ask(asked)["seconds"])

    def peak(self) -> int:
        return self._ask(None)["peak"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, question: dict | None) -> dict:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args[1]}: ended with {self._process.wait()}")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--quantization", default="q4f16_1")
    parser.add_argument("--figure", type=Path, help="an .svg to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights, artifact = Path(folder) / "model.gguf", Path(folder) / "artifact"
        random_gguf.write(Phi3Config.from_file(args.config), weights)
        made = phi3c.compile(weights, quantization=args.quantization, output=artifact)
        calibration = Calibration(args.threads)
        found = defaultdict(lambda: defaultdict(list))
        ours = Worker("phi3c_worker.py", artifact, args.threads)
        theirs = Worker("llama_worker.py", weights, args.threads)
        for _ in range(args.rounds):
            for work in WORKS:
                samples = 1 if work.new > 1 else 8
                before = calibration.rates()
                found[work]["phi3c"].append(ours.seconds(work, samples))
                found[work]["rates"].append(before.beside(calibration.rates()))
                found[work]["llama.cpp"].append(theirs.seconds(work, samples))
        peaks = {"phi3c": ours.peak(), "llama.cpp": theirs.peak()}
        loads = {"phi3c": ours.load_seconds, "llama.cpp": theirs.load_seconds}
        ours.close()
        theirs.close()
    report(made, args, found, peaks, loads)
    if args.figure:
        draw(found, args.figure)


def report(made, args, found, peaks, loads) -> None:
    print(f"{args.config.stem}, {args.quantization} against Q4_0, {args.threads} threads of")
    rates = [rates for work in WORKS for rates in found[work]["rates"]]
    read = sorted(r.read / 1e9 for r in rates)
    int8 = sorted(r.int8 / 1e9 for r in rates)
    print(
        f"{cpu_name()}; beside its work it reads {statistics.median(read):.1f} GB/s "
        f"({read[0]:.1f}–{read[-1]:.1f}), int8 {statistics.median(int8):.0f} Gop/s "
        f"({int8[0]:.0f}–{int8[-1]:.0f})"
    )
    print("| | phi3c tokens/s | llama.cpp | ratio (lowest–highest) | of read bandwidth | Gop/s |")
    print("|---|---:|---:|---:|---:|---:|")
    rows = []
    for work in WORKS:
        ours, theirs = found[work]["phi3c"], found[work]["llama.cpp"]
        ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        median = statistics.median(ours)
        size = bytes_read(made.manifest, work)
        read = statistics.median(
            size / seconds / rates.read
            for seconds, rates in zip(ours, found[work]["rates"], strict=True)
        )
        operations = linear_operations(made.manifest, work) / median / 1e9
        print(
            f"| {work.name} | {work.tokens / median:.1f} | "
            f"{work.tokens / statistics.median(theirs):.1f} | {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f}–{ratios[-1]:.2f}) | {read:.0%} | {operations:.0f} |"
        )
        rows.append({"work": work.name, "phi3c": ours, "llama.cpp": theirs})
    print(f"load: {loads['phi3c']:.2f} s against {loads['llama.cpp']:.2f} s")
    print(
        f"peak memory: {peaks['phi3c'] / 1e9:.2f} GB against {peaks['llama.cpp'] / 1e9:.2f} GB, "
        f"{peaks['phi3c'] / peaks['llama.cpp']:.2f}"
    )
    print(json.dumps({"seconds": rows, "peaks": peaks, "loads": loads}))


def draw(found, path: Path) -> None:
    """Bars of tokens/s relative to llama.cpp."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = [work.name for work in WORKS]
    ratios = [
        statistics.median(found[w]["llama.cpp"]) / statistics.median(found[w]["phi3c"])
        for w in WORKS
    ]
    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    bars = axes.barh(names[::-1], ratios[::-1], color="#3b6ea5")
    axes.bar_label(bars, [f"{r:.1f}×" for r in ratios[::-1]], padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("tokens/s, llama.cpp = 1")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
