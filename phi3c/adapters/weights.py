"""An adapter's weights in memory, free of the names and scales of its files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one linear: y += b (a x).

    a: float32 `[rank, in]`; b: float32 `[out, rank]`, with the scale folded in.
    """

    a: np.ndarray
    b: np.ndarray

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class AdapterWeights:
    """A LoRA adapter, checked against a model's dimensions.

    low_rank: by layer and target (layout.TARGETS), in order; a linear that is not there gets
    nothing. rank: the largest of them. digest: sha256 of the contents, hexadecimal.
    """

    rank: int
    low_rank: dict[tuple[int, str], LowRank]
    digest: str
