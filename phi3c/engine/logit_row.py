"""One row of logits, looked into as little as possible: the largest of each block come first."""

from __future__ import annotations

import numpy as np

from phi3c.errors import InputError

__all__ = ["LogitRow", "checked_argmax"]

_BLOCK = 64  # tokens, at most


class LogitRow:
    """logits `[vocab]`, any float type. table `[rows, blocks]`: token i is at i // blocks,
    i % blocks, and -inf behind the last; tops `[blocks]`: the largest of each block; top: of all.

    Raises InputError for another shape, RuntimeError where the logits hold NaN or +inf.
    """

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = padded = _checked_shape(logits)
        blocks = -(-padded.size // _BLOCK)
        if missing := -padded.size % blocks:
            padded = np.concatenate([padded, np.full(missing, -np.inf, padded.dtype)])
        self.table = padded.reshape(-1, blocks)
        self.tops = self.table.max(axis=0)  # NaN where any is
        self.top = self.tops.max()
        _check_top(self.top)

    def kth_largest(self, k: int) -> np.floating:
        """The k-th largest logit, 1 ≤ k ≤ vocab."""
        head, spare = self.logits, self.tops.size - k
        if spare >= 0:  # so many blocks have one that is as large
            head = self.at_least(np.partition(self.tops, spare)[spare])
        return np.partition(head, head.size - k)[head.size - k]

    def at_least(self, value: float) -> np.ndarray:
        """The logits that reach it, in the order of their ids."""
        return self.logits if value == -np.inf else self.logits[self.logits >= value]

    def weights(self, values: np.ndarray, temperature: float) -> np.ndarray:
        """exp((values − top) / temperature), float64: probabilities but for their sum."""
        # Subtract before dividing: a tiny temperature then gives 0 and -inf, never inf - inf.
        with np.errstate(over="ignore"):
            return np.exp((values.astype(np.float64) - self.top) / temperature)

    def rough_weights(self, values: np.ndarray, temperature: float) -> np.ndarray:
        """The same in float32, several times faster."""
        scores = values.astype(np.float32)
        scores -= np.float32(self.top)
        with np.errstate(over="ignore"):
            scores /= np.float32(max(temperature, 1e-45))
            return np.exp(scores, out=scores)


def checked_argmax(logits: np.ndarray) -> int:
    """The lowest id of the largest logit; raises as LogitRow does."""
    logits = _checked_shape(logits)
    token_id = int(logits.argmax())  # of the first NaN, if there is one
    _check_top(logits[token_id])
    return token_id


def _checked_shape(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits)
    if logits.ndim != 1 or logits.size == 0:
        raise InputError(f"logits: found shape {list(logits.shape)}; accepted: [vocab]")
    return logits


def _check_top(top: np.floating) -> None:
    if not np.isfinite(top):
        found = "NaN" if np.isnan(top) else "+inf" if top > 0 else "nothing but -inf"
        raise RuntimeError(f"cannot sample: logits hold {found}")
