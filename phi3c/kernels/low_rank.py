"""The pools of LoRA adapters, as kernels are told of them (phi3c/adapters/layout.py fills them)."""

from dataclasses import dataclass

from .layout import PANEL


@dataclass(frozen=True)
class LowRank:
    """The pools of the adapters of one linear: max_loras slots of max_rank ranks, in `dtype`."""

    max_loras: int
    max_rank: int
    dtype: str

    def a_shape(self, in_features: int) -> tuple[int, ...]:
        return self.max_loras, self.max_rank, in_features

    def b_shape(self, out_features: int) -> tuple[int, ...]:
        return self.max_loras, -(-out_features // PANEL), self.max_rank, PANEL
