"""What `phi3c bench --engine` runs through the engine, and the tables it makes of it.

concurrent: equal requests, one at a time (each arrives when the one before it has ended) and
together. shared prefix: one long beginning, in one request and in several that arrive together.
trace: requests at random (trace.py): all there at once, answered one at a time and together, then
arriving at a rate that the engine can follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..engine.engine import Engine
from ..errors import InputError
from ..runtime.compiled import CompiledPhi3
from .trace import Arrival, Replay, replay, synthetic_trace

LOAD = 0.7  # of the requests that it answers in a second, where no rate is given
_FIRST = 3  # below are special tokens


def concurrent(model: CompiledPhi3, count: int, seed: int = 0) -> list[Replay]:
    """Prompts of 128 tokens, answers of 64, or what the context has room for: three requests one
    at a time, `count` together.
    """
    context = model.manifest.limits.context_length
    prompt, answer = min(128, context // 2), max(1, min(64, context // 4))
    requests = _requests(model, count, 0, prompt, answer, seed)
    return [
        replay(Engine(model, prefix_cache=False), requests[:3], "one at a time", 1, queues=False),
        replay(Engine(model, prefix_cache=False), requests, f"{count} together"),
    ]


def shared_prefix(model: CompiledPhi3, count: int, seed: int = 0) -> list[Replay]:
    """1,024 tokens (or half the context) that every prompt begins with, 16 of its own, answers of
    8: one request, and `count` that arrive together.
    """
    context = model.manifest.limits.context_length
    prefix = min(1024, context // 2)
    own = min(16, context // 8)
    requests = _requests(model, count, prefix, own, min(8, own), seed)
    return [
        replay(Engine(model), requests[:1], f"1 of {prefix}+{own}"),
        replay(Engine(model), requests, f"{count} of {prefix}+{own}"),
    ]


def random_arrivals(
    model: CompiledPhi3,
    count: int,
    rate: float | None,
    prefix: int,
    longest: int,
    max_step_tokens: int | None = None,
) -> list[Replay]:
    """`count` requests, `rate` a second; None: all at once, one at a time and together, then at
    LOAD of what that answered.

    prefix, longest: as in `synthetic_trace`. max_step_tokens: as in Engine.
    """

    def run(rate: float, name: str, at_once: int | None = None) -> Replay:
        trace = synthetic_trace(model.config.vocab_size, count, rate, prefix, longest)
        return replay(Engine(model, max_step_tokens=max_step_tokens), trace, name, at_once)

    if rate is not None:
        return [run(rate, f"{rate:.3g} a second" if rate else "all at once")]
    together = run(0, "all at once")
    rate = LOAD * count / together.seconds
    return [run(0, "one at a time", 1), together, run(rate, f"{rate:.3g} a second")]


def render(tables: dict[str, Sequence[Replay]]) -> str:
    """Throughput, latencies at the 50th, 90th and 99th percentile, the longest that any request
    waited from one token to the next, and what the engine counted."""
    blocks = []
    for title, replays in tables.items():
        lines = [
            f"{title:18}{'tokens/s':>9}{'seconds':>9}{'first token, ms':>22}{'a token, ms':>18}"
            f"{'largest gap':>12}{'batch':>7}{'computed':>10}{'cached':>8}{'preempted':>10}"
            f"{'overhead':>17}"
        ]
        for r in replays:
            m = r.metrics
            overhead = 1e3 * (m.step_seconds - m.model_seconds) / max(1, m.steps)
            lines.append(
                f"{r.name:18}{r.tokens / r.seconds:9.1f}{r.seconds:9.2f}"
                f"{_percentiles(r.first_token):>22}{_percentiles(r.token):>18}"
                f"{1e3 * max(r.gap):12.0f}{m.mean_batch:7.1f}"
                f"{m.computed_tokens:10}{m.cached_tokens:8}{m.preemptions:10}"
                f"{f'{overhead:.2f} ms, {m.overhead:.1%}':>17}"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def bench_engine(
    model: CompiledPhi3,
    batch: int,
    requests: int,
    rate: float | None,
    prefix: int,
    longest: int,
    max_step_tokens: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, list[Replay]]:
    """Title → replays. batch: requests together in the first two, at most the artifact's; the
    others are of `random_arrivals`. Raises InputError before anything is measured.
    """
    limits = model.manifest.limits
    batch, longest = min(batch, limits.max_batch_size), min(longest, limits.context_length)
    if requests < 1 or (rate or 0) < 0 or not 0 <= prefix <= longest // 2 - 8:
        raise InputError(
            f"bench: found --requests {requests}, --rate {rate or 0:g}, --shared-prefix {prefix}; "
            f"accepted: 1 or more, 0 or more, 0 to {longest // 2 - 8} (half of --longest, less 8)"
        )
    report = progress or (lambda stage, done, total: None)
    loads = {
        "concurrent": lambda: concurrent(model, batch),
        "shared prefix": lambda: shared_prefix(model, batch),
        "trace": lambda: random_arrivals(model, requests, rate, prefix, longest, max_step_tokens),
    }
    warm = Engine(model, max_step_tokens=max_step_tokens)
    replay(warm, _requests(model, 2, 0, 8, 4, seed=1), "warm")
    tables = {}
    for done, (title, run) in enumerate(loads.items()):
        report("bench", done, len(loads))
        tables[title] = run()
    report("bench", len(loads), len(loads))
    return tables


def _requests(
    model: CompiledPhi3, count: int, shared: int, own: int, answer: int, seed: int
) -> list[Arrival]:
    rng, vocab = np.random.default_rng(seed), model.config.vocab_size
    prefix = rng.integers(_FIRST, vocab, shared).tolist()
    return [
        Arrival(0.0, prefix + rng.integers(_FIRST, vocab, own).tolist(), answer)
        for _ in range(count)
    ]


def _percentiles(seconds: Sequence[float]) -> str:
    return " / ".join(f"{1e3 * p:.0f}" for p in np.percentile(seconds, [50, 90, 99]))
