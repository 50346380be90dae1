"""One growing sequence on a paged KV cache of its own.

LongRoPE is followed as transformers' `generate()` does: a sequence takes the long factors when its
whole length exceeds original_max_position_embeddings. The step that crosses drops the cache once
and recomputes every token, and going back below recomputes with the short factors. Many sequences
in one batch are the scheduler's business, not a session's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phi3c.errors import ContextLengthError, InputError, SequenceError
from phi3c.runtime.compiled import CompiledPhi3
from phi3c.runtime.kv_cache import PagedKVCache

__all__ = ["Session"]

_ID = 0  # the session's sequence in its cache
_PAGE_SIZE = 16


class Session:
    """Feeds tokens, gives logits, and goes back. Not for several Python threads at once.

    computed_tokens: how many tokens the model has been run on, recomputed ones included.
    """

    def __init__(self, model: CompiledPhi3) -> None:
        self.model = model
        self.computed_tokens = 0
        self._cache = _create_cache(model)
        self._tokens: list[int] = []
        self._long_factors = False
        self._cache.add_sequence(_ID)

    @property
    def tokens(self) -> list[int]:
        """What is in the cache; after an interrupted call, as far as that call had come."""
        return self._tokens[: len(self)]

    def __len__(self) -> int:
        return self._cache.sequence_length(_ID)

    @property
    def context_length(self) -> int:
        """The most tokens the session can hold."""
        return self.model.manifest.limits.context_length

    def check(self, ids: Sequence[int], before: int = 0) -> list[int]:
        """`ids` as integers, if they can follow `before` tokens; runs nothing.

        Raises InputError (none, or out of the vocabulary) and ContextLengthError.
        """
        vocab = self.model.config.vocab_size
        if not len(ids):
            raise InputError("tokens: found none; accepted: at least one")
        for at, token_id in enumerate(ids):
            integer = isinstance(token_id, int | np.integer) and not isinstance(token_id, bool)
            if not integer or not 0 <= token_id < vocab:
                raise InputError(
                    f"tokens[{at}]: found {token_id!r}; accepted: 0 to {vocab - 1} (vocab_size)"
                )
        if before + len(ids) > self.context_length:
            after = f" after {before}" if before else ""
            raise ContextLengthError(
                f"tokens: found {len(ids)}{after}; accepted: up to {self.context_length} in all, "
                "the context length of this artifact"
            )
        return [int(token_id) for token_id in ids]

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens; logits `[vocab]` float32 of the last one. Raises as `check` does."""
        ids = self.check(ids, before=len(self))
        if self._needs_long(len(self) + len(ids)) != self._long_factors:
            ids = self.tokens + ids
            self._restart(len(ids))
        return self._feed(ids)

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens. Recomputes them where the cache cannot go back.

        That is across the LongRoPE switch, and where the sliding window's pages are freed.
        """
        tokens = self.tokens
        if not 0 <= length <= len(tokens):
            raise InputError(f"length: found {length}; accepted: 0 to {len(tokens)}")
        if not self._go_back(length, total=length) and length:
            self._feed(tokens[:length])

    def resume(self, ids: Sequence[int]) -> np.ndarray:
        """Become the sequence `ids`, keeping what it shares with `tokens`; logits of its last.

        At least the last token is computed, so that there are logits. Raises as `check` does, and
        then has changed nothing.
        """
        ids = self.check(ids)
        shared = _common_prefix(self.tokens, ids[:-1])
        kept = shared if self._go_back(shared, total=len(ids)) else 0
        return self._feed(ids[kept:])

    def _go_back(self, length: int, total: int) -> bool:
        """Cut the cache to `length` tokens, for a sequence of `total`; False: it is empty now."""
        if self._needs_long(total) == self._long_factors:
            try:
                self._cache.popn(_ID, len(self) - length)
                return True
            except SequenceError:  # the window before `length` is freed
                pass
        self._restart(total)
        return False

    def _restart(self, total: int) -> None:
        """An empty sequence, with the factors that `total` tokens take."""
        self._cache.remove_sequence(_ID)
        self._long_factors = self._needs_long(total)
        self._cache.add_sequence(_ID, self.context_length if self._long_factors else None)

    def _feed(self, ids: list[int]) -> np.ndarray:
        chunk = self.model.manifest.limits.prefill_chunk_size
        self._tokens[len(self) :] = ids
        for start in range(0, len(ids), chunk):
            logits = self._forward(ids[start : start + chunk])
        return logits

    def _forward(self, ids: list[int]) -> np.ndarray:
        run = self.model.decode if len(ids) == 1 else self.model.prefill
        with self._cache.forward([_ID], [len(ids)]):
            logits, _ = run(self.model.embed(ids), self._cache)
        self.computed_tokens += len(ids)
        return logits.numpy().reshape(-1)

    def _needs_long(self, total: int) -> bool:
        return self.model.config.needs_long_factors(total)


def _create_cache(model: CompiledPhi3) -> PagedKVCache:
    """Room for one sequence of the whole context, or of what a sliding window leaves of it."""
    limits, window = model.manifest.limits, model.config.sliding_window
    room = -(-limits.context_length // _PAGE_SIZE) * _PAGE_SIZE
    if window is not None:
        # The runtime keeps window + chunk tokens; both ends may lie within a page.
        kept = -(-(window + limits.prefill_chunk_size) // _PAGE_SIZE) + 2
        room = min(room, kept * _PAGE_SIZE)
    return model.create_paged_kv_cache(
        max_batch_size=1, max_total_seq_len=room, page_size=_PAGE_SIZE
    )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
