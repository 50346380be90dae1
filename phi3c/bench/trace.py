"""Requests that arrive by themselves: a synthetic trace, replayed through an engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.engine import Engine
from ..engine.metrics import Metrics
from ..engine.request import Handle, Request
from ..engine.sampler import SamplingParams


@dataclass(frozen=True)
class Arrival:
    """A request that comes `seconds` after the start of the trace."""

    seconds: float
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Replay:
    """seconds: from the first arrival to the last token. Of each request: first_token, from its
    arrival; token, the mean between its tokens after the first, 0 where there is one; gap, the
    longest that it waited for the next of them.
    """

    name: str
    seconds: float
    tokens: int
    first_token: tuple[float, ...]
    token: tuple[float, ...]
    gap: tuple[float, ...]
    metrics: Metrics


def synthetic_trace(
    vocab_size: int, count: int, rate: float, prefix: int, longest: int, seed: int = 0
) -> list[Arrival]:
    """Poisson arrivals, `rate` a second (0: all at once); a third begin with the same `prefix`
    tokens. Prompts of 8 tokens to half of `longest`, answers of 8 to a quarter, log-uniform.
    """
    rng = np.random.default_rng(seed)
    shared = rng.integers(3, vocab_size, prefix).tolist()
    at, trace = 0.0, []
    for i in range(count):
        at += rng.exponential(1 / rate) if rate else 0.0
        own = rng.integers(3, vocab_size, _log_uniform(rng, 8, longest // 2 - prefix)).tolist()
        prompt = shared + own if i % 3 == 0 else own
        trace.append(Arrival(at, prompt, _log_uniform(rng, 8, longest // 4)))
    return trace


def replay(
    engine: Engine,
    trace: Sequence[Arrival],
    name: str,
    at_once: int | None = None,
    queues: bool = True,
) -> Replay:
    """Runs a trace as it comes; at_once: requests in the engine at the same time, None: any.

    queues: a request arrives at its time, and may then have to wait to be let in; else it arrives
    when it is let in.
    """
    start = time.perf_counter()
    waiting = list(reversed(trace))
    arrived: dict[Handle, float] = {}
    first: dict[Handle, float] = {}
    last: dict[Handle, float] = {}
    seen: dict[Handle, tuple[int, float]] = {}  # tokens, and when the latest came
    gap: dict[Handle, float] = {}
    while waiting or len(last) < len(arrived):
        now = time.perf_counter() - start
        while waiting and waiting[-1].seconds <= now:
            if at_once is not None and len(arrived) - len(last) >= at_once:
                break
            arrival = waiting.pop()
            params = SamplingParams(temperature=0, max_tokens=arrival.max_tokens, ignore_eos=True)
            handle = engine.submit(Request(arrival.prompt, params))
            arrived[handle] = arrival.seconds if queues else now
            seen[handle], gap[handle] = (0, now), 0.0
        if engine.idle:
            time.sleep(max(0.0, waiting[-1].seconds - now))
            continue
        engine.step()
        now = time.perf_counter() - start
        for handle in arrived:
            count, since = seen[handle]
            if len(handle.outputs[0].token_ids) > count:
                first.setdefault(handle, now)
                seen[handle] = len(handle.outputs[0].token_ids), now
                if count:
                    gap[handle] = max(gap[handle], now - since)
            if handle.done:
                last.setdefault(handle, now)
    lengths = {handle: len(handle.outputs[0].token_ids) for handle in arrived}
    return Replay(
        name,
        max(last.values()),
        sum(lengths.values()),
        tuple(first[h] - arrived[h] for h in arrived),
        tuple((last[h] - first[h]) / max(1, lengths[h] - 1) for h in arrived),
        tuple(gap[h] for h in arrived),
        engine.metrics(),
    )


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return round(float(np.exp(rng.uniform(np.log(low), np.log(max(low, high))))))
