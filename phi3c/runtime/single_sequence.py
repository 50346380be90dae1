"""One growing sequence on a KV cache of its own: the logits of every step.

For comparing a model with an oracle; text is the engine's business. LongRoPE is followed as
transformers' `generate()` does: the step that passes original_max_position_embeddings computes the
whole sequence again, once, with the long factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InputError
from ..memory import sequence_cache_tokens
from .compiled import CompiledPhi3

_ID = 0  # the sequence in its cache
_PAGE_SIZE = 16


class SingleSequence:
    """Takes tokens, gives logits. computed_tokens: what was run, recomputed ones included."""

    def __init__(self, model: CompiledPhi3) -> None:
        self.tokens: list[int] = []
        self.computed_tokens = 0
        self._model = model
        self._cache = model.create_paged_kv_cache(
            max_batch_size=1,
            max_total_seq_len=sequence_cache_tokens(model.manifest, _PAGE_SIZE),
            page_size=_PAGE_SIZE,
        )
        self._long_factors = False
        self._cache.add_sequence(_ID)

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens; logits `[vocab]` float32 of the last. Raises InputError for none."""
        ids = [int(token_id) for token_id in ids]
        if not ids:
            raise InputError("tokens: found none; accepted: at least one")
        new = ids
        if self._model.config.needs_long_factors(len(self.tokens) + len(ids)) != self._long_factors:
            self._begin_again(long_factors=True)
            new = self.tokens + ids
        self.tokens = self.tokens + ids
        chunk = self._model.manifest.limits.prefill_chunk_size
        for start in range(0, len(new), chunk):
            logits = self._forward(new[start : start + chunk])
        return logits

    def clear(self) -> None:
        """Empty again."""
        self.tokens = []
        self._begin_again(long_factors=False)

    def _begin_again(self, long_factors: bool) -> None:
        self._cache.remove_sequence(_ID)
        self._long_factors = long_factors
        context = self._model.manifest.limits.context_length
        self._cache.add_sequence(_ID, context if long_factors else None)

    def _forward(self, ids: list[int]) -> np.ndarray:
        run = self._model.decode if len(ids) == 1 else self._model.prefill
        with self._cache.forward([_ID], [len(ids)]):
            logits, _ = run(self._model.embed(ids), self._cache)
        self.computed_tokens += len(ids)
        return logits.numpy().reshape(-1)
