"""What sampling costs: ms a step by kind of request, for one sequence and for several.

    python benchmarks/sampling.py [--vocab 32064] [--step-ms 22 35]

Logits are random: flat ones, of which top-p keeps thousands, and peaked ones, as trained models
have them. Before each step memory larger than the caches is read, as a model's weights are. The
last columns are percent of a decode step, whose ms for each batch --step-ms gives.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import numpy as np

from phi3c.engine.logprobs import logprobs
from phi3c.engine.sampler import Sampler, SamplingParams

BATCHES = (1, 8)
KINDS = {
    "greedy": dict(temperature=0),
    "temperature": dict(temperature=0.8),
    "top_k 50": dict(temperature=0.8, top_k=50),
    "top_p 0.95": dict(temperature=0.8, top_p=0.95),
    "top_k and top_p": dict(temperature=0.8, top_k=50, top_p=0.95),
    "min_p 0.05": dict(temperature=0.8, min_p=0.05),
    "greedy, 5 logprobs": dict(temperature=0, logprobs=5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32064)
    parser.add_argument("--step-ms", type=float, nargs=2, default=(22, 35), metavar="MS")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = {
        "flat": rng.standard_normal((max(BATCHES), args.vocab)).astype(np.float32),
        "peaked": np.float32(-1.5)
        * np.log1p(np.stack([rng.permutation(args.vocab) for _ in range(max(BATCHES))])).astype(
            np.float32
        ),
    }
    print(f"{'':8}{'':20}" + "".join(f"{f'{b} at once, ms':>18}{'%':>7}" for b in BATCHES))
    for shape, logits in rows.items():
        for name, params in KINDS.items():
            line = f"{shape:8}{name:20}"
            for batch, step in zip(BATCHES, args.step_ms, strict=True):
                ms = milliseconds(SamplingParams(seed=1, **params), logits[:batch], args.steps)
                line += f"{ms:18.3f}{100 * ms / step:7.1f}"
            print(line, flush=True)


def milliseconds(params: SamplingParams, logits: np.ndarray, steps: int) -> float:
    """Of one step, the median; logits `[batch, vocab]`."""
    samplers = [Sampler(params, stream) for stream in range(len(logits))]
    others = np.ones(16 << 20, np.float32)
    taken = []
    for _ in range(steps):
        others.sum()
        start = time.perf_counter()
        for sampler, row in zip(samplers, logits, strict=True):
            token_id = sampler.sample(row)
            if params.logprobs is not None:
                logprobs(row, token_id, params.logprobs)
        taken.append(time.perf_counter() - start)
    return 1e3 * median(taken)


if __name__ == "__main__":
    main()
