"""One row of logits, looked into as little as possible: the largest of each block come first."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from phi3c.errors import InputError
from phi3c.logit_blocks import logit_blocks

__all__ = ["LogitRow"]


class LogitRow:
    """logits `[vocab]`, any float type; of `blocks` blocks.

    What first needs the largest of them raises RuntimeError where they hold NaN or +inf.
    """

    def __init__(self, logits: np.ndarray) -> None:
        """Raises InputError for another shape."""
        logits = np.asarray(logits)
        if logits.ndim != 1 or logits.size == 0:
            raise InputError(f"logits: found shape {list(logits.shape)}; accepted: [vocab]")
        self.logits = logits
        self.size = logits.size
        self.blocks = logit_blocks(logits.size)

    @classmethod
    def of(cls, logits: np.ndarray | LogitRow) -> LogitRow:
        """The same, if it is one."""
        return logits if isinstance(logits, LogitRow) else cls(logits)

    @cached_property
    def table(self) -> np.ndarray:
        """`[rows, blocks]`: token i is at i // blocks, i % blocks, and -inf behind the last."""
        padded = self.logits
        if missing := -self.size % self.blocks:
            padded = np.concatenate([padded, np.full(missing, -np.inf, padded.dtype)])
        return padded.reshape(-1, self.blocks)

    @cached_property
    def tops(self) -> np.ndarray:
        """`[blocks]`: the largest of each block."""
        return self.table.max(axis=0)  # NaN where any is

    @cached_property
    def top(self) -> np.floating:
        """The largest of all."""
        return checked(self.tops.max())

    def argmax(self) -> int:
        """The lowest id of the largest logit."""
        token_id = int(self.logits.argmax())  # of the first NaN, if there is one
        checked(self.logits[token_id])
        return token_id

    def kth_largest(self, k: int) -> np.floating:
        """The k-th largest logit, 1 ≤ k ≤ vocab."""
        head, spare = self.logits, self.blocks - k
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


def checked(top: np.floating) -> np.floating:
    """The largest of a row's logits. RuntimeError where nothing can be drawn from them."""
    if not np.isfinite(top):
        found = "NaN" if np.isnan(top) else "+inf" if top > 0 else "nothing but -inf"
        raise RuntimeError(f"cannot sample: logits hold {found}")
    return top
