"""A model's weights with a LoRA adapter merged into them, some rows at a time."""

from __future__ import annotations

import numpy as np

from .adapters.weights import AdapterWeights
from .config import Phi3Config
from .quantization.group import GroupedRows
from .weights import Weights

_PATHS = {
    "qkv_proj": "self_attn.qkv_proj",
    "o_proj": "self_attn.o_proj",
    "gate_up_proj": "mlp.gate_up_proj",
    "down_proj": "mlp.down_proj",
}
_PIECE_ROWS = 16
_PIECE = 2**18  # products; OpenBLAS takes threads above this many


class MergedWeights(Weights):
    """W + B A of the linears that the adapter covers, in float32; the others' rows as they are.

    Rows that a source stores quantized become float32 where something is added to them, so that
    the scheme rounds them again; it takes over the blocks of the others as ever.
    """

    def __init__(self, base: Weights, config: Phi3Config, adapter: AdapterWeights):
        super().__init__(config)
        self._base = base
        self._low_rank = {
            f"model.layers.{layer}.{_PATHS[target]}.weight": low_rank
            for (layer, target), low_rank in adapter.low_rank.items()
        }

    def rows(self, name: str, start: int, stop: int) -> np.ndarray | GroupedRows:
        rows = self._base.rows(name, start, stop)
        low_rank = self._low_rank.get(name)
        if low_rank is None:
            return rows
        values = rows.values() if isinstance(rows, GroupedRows) else rows.astype(np.float32)
        _add_product(values, low_rank.b[start:stop], low_rank.a)
        return values


def _add_product(values: np.ndarray, b: np.ndarray, a: np.ndarray) -> None:
    """values `[rows, in]` += b `[rows, r]` a `[r, in]`, in pieces too small for BLAS's threads.

    Those would wait for each other beside packing's own: 100 times as long on a busy machine.
    """
    width = max(1, _PIECE // (_PIECE_ROWS * len(a)))
    for row in range(0, len(values), _PIECE_ROWS):
        rows = slice(row, row + _PIECE_ROWS)
        for column in range(0, values.shape[1], width):
            columns = slice(column, column + width)
            values[rows, columns] += b[rows] @ a[:, columns]
