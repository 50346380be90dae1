"""An adapter as a slot holds it, but for the padding to max_rank: what is kept of a loaded one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import AdapterError
from .layout import pack_a, pack_b
from .weights import AdapterWeights, LowRank


@dataclass(frozen=True)
class PackedAdapter:
    """pairs: by layer and target, A `[r, in]` and panels of B `[ceil(out/16), r, 16]` in the dtype
    of the pools, r being that linear's rank; rank: the largest of them."""

    rank: int
    pairs: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for pair in self.pairs.values() for array in pair)


def pack_adapter(weights: AdapterWeights, dtype: str) -> PackedAdapter:
    """In the dtype of the pools. Raises AdapterError for values that it does not hold."""

    def pack(item: tuple[tuple[int, str], LowRank]) -> tuple[np.ndarray, np.ndarray]:
        (layer, target), low_rank = item
        a, b = _balanced(low_rank) if dtype == "float16" else (low_rank.a, low_rank.b)
        with np.errstate(over="ignore"):
            pair = pack_a(a, len(a), dtype), pack_b(b, len(a), dtype)
        if not all(np.isfinite(array).all() for array in pair):
            raise AdapterError(
                f"layer {layer}: {target}: found values beyond {dtype}, the adapters' type in this "
                "artifact; accepted: smaller ones, or a scheme with a wider type, such as q4f32_1"
            )
        return pair

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pairs = list(pool.map(pack, weights.low_rank.items()))
    return PackedAdapter(weights.rank, dict(zip(weights.low_rank, pairs, strict=True)))


def _balanced(low_rank: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """A and B with largest values alike in each rank; their product is the same, bit by bit.

    Float16 has few bits for values below 6e-5, and B's are often near that. Factors are powers of
    two; ranks of zeros, or of values whose square float32 does not hold, stay as they are.
    """
    largest_a = np.maximum(low_rank.a.max(axis=1), -low_rank.a.min(axis=1))
    largest_b = np.maximum(low_rank.b.max(axis=0), -low_rank.b.min(axis=0))
    usual = (largest_a > 1e-18) & (largest_b > 1e-18) & (largest_a < 1e18) & (largest_b < 1e18)
    ratio = np.divide(largest_b, largest_a, out=np.ones_like(largest_a), where=usual)
    factor = np.exp2(np.rint(np.log2(ratio) / 2))
    return low_rank.a * factor[:, None], low_rank.b / factor
