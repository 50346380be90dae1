"""Which LoRA adapter each row of a forward has, and the pools that hold the adapters, as tensors.

Legend: n = rows, S = max_loras, R = max_rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.relax.frontend import nn

from ..adapters.layout import TARGETS, AdapterLayout
from ..config import Phi3Config

Tensor = nn.Tensor


@dataclass(frozen=True)
class LinearAdapters:
    """What one linear needs of them."""

    slot: Tensor  # [n] int32, −1: the base model
    rank: Tensor  # [n] int32, 0: the base model
    a: Tensor  # [S, R, in]
    b: Tensor  # [S, ceil(out/16), R, 16]


@dataclass(frozen=True)
class LayerAdapters:
    """What one layer needs of them; pools: A and B of each target, in order."""

    slot: Tensor
    rank: Tensor
    pools: Sequence[Tensor]

    def of(self, target: str) -> LinearAdapters:
        first = 2 * TARGETS.index(target)
        return LinearAdapters(self.slot, self.rank, *self.pools[first : first + 2])

    def rows(self, asked: Callable[[Tensor], Tensor]) -> LayerAdapters:
        """For the rows that are asked for."""

        def entries(x: Tensor) -> Tensor:  # [n] → [b]
            taken = asked(nn.op.reshape(x, (x.shape[0], 1)))
            return nn.op.reshape(taken, (taken.shape[0],))

        return LayerAdapters(entries(self.slot), entries(self.rank), self.pools)


@dataclass(frozen=True)
class AdapterInputs:
    """What a forward gets: pools as in AdapterLayout.pool_shapes."""

    slot: Tensor
    rank: Tensor
    pools: Sequence[Tensor]

    def layer(self, i: int) -> LayerAdapters:
        own = 2 * len(TARGETS)
        return LayerAdapters(self.slot, self.rank, self.pools[i * own : (i + 1) * own])


def row_specs(n: int | str) -> list[tuple[str, nn.spec.Tensor]]:
    """(name, spec) of slot and rank, for n rows."""
    return [(name, nn.spec.Tensor([n], "int32")) for name in ("adapter_slot", "adapter_rank")]


def pools_spec(layout: AdapterLayout, config: Phi3Config) -> nn.spec.Tuple:
    specs = [nn.spec.Tensor(shape, layout.dtype) for shape in layout.pool_shapes(config)]
    return nn.spec.Tuple("adapters", specs)
