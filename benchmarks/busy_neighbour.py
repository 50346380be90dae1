"""Decode steps while 0, 1 and 2 other processes each keep a core busy.

python benchmarks/busy_neighbour.py dist/toy

The last column is the cores that the decoding process had: in the row without neighbours, less
than nearly all its threads means that something else was running, and the figures are void.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

import phi3c

# Ends with its parent, however that ends.
NEIGHBOUR = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""
SETTLE = 0.5  # seconds for the scheduler to place the neighbours
LEAST_STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--threads", type=int, help="default: all physical cores")
    parser.add_argument("--neighbours", default="0,1,2")
    parser.add_argument("--seconds", type=float, default=6, help="for each number of neighbours")
    parser.add_argument("--prompt", type=int, default=20, help="tokens before the first step")
    parser.add_argument("--tokens", type=int, default=32, help="decoded before starting again")
    args = parser.parse_args()
    decoder = Decoder(args.artifact, args.threads, args.prompt, args.tokens)
    decoder.steps(min(1.0, args.seconds))
    print(f"{'neighbours':>10} {'median ms':>10} {'p90 ms':>8} {'mean ms':>8} {'steps':>6} cores")
    for count in map(int, args.neighbours.split(",")):
        with neighbours(count):
            wall, own = time.perf_counter(), time.process_time()
            found = decoder.steps(args.seconds)
            cores = (time.process_time() - own) / (time.perf_counter() - wall)
        print(
            f"{count:10} {np.median(found):10.2f} {np.quantile(found, 0.9):8.2f} "
            f"{np.mean(found):8.2f} {len(found):6} {cores:5.2f}",
            flush=True,
        )


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    command = [sys.executable, "-c", NEIGHBOUR, str(os.getpid())]
    running: list[subprocess.Popen] = []
    try:
        for _ in range(count):
            running.append(subprocess.Popen(command))
        time.sleep(SETTLE)
        yield
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


class Decoder:
    """One sequence that is decoded, `tokens` at a time, behind the same prompt."""

    def __init__(self, artifact: str, threads: int | None, prompt: int, tokens: int):
        self._model = phi3c.load(artifact, threads=threads)
        self._tokens = tokens
        whole = -(-(prompt + tokens) // 16) * 16  # pages
        self._cache = self._model.create_paged_kv_cache(max_batch_size=1, max_total_seq_len=whole)
        self._cache.add_sequence(0)
        with self._cache.forward([0], [prompt]):
            self._model.prefill(self._model.embed(np.arange(prompt)), self._cache)

    def steps(self, seconds: float) -> list[float]:
        """Milliseconds of each step of about that many seconds."""
        found: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(found) < LEAST_STEPS:
            for _ in range(self._tokens):
                start = time.perf_counter()
                with self._cache.forward([0], [1]):
                    logits, _ = self._model.decode(self._model.embed([5]), self._cache)
                    logits.numpy()
                found.append((time.perf_counter() - start) * 1e3)
                if time.perf_counter() >= end and len(found) >= LEAST_STEPS:
                    break
            self._cache.popn(0, (len(found) - 1) % self._tokens + 1)
        return found


if __name__ == "__main__":
    main()
