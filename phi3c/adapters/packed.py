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
        try:
            a, b = _cast(low_rank, dtype)
        except OverflowError:
            raise AdapterError(
                f"layer {layer}: {target}: found values beyond {dtype}, the adapters' type in this "
                "artifact; accepted: smaller ones, or a scheme with a wider type, such as q4f32_1"
            ) from None
        return pack_a(a, len(a), dtype), pack_b(b, len(a), dtype)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pairs = list(pool.map(pack, weights.low_rank.items()))
    return PackedAdapter(weights.rank, dict(zip(weights.low_rank, pairs, strict=True)))


def _cast(low_rank: LowRank, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """A and B in dtype. In float16 their largest values are alike in each rank, and their product
    is the same: float16 has few bits for values below 6e-5, and B's are often near that.

    Factors are powers of two; ranks of zeros, or of values whose square float32 does not hold, stay
    as they are. Raises OverflowError where a value would become infinite.
    """
    a, b = low_rank.a, low_rank.b
    if dtype == "float32":
        return a, b
    largest_a = np.maximum(a.max(axis=1), -a.min(axis=1))
    largest_b = np.maximum(b.max(axis=0), -b.min(axis=0))
    usual = (largest_a > 1e-18) & (largest_b > 1e-18) & (largest_a < 1e18) & (largest_b < 1e18)
    ratio = np.divide(largest_b, largest_a, out=np.ones_like(largest_a), where=usual)
    factor = np.exp2(np.rint(np.log2(ratio) / 2))
    with np.errstate(over="ignore"):
        largest = np.concatenate([largest_a * factor, largest_b / factor]).astype(dtype)
    if not np.isfinite(largest).all():
        raise OverflowError
    narrow_a, narrow_b = np.empty(a.shape, dtype), np.empty(b.shape, dtype)
    np.multiply(a, factor[:, None], out=narrow_a, casting="unsafe")
    np.divide(b, factor, out=narrow_b, casting="unsafe")
    return narrow_a, narrow_b
