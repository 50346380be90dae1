"""The timed work: prefill, decode at a context, batched decode; random tokens from a seed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..manifest import Manifest
from ..memory import weights_bytes
from ..runtime.compiled import CompiledPhi3
from ..runtime.kv_cache import PagedKVCache
from ..tensor_file import tensor_bytes


@dataclass(frozen=True)
class Work:
    """batch sequences of `context` tokens; new: tokens of each that are timed at once.

    A prefill has context 0 and new > 1, a decode step new = 1.
    """

    batch: int
    context: int
    new: int

    @property
    def name(self) -> str:
        if self.new > 1:
            return f"prefill {self.new}"
        many = f" batch {self.batch}" if self.batch > 1 else ""
        return f"decode{many} @{self.context}"

    @property
    def tokens(self) -> int:
        return self.batch * self.new


def bytes_read(manifest: Manifest, work: Work) -> int:
    """Weights once, and the keys and values of every sequence: what a decode step must read."""
    parameters = weights_bytes(manifest)
    if not manifest.config.tie_word_embeddings:
        parameters -= sum(
            tensor_bytes(p.shape, p.dtype)
            for p in manifest.parameters
            if p.name.startswith("model.embed_tokens.")
        )
    seen = min(work.context, manifest.config.sliding_window or work.context)
    return parameters + work.batch * seen * manifest.kv_layout.bytes_per_token


def linear_operations(manifest: Manifest, work: Work) -> int:
    """Multiplications and additions of the linears.

    The last layer computes only qkv_proj for every token of a prefill, and the rest, as the LM
    head, for the last one of each chunk.
    """
    c = manifest.config
    heads = c.num_attention_heads * c.head_dim
    qkv = heads + 2 * c.num_key_value_heads * c.head_dim
    rest = heads + 3 * c.intermediate_size
    rows = work.batch * -(-work.new // manifest.limits.prefill_chunk_size)
    products = work.tokens * (c.num_hidden_layers * qkv + (c.num_hidden_layers - 1) * rest)
    return 2 * c.hidden_size * (products + rows * (rest + c.vocab_size))


def seconds(model: CompiledPhi3, work: Work, samples: int, seed: int = 0) -> list[float]:
    """Of each of `samples` runs of the work, after one that is not counted."""
    return list(_runs(model, work, samples + 1, seed))[1:]


def kernel_seconds(
    model: CompiledPhi3, work: Work, samples: int, seed: int = 0
) -> dict[str, tuple[float, int]]:
    """Kernel → (seconds, calls) of one run, the mean of `samples`; timing each costs some time."""
    runs = _runs(model, work, samples + 1, seed)
    next(runs)
    with model.kernel_times() as times:
        for _ in runs:
            pass
    return {n: (t.seconds / samples, round(t.count / samples)) for n, t in times.items()}


def fits(manifest: Manifest, work: Work, samples: int) -> bool:
    """Whether the artifact's limits have room for the work."""
    limits = manifest.limits
    room = _room(work, samples + 1)
    return room <= limits.context_length and work.batch <= limits.max_batch_size


def check(manifest: Manifest, work: Work, samples: int) -> None:
    """Raises InputError if the artifact's limits are below what the work needs."""
    limits, room = manifest.limits, _room(work, samples + 1)
    if not fits(manifest, work, samples):
        raise InputError(
            f"bench: {work.name}: needs {room} tokens in {work.batch} sequences; accepted: up to "
            f"{limits.context_length} in {limits.max_batch_size}, the artifact's limits"
        )


def _room(work: Work, count: int) -> int:
    """Tokens of a sequence at the end of `count` runs."""
    return work.context + (count if work.new == 1 else work.new)


def _runs(model: CompiledPhi3, work: Work, count: int, seed: int) -> Iterator[float]:
    check(model.manifest, work, count - 1)
    room = _room(work, count)
    rng = np.random.default_rng(seed)
    cache = model.create_paged_kv_cache(
        max_batch_size=work.batch, max_total_seq_len=work.batch * (room + 16)
    )
    long = model.config.needs_long_factors(room)
    ids = list(range(work.batch))
    for i in ids:
        cache.add_sequence(i, max_length=room if long else None)
        _prefill(model, cache, i, rng.integers(0, model.config.vocab_size, work.context))
    for _ in range(count):
        tokens = rng.integers(0, model.config.vocab_size, work.tokens)
        with _timer() as timer:
            if work.new > 1:
                _prefill(model, cache, 0, tokens)
            else:
                with cache.forward(ids, [1] * work.batch):
                    embed = model.embed(tokens)
                    one = work.batch == 1
                    (model.decode if one else model.batch_decode)(embed, cache)[0].numpy()
        if work.new > 1:
            cache.popn(0, work.new)
        yield timer.seconds


def _prefill(model: CompiledPhi3, cache: PagedKVCache, seq_id: int, tokens: np.ndarray) -> None:
    chunk = model.manifest.limits.prefill_chunk_size
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        with cache.forward([seq_id], [len(part)]):
            model.prefill(model.embed(part), cache)[0].numpy()


class _Timer:
    seconds = 0.0


@contextmanager
def _timer() -> Iterator[_Timer]:
    timer, start = _Timer(), time.perf_counter()
    yield timer
    timer.seconds = time.perf_counter() - start
