"""Logits on a device that has a memory of its own: the host copies what it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import groupby

import numpy as np
from tvm.runtime import Tensor

from .logit_row import LogitRow, checked


def device_rows(
    logits: Tensor, whole: Sequence[bool], block_maxima: Callable[[Tensor], Tensor]
) -> list[LogitRow]:
    """Rows of logits `[1, n, vocab]` float32. whole: those that are copied at once, neighbours
    together; of others the largest of each block are, `block_maxima(logits)` (kernels/gpu/maxima),
    and the rest where it is asked for.
    """
    rows: list[LogitRow | None] = [None] * len(whole)
    for start, end in _runs(whole):
        rows[start:end] = map(LogitRow, _copied(logits, start, end))
    if None in rows:
        maxima = block_maxima(logits).numpy()  # [n, 2, blocks]
        for i in (i for i, row in enumerate(rows) if row is None):
            values, ids = maxima[i]
            rows[i] = _MaximaRow(logits, i, values.view(np.float32), ids)
    return rows


class _MaximaRow(LogitRow):
    """Its blocks' maxima are here, the logits where something needs them."""

    def __init__(self, logits: Tensor, index: int, tops: np.ndarray, ids: np.ndarray) -> None:
        self.size = int(logits.shape[2])
        self.blocks = tops.size
        self.tops = tops
        self._ids = ids
        self._copied = partial(_copied, logits, index, index + 1)

    @cached_property
    def logits(self) -> np.ndarray:
        return self._copied()[0]

    def argmax(self) -> int:
        checked(self.top)
        return int(self._ids[self.tops == self.top].min())


def _copied(logits: Tensor, start: int, end: int) -> np.ndarray:
    """Rows `[end − start, vocab]` on the host."""
    vocab = int(logits.shape[2])
    offset = start * vocab * np.dtype(np.float32).itemsize
    return logits._create_view((end - start, vocab), relative_byte_offset=offset).numpy()


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Start and end of each run of what is true."""
    end = 0
    for flag, run in groupby(flags):
        start, end = end, end + len(list(run))
        if flag:
            yield start, end
