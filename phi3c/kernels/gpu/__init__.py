"""The GPU kernels, as the model asks for them: one set for CUDA, Metal and Vulkan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from tvm import tirx

from ..layout import KV_BLOCK
from ..low_rank import LowRank
from ..weight_format import WeightFormat
from . import layout
from .activation import silu_mul
from .copy import copy_slots
from .decode_attention import decode_attention
from .embedding import embedding, last_row, take_rows
from .expand import expand
from .limits import GpuLimits, MatrixUnits
from .linear import linear
from .maxima import block_maxima
from .norm import rms_norm
from .prefill_attention import prefill_attention
from .rope import rope_append, rope_table
from .shrink import shrink


@dataclass(frozen=True)
class GpuKernels:
    """Builds PrimFuncs; activations are `dtype` between kernels, sums float32 inside them."""

    dtype: str
    limits: GpuLimits = GpuLimits()
    matrix: MatrixUnits = "none"

    weight_layout = "gpu"  # layout.py
    kv_block = KV_BLOCK
    in_host_memory = False  # what they write
    norms_in_linears = gates_in_linears = True  # where no adapters read what comes between

    @property
    def activation_dtype(self) -> str:
        return self.dtype

    def with_activations(self, dtype: str) -> GpuKernels:
        return replace(self, dtype=dtype)

    def weight_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of a linear's (or the embedding's) weight as the kernels read it."""
        return out_features, in_features

    def pack_weight(self, weight: np.ndarray) -> np.ndarray:
        """`[out, in]` → the array of `weight_shape`."""
        return np.ascontiguousarray(weight)

    def group_shapes(
        self, out_features: int, in_features: int, bits: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a group-quantized weight as the kernels read it: q (uint32), scale."""
        return layout.group_shapes(out_features, in_features, bits)

    def pack_groups(
        self, q: np.ndarray, scale: np.ndarray, bits: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """q `[out, in]` uint8, scale `[out, groups]` → the arrays of `group_shapes`."""
        return layout.pack_groups(q, bits), np.ascontiguousarray(scale)

    @cache  # noqa: B019 (frozen and few: one per compile)
    def embedding(self, vocab_size: int, hidden_size: int, kind: WeightFormat) -> tirx.PrimFunc:
        return embedding(self.limits, vocab_size, hidden_size, kind, self.dtype)

    @cache  # noqa: B019
    def take_rows(self, features: int, dtype: str | None = None) -> tirx.PrimFunc:
        return take_rows(self.limits, features, dtype or self.dtype)

    @cache  # noqa: B019
    def last_row(self, features: int, dtype: str | None = None) -> tirx.PrimFunc:
        return last_row(self.limits, features, dtype or self.dtype)

    @cache  # noqa: B019
    def linear(
        self,
        out_features: int,
        in_features: int,
        kind: WeightFormat,
        residual: bool,
        out_dtype: str | None = None,
        eps: float | None = None,
    ) -> tirx.PrimFunc:
        """eps: of the norm of what it reads, if it is to be normalised."""
        form = (self.limits, self.matrix, out_features, in_features, kind, residual)
        return linear(*form, self.dtype, out_dtype or self.dtype, eps=eps)

    @cache  # noqa: B019
    def gated_linear(
        self, features: int, in_features: int, kind: WeightFormat, eps: float | None = None
    ) -> tirx.PrimFunc:
        form = (self.limits, self.matrix, features, in_features, kind, False)
        return linear(*form, self.dtype, self.dtype, gated=True, eps=eps)

    @cache  # noqa: B019
    def shrink(self, in_features: int, low_rank: LowRank) -> tirx.PrimFunc:
        return shrink(self.limits, in_features, low_rank, self.dtype)

    @cache  # noqa: B019
    def expand(self, out_features: int, low_rank: LowRank) -> tirx.PrimFunc:
        return expand(self.limits, out_features, low_rank, self.dtype)

    @cache  # noqa: B019
    def rms_norm(self, hidden_size: int, eps: float) -> tirx.PrimFunc:
        return rms_norm(self.limits, hidden_size, eps, self.dtype)

    @cache  # noqa: B019
    def silu_mul(self, intermediate_size: int) -> tirx.PrimFunc:
        return silu_mul(self.limits, intermediate_size, self.dtype)

    @cache  # noqa: B019
    def rope_table(self, rotary_dim: int, attention_factor: float) -> tirx.PrimFunc:
        return rope_table(self.limits, rotary_dim, attention_factor)

    @cache  # noqa: B019
    def rope_append(
        self, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, kv_dtype: str
    ) -> tirx.PrimFunc:
        shape = (heads, kv_heads, head_dim, rotary_dim)
        return rope_append(self.limits, *shape, kv_dtype, self.dtype)

    @cache  # noqa: B019
    def decode_attention(
        self, heads: int, kv_heads: int, head_dim: int, kv_dtype: str, window: int | None
    ) -> tirx.PrimFunc:
        shape = (heads, kv_heads, head_dim, kv_dtype, window)
        return decode_attention(self.limits, self.matrix, self.dtype, *shape)

    @cache  # noqa: B019
    def prefill_attention(
        self, heads: int, kv_heads: int, head_dim: int, kv_dtype: str, window: int | None
    ) -> tirx.PrimFunc:
        shape = (heads, kv_heads, head_dim, kv_dtype, window)
        return prefill_attention(self.limits, self.matrix, self.dtype, *shape)

    @cache  # noqa: B019
    def copy_slots(self, kv_heads: int, head_dim: int, kv_dtype: str) -> tirx.PrimFunc:
        return copy_slots(self.limits, kv_heads, head_dim, kv_dtype)

    @cache  # noqa: B019
    def block_maxima(self, vocab_size: int, blocks: int) -> tirx.PrimFunc:
        return block_maxima(self.limits, vocab_size, blocks)
