"""What a request changes in the logits before they are sampled: penalties and biases.

Repetition as transformers has it (Keskar et al. 2019: positive logits are divided, negative ones
multiplied, for every token of prompt and answer), presence and frequency as OpenAI's API has them
(subtracted, for tokens of the answer).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phi3c.engine.sampler import SamplingParams

__all__ = ["Penalties"]


class Penalties:
    """Of one sequence, which tells it its tokens."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self._params = params
        self._counts: np.ndarray | None = None  # of each token in the answer
        self._seen: np.ndarray | None = None  # whether it is in prompt or answer
        if params.presence_penalty or params.frequency_penalty:
            self._counts = np.zeros(vocab_size, np.int32)
        if params.repetition_penalty != 1:
            self._seen = np.zeros(vocab_size, bool)
            self._seen[np.asarray(prompt_ids, np.int64)] = True
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)

    def add(self, token_id: int) -> None:
        """One more token of the answer."""
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._seen is not None:
            self._seen[token_id] = True

    @property
    def active(self) -> bool:
        """Whether anything is asked for."""
        return self._counts is not None or self._seen is not None or self._bias_ids.size > 0

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """logits `[vocab]` → a changed copy."""
        logits = logits.copy()
        if self._seen is not None:
            penalty = np.float32(self._params.repetition_penalty)
            seen = logits[self._seen]
            logits[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts is not None:
            logits -= np.float32(self._params.frequency_penalty) * self._counts
            logits -= np.float32(self._params.presence_penalty) * (self._counts > 0)
        logits[self._bias_ids] += self._bias
        return logits
