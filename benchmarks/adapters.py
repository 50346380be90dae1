"""Tokens per second of a batch that decodes, by how many LoRA adapters its rows have.

    sed '/num_hidden_layers/s/32/8/' configs/phi-3-mini-4k.json > /tmp/eight.json
    phi3c compile /tmp/eight.json -o /tmp/with --max-loras 8
    phi3c compile /tmp/eight.json -o /tmp/without
    python benchmarks/adapters.py /tmp/with --without /tmp/without --figure docs/adapters.svg

Each round runs every number of adapters in turn, 0 is the base model, and the artifact that was
compiled without slots if one is given. Adapters are random and of all targets. For a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import phi3c
from phi3c.adapters.layout import layer_targets, target_shape
from phi3c.bench.machine import Calibration, Others
from phi3c.bench.report import cpu_name
from phi3c.config import Phi3Config
from phi3c.runtime.threads import physical_cores


@dataclass(frozen=True)
class LowRank:
    a: np.ndarray  # [rank, in]
    b: np.ndarray  # [out, rank]


@dataclass(frozen=True)
class Adapter:
    rank: int
    low_rank: dict[tuple[int, str], LowRank]


def random_adapter(config: Phi3Config, rank: int, seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    low_rank = {}
    for key in layer_targets(config):
        out_features, in_features = target_shape(config, key[1])
        a = rng.standard_normal((rank, in_features), np.float32) * in_features**-0.5
        b = rng.standard_normal((out_features, rank), np.float32) * 0.05
        low_rank[key] = LowRank(a, b)
    return Adapter(rank, low_rank)


class Batch:
    """Sequences of a context that decode together, always at that context."""

    def __init__(self, model: phi3c.CompiledPhi3, batch: int, context: int):
        self._model, self._ids = model, list(range(batch))
        self._cache = model.create_paged_kv_cache(batch, batch * (context + 16))
        self._rng = np.random.default_rng(0)
        chunk = model.manifest.limits.prefill_chunk_size
        for i in self._ids:
            self._cache.add_sequence(i)
            for start in range(0, context, chunk):
                tokens = self._tokens(min(chunk, context - start))
                with self._cache.forward([i], [len(tokens)]):
                    model.prefill(model.embed(tokens), self._cache)

    def seconds(self, distinct: int) -> float:
        """Of one step, whose rows have `distinct` adapters in turn (0: the base model)."""
        size = len(self._ids)
        slots = [i % distinct if distinct else -1 for i in self._ids]
        tokens = self._tokens(size)
        start = time.perf_counter()
        with self._cache.forward(self._ids, [1] * size, token_slot=slots):
            self._model.batch_decode(self._model.embed(tokens), self._cache)[0].numpy()
        seconds = time.perf_counter() - start
        for i in self._ids:
            self._cache.popn(i, 1)
        return seconds

    def _tokens(self, n: int) -> np.ndarray:
        return self._rng.integers(0, self._model.config.vocab_size, n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path, help="with --max-loras")
    parser.add_argument("--without", type=Path, help="the same, compiled without slots")
    parser.add_argument("--adapters", default="1,4,8", help="how many different ones (1,4,8)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="of each in a round")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--figure", type=Path, help="an .svg to write")
    args = parser.parse_args()
    model = phi3c.load(args.artifact, threads=args.threads)
    counts = list(map(int, args.adapters.split(",")))
    for slot in range(max(counts)):
        model.adapter_pools.write(slot, random_adapter(model.config, args.rank, slot))
    batch = Batch(model, args.batch, args.context)
    series = {str(n): (batch, n) for n in (0, *counts)}
    if args.without:
        plain = phi3c.load(args.without, threads=args.threads)
        series = {"without": (Batch(plain, args.batch, args.context), 0)} | series
    calibration = Calibration(args.threads)
    read, others = calibration.rates().read, Others()
    found = {name: [] for name in series}  # seconds of a step, the median of each round
    for turn in range(args.rounds + 1):
        # There and back: what one leaves in the caches falls to another the next time.
        for name in list(series)[:: -1 if turn % 2 else 1]:
            own, distinct = series[name]
            steps = [own.seconds(distinct) for _ in range(args.steps)]
            if turn:  # the first is not counted
                found[name].append(statistics.median(steps))
    report(args, model, found, (read + calibration.rates().read) / 2, others.share())
    if args.figure:
        draw(args, found)


def ratios(found: dict[str, list[float]], name: str, to: str) -> list[float]:
    """Speed relative to another series, round by round, sorted."""
    pairs = zip(found[name], found[to], strict=True)
    return sorted(base / own for own, base in pairs)


def report(args, model, found, read: float, others: float | None) -> None:
    config = model.config
    print(
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{model.manifest.quantization}; batch {args.batch} @{args.context}, rank {args.rank}, "
        f"{args.threads} threads of {cpu_name()}, which reads {read / 1e9:.1f} GB/s"
        + ("" if others is None else f"; other processes took {others:.1%} of the CPU time")
    )
    print("| adapters | tokens/s | ms a step (lowest–highest) | of the base (lowest–highest) |")
    print("|---|---:|---:|---:|")
    for name, seconds in found.items():
        ms = sorted(1e3 * s for s in seconds)
        share = ratios(found, name, "0")
        label = "compiled without" if name == "without" else name
        print(
            f"| {label} | {args.batch / statistics.median(seconds):.1f} | "
            f"{statistics.median(ms):.2f} ({ms[0]:.2f}–{ms[-1]:.2f}) | "
            f"{statistics.median(share):.1%} ({share[0]:.1%}–{share[-1]:.1%}) |"
        )
    facts = {"rank": args.rank, "batch": args.batch, "context": args.context, "read": read}
    print(json.dumps(facts | {"others": others, "seconds": found}))


def draw(args, found: dict[str, list[float]]) -> None:
    """Tokens/s by number of different adapters, of the base model's in the same round: the medians
    and the quartiles of the rounds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = list(found)[::-1]
    shares = [[100 * share for share in ratios(found, name, "0")] for name in names]
    middle = [statistics.median(share) for share in shares]
    quartiles = [statistics.quantiles(share, n=4) for share in shares]
    spread = [
        [m - low for m, (low, _, _) in zip(middle, quartiles, strict=True)],
        [high - m for m, (_, _, high) in zip(middle, quartiles, strict=True)],
    ]
    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    labels = {"without": "compiled without slots", "0": "base model"}
    labels = [labels.get(n, f"{n} adapter" + ("s" if n != "1" else "")) for n in names]
    bars = axes.barh(labels, middle, color="#3b6ea5")
    axes.errorbar(middle, range(len(names)), xerr=spread, fmt="none", ecolor="black", elinewidth=1)
    axes.bar_label(bars, [f"{m:.0f} %" for m in middle], padding=12)
    axes.set_xlabel(f"% of the base batch's tokens/s, batch {args.batch}, rank {args.rank}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.figure, metadata={"Date": None})


if __name__ == "__main__":
    main()
