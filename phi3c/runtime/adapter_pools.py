"""The tensors that hold the adapters of a running model, and the ranks of those that are loaded."""

from __future__ import annotations

import numpy as np
import tvm

from ..adapters.layout import AdapterLayout, layer_targets
from ..adapters.packed import PackedAdapter, pack_adapter
from ..adapters.weights import AdapterWeights
from ..config import Phi3Config
from ..errors import InputError


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
        self._slots = [_slots(pool) for pool in pools]

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
        self.write_packed(slot, pack_adapter(weights, self.layout.dtype))

    def write_packed(self, slot: int, adapter: PackedAdapter) -> None:
        """The same for what is packed in the pools' dtype, of at most max_rank."""
        self._ranks[slot] = 0  # until it is whole
        for i, key in enumerate(layer_targets(self._config)):
            places = self._slots[2 * i][slot], self._slots[2 * i + 1][slot]
            a, b = (np.zeros(place.shape, self.layout.dtype) for place in places)
            if key in adapter.pairs:
                own_a, own_b = adapter.pairs[key]
                rank = len(own_a)
                a[:rank], b[:, :rank] = own_a, own_b
            for place, values in zip(places, (a, b), strict=True):
                place.copyfrom(values)
        self._ranks[slot] = adapter.rank

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


def _slots(pool: tvm.runtime.Tensor) -> list[tvm.runtime.Tensor]:
    """Views of a pool `[max_loras, …]`, one for each slot."""
    shape = tuple(pool.shape[1:])
    size = int(np.prod(shape)) * np.dtype(pool.dtype).itemsize
    return [pool._create_view(shape, pool.dtype, i * size) for i in range(pool.shape[0])]
