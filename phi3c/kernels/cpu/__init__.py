"""The CPU kernels of one instruction set, as the model asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from tvm import tirx

from ..layout import KV_BLOCK
from ..low_rank import LowRank
from ..weight_format import GroupFormat, WeightFormat
from . import layout
from .activation import silu_mul
from .copy import copy_slots
from .decode_attention import decode_attention
from .embedding import embedding, last_row, take_rows
from .expand import expand
from .group_linear import group_embedding, group_linear
from .int8_gated import int8_gated
from .int8_linear import int8_linear
from .isa import Isa
from .linear import linear
from .norm import rms_norm, rms_norm_quantize
from .prefill_attention import prefill_attention
from .quantize import WORDS, quantize_rows
from .rope import rope_append, rope_table
from .shrink import int8_shrink, shrink


@dataclass(frozen=True)
class CpuKernels:
    """Builds PrimFuncs for an instruction set; activations are float32 between kernels."""

    isa: Isa

    activation_dtype = "float32"
    weight_layout = "cpu"  # layout.py, the same for every instruction set
    kv_block = KV_BLOCK
    in_host_memory = True  # what they write
    norms_in_linears = gates_in_linears = False  # but by int8_gated
    int8_words = WORDS  # 32-bit words of a group of int8 activations

    def with_activations(self, dtype: str) -> CpuKernels:
        """The same: a GPU's kernels have the activations of a scheme."""
        return self

    def weight_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of a linear's (or the embedding's) weight as the kernels read it."""
        return layout.panel_shape(out_features, in_features)

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        """`[out, in]` → the array of `weight_shape`."""
        return layout.pack_panels(weight)

    def group_shapes(
        self, out_features: int, in_features: int, bits: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a group-quantized weight as the kernels read it: q (uint32), scale."""
        return layout.group_shapes(out_features, in_features, bits)

    def pack_groups(
        self, q: np.ndarray, scale: np.ndarray, bits: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """q `[out, in]` uint8, scale `[out, groups]` → the arrays of `group_shapes`."""
        return layout.pack_groups(q, bits), layout.pack_scales(scale)

    @cache  # noqa: B019 (frozen and few: one per compile)
    def embedding(self, vocab_size: int, hidden_size: int, kind: WeightFormat) -> tirx.PrimFunc:
        if isinstance(kind, GroupFormat):
            form = (kind.bits, kind.zero, kind.scale_dtype)
            return group_embedding(vocab_size, hidden_size, *form)
        return embedding(vocab_size, hidden_size, kind)

    @cache  # noqa: B019
    def take_rows(self, features: int, dtype: str = "float32") -> tirx.PrimFunc:
        return take_rows(features, dtype)

    @cache  # noqa: B019
    def last_row(self, features: int, dtype: str = "float32") -> tirx.PrimFunc:
        return last_row(features, dtype)

    @cache  # noqa: B019
    def linear(
        self,
        out_features: int,
        in_features: int,
        kind: WeightFormat,
        residual: bool,
        out_dtype: str = "float32",
    ) -> tirx.PrimFunc:
        assert out_dtype == self.activation_dtype, out_dtype
        if isinstance(kind, GroupFormat):
            form = (kind.bits, kind.zero, kind.scale_dtype)
            return group_linear(self.isa, out_features, in_features, *form, residual)
        return linear(self.isa, out_features, in_features, kind, residual)

    @cache  # noqa: B019
    def quantize_rows(self, features: int, zero: int) -> tirx.PrimFunc:
        return quantize_rows(self.isa, features, zero)

    @cache  # noqa: B019
    def int8_linear(
        self,
        out_features: int,
        in_features: int,
        kind: GroupFormat,
        residual: bool,
        low_rank: LowRank | None = None,
    ) -> tirx.PrimFunc:
        dot = self.isa.dot.for_bits(kind.bits)
        shape = (out_features, in_features, kind.bits, kind.scale_dtype)
        return int8_linear(dot, self.isa.int8_rows, *shape, residual, low_rank)

    @cache  # noqa: B019
    def int8_gated(
        self,
        intermediate_size: int,
        in_features: int,
        kind: GroupFormat,
        zero: int,
        low_rank: LowRank | None = None,
    ) -> tirx.PrimFunc:
        form = (kind.bits, kind.scale_dtype)
        return int8_gated(self.isa, intermediate_size, in_features, *form, zero, low_rank)

    @cache  # noqa: B019
    def shrink(self, in_features: int, low_rank: LowRank) -> tirx.PrimFunc:
        return shrink(self.isa, in_features, low_rank)

    @cache  # noqa: B019
    def int8_shrink(self, in_features: int, low_rank: LowRank) -> tirx.PrimFunc:
        return int8_shrink(self.isa, in_features, low_rank)

    @cache  # noqa: B019
    def expand(self, out_features: int, low_rank: LowRank) -> tirx.PrimFunc:
        return expand(out_features, low_rank)

    @cache  # noqa: B019
    def rms_norm(self, hidden_size: int, eps: float) -> tirx.PrimFunc:
        return rms_norm(self.isa, hidden_size, eps)

    @cache  # noqa: B019
    def rms_norm_quantize(self, hidden_size: int, eps: float, zero: int) -> tirx.PrimFunc:
        return rms_norm_quantize(self.isa, hidden_size, eps, zero)

    @cache  # noqa: B019
    def silu_mul(self, intermediate_size: int) -> tirx.PrimFunc:
        return silu_mul(self.isa, intermediate_size)

    @cache  # noqa: B019
    def rope_table(self, rotary_dim: int, attention_factor: float) -> tirx.PrimFunc:
        return rope_table(rotary_dim, attention_factor)

    @cache  # noqa: B019
    def rope_append(
        self, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, kv_dtype: str
    ) -> tirx.PrimFunc:
        return rope_append(self.isa, heads, kv_heads, head_dim, rotary_dim, kv_dtype)

    @cache  # noqa: B019
    def decode_attention(
        self, heads: int, kv_heads: int, head_dim: int, kv_dtype: str, window: int | None
    ) -> tirx.PrimFunc:
        return decode_attention(self.isa, heads, kv_heads, head_dim, kv_dtype, window)

    @cache  # noqa: B019
    def prefill_attention(
        self, heads: int, kv_heads: int, head_dim: int, kv_dtype: str, window: int | None
    ) -> tirx.PrimFunc:
        return prefill_attention(self.isa, heads, kv_heads, head_dim, kv_dtype, window)

    @cache  # noqa: B019
    def copy_slots(self, kv_heads: int, head_dim: int, kv_dtype: str) -> tirx.PrimFunc:
        return copy_slots(kv_heads, head_dim, kv_dtype)
