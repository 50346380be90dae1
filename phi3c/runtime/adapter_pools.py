"""The tensors that hold the adapters of a running model, and the ranks of those that are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import tvm

from ..adapters.layout import AdapterLayout, layer_targets, pack_a, pack_b
from ..config import Phi3Config
from ..errors import InputError


class LowRank(Protocol):
    """One module's part of an adapter, A `[r, in]` and B `[out, r]`, its scale in B."""

    a: np.ndarray
    b: np.ndarray


class AdapterWeights(Protocol):
    """rank: the largest of its modules; low_rank: by (layer, target), those that it adapts."""

    rank: int
    low_rank: Mapping[tuple[int, str], LowRank]


class AdapterPools:
    """max_loras slots, each empty or with an adapter of some rank up to max_rank.

    tensors: what the compiled functions take, in the order of AdapterLayout.pool_shapes.
    """

    def __init__(self, layout: AdapterLayout, config: Phi3Config, device: tvm.runtime.Device):
        self.layout = layout
        self._config = config
        self._ranks = np.zeros(layout.max_loras, np.int32)
        # Not zeroed: the kernels never read an empty slot, and `write` fills all of one.
        pools = [
            tvm.runtime.empty(shape, layout.dtype, device) for shape in layout.pool_shapes(config)
        ]
        self.tensors = tvm.runtime.convert(pools)
        self._arrays = [np.from_dlpack(pool) for pool in pools]

    @property
    def ranks(self) -> np.ndarray:
        """`[max_loras]` int32, 0: the slot is empty."""
        return self._ranks

    def write(self, slot: int, weights: AdapterWeights) -> None:
        """Fills a slot; modules that the adapter leaves out are zeros. No forward may be using it.

        Raises InputError (rank above max_rank, values above the largest of the pools' dtype); then
        nothing has changed.
        """
        self._check(weights)
        self._ranks[slot] = 0  # until it is whole
        rank, dtype = self.layout.max_rank, self.layout.dtype
        for i, key in enumerate(layer_targets(self._config)):
            a, b = self._arrays[2 * i][slot], self._arrays[2 * i + 1][slot]
            if key in weights.low_rank:
                a[:] = pack_a(weights.low_rank[key].a, rank, dtype)
                b[:] = pack_b(weights.low_rank[key].b, rank, dtype)
            else:
                a[:], b[:] = 0, 0
        self._ranks[slot] = weights.rank

    def clear(self, slot: int) -> None:
        """Empties a slot: its rows are those of the base model."""
        self._ranks[slot] = 0

    def row_ranks(self, slots: np.ndarray) -> np.ndarray:
        """slots `[n]`, −1: the base model → ranks `[n]` int32, 0 for it."""
        return np.where(slots < 0, 0, self._ranks[slots]).astype(np.int32)

    def _check(self, weights: AdapterWeights) -> None:
        if weights.rank > self.layout.max_rank:
            raise InputError(
                f"adapter: found rank {weights.rank}; accepted: up to {self.layout.max_rank} "
                "(max_rank)"
            )
        most = float(np.finfo(self.layout.dtype).max)
        for (layer, target), low_rank in weights.low_rank.items():
            for name, array in (("A", low_rank.a), ("B", low_rank.b)):
                largest = float(np.abs(array).max(initial=0))
                if not largest <= most:  # NaN is not
                    raise InputError(
                        f"adapter: layer {layer}, {target}, {name}: found {largest:g}; accepted: "
                        f"up to {most:g} ({self.layout.dtype})"
                    )
