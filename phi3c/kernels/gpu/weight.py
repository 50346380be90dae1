"""Reads weights (layout.py) inside a kernel, a few neighbouring input features of a row at a time.

A reader has `unit`, the number of features that it reads at once, and
- `read(W, D, at, row, u)`, an inline function: D[at … at + unit − 1] = the values of features
  u·unit … of a weight row, float32, short of a factor;
- `scale(W, row, u)`: that factor, a float32 expression.
W is a tuple of the weight's buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T

from ..layout import GROUP
from ..plain_weight import as_float32
from ..weight_format import GroupFormat, WeightFormat
from .layout import group_shapes

VECTOR = 4  # values that one load may fetch


@dataclass(frozen=True)
class WeightReader:
    """What the linears know of a weight `[out, in]`."""

    unit: int
    read: Callable
    scale: Callable


def weight_buffers(
    out_features: int, in_features: int, kind: WeightFormat
) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of a weight's buffers."""
    if isinstance(kind, GroupFormat):
        q_shape, scale_shape = group_shapes(out_features, in_features, kind.bits)
        return [(q_shape, "uint32"), (scale_shape, kind.scale_dtype)]
    return [((out_features, in_features), kind)]


def weight_reader(in_features: int, kind: WeightFormat) -> WeightReader:
    if isinstance(kind, GroupFormat):
        return _group_reader(kind)
    return _plain_reader(in_features, kind)


def _plain_reader(in_features: int, dtype: str) -> WeightReader:
    unit = VECTOR if in_features % VECTOR == 0 else 1

    @T.inline
    def read(W, D, at, row, u):
        stored = T.alloc_buffer((unit,), dtype, scope="local")
        for v in T.vectorized(unit):
            stored[v] = W[0][row, u * unit + v]
        for v in T.unroll(unit):
            D[at + v] = as_float32(stored[v], dtype)

    return WeightReader(unit, read, lambda W, row, u: T.float32(1))


def _group_reader(kind: GroupFormat) -> WeightReader:
    bits, unit = kind.bits, 4 if kind.bits == 8 else 8
    units = GROUP // unit  # of a group

    # (1 + q/2^bits) − (1 + zero/2^bits), where the first is q in the top bits of a mantissa: exact,
    # and GPUs convert integers at a fraction of the rate of logical operations.
    @T.inline
    def put(D, i, stored):
        mantissa = T.meta_var(T.shift_left(stored, T.uint32(23 - bits)))
        near_one = T.meta_var(T.bitwise_or(mantissa, T.uint32(0x3F800000)))
        D[i] = T.reinterpret("float32", near_one) - T.float32(1 + kind.zero / 2**bits)

    @T.inline
    def read(W, D, at, row, u):
        word = T.alloc_buffer((1,), "uint32", scope="local")
        word[0] = W[0][row, u // units, u % units]
        for v in T.unroll(unit):
            part = T.meta_var(T.shift_right(word[0], T.Cast("uint32", v * bits)))
            put(D, at + v, T.bitwise_and(part, T.uint32(2**bits - 1)))

    @T.inline
    def read_three_bits(W, D, at, row, u):
        word = T.alloc_buffer((2,), "uint32", scope="local")
        word[0] = T.shift_right(W[0][row, u // units, u % units // 2], T.Cast("uint32", u % 2 * 16))
        word[1] = T.shift_right(W[0][row, u // units, 2], T.Cast("uint32", u % units * 8))
        for v in T.unroll(unit):
            low = T.meta_var(T.shift_right(word[0], T.Cast("uint32", v * 2)))
            high = T.meta_var(T.shift_right(word[1], T.Cast("uint32", v)))
            value = T.meta_var(
                T.bitwise_or(
                    T.bitwise_and(low, T.uint32(3)),
                    T.shift_left(T.bitwise_and(high, T.uint32(1)), T.uint32(2)),
                )
            )
            put(D, at + v, value)

    def scale(W, row, u):
        return T.Cast("float32", W[1][row, u // units]) * T.float32(2**bits)

    return WeightReader(unit, read_three_bits if bits == 3 else read, scale)
