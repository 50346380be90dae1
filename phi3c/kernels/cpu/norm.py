"""RMSNorm in float32 (Zhang & Sennrich 2019; config field rms_norm_eps)."""

import operator

from tvm.script import tirx as T

from ..layout import GROUP
from ..root import hand_scheduled
from .isa import Isa, vector_lanes
from .parallel import SERIAL_ROWS
from .quantize import WORDS, quantized_group, slot_of
from .reduce import folded


def _inverse_rms(isa: Isa, hidden_size: int, eps: float):
    """Returns the inline function `inverse(X, R, i)`: R[0] = 1 / sqrt(mean(X[i]²) + eps)."""
    lanes = vector_lanes(isa, hidden_size)
    added = folded(operator.add, lanes)

    @T.inline
    def inverse(X, R, i):
        squares = T.alloc_buffer((lanes,), "float32")
        for v in T.vectorized(lanes):
            squares[v] = T.float32(0)
        for k in T.serial(hidden_size // lanes):
            for v in T.vectorized(lanes):
                squares[v] += X[i, k * lanes + v] * X[i, k * lanes + v]
        added(squares)
        R[0] = T.float32(1) / T.sqrt(squares[0] * T.float32(1 / hidden_size) + T.float32(eps))

    return inverse


def rms_norm(isa: Isa, hidden_size: int, eps: float):
    """x `[n, hidden]` f32, weight `[hidden]` f32 → x / sqrt(mean(x²) + eps) · weight, f32."""
    lanes = vector_lanes(isa, hidden_size)
    inverse = _inverse_rms(isa, hidden_size, eps)

    @T.inline
    def norm_row(X, W, O, i):
        R = T.alloc_buffer((1,), "float32")
        inverse(X, R, i)
        for k in T.serial(hidden_size // lanes):
            for v in T.vectorized(lanes):
                O[i, k * lanes + v] = X[i, k * lanes + v] * R[0] * W[k * lanes + v]

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, weight: T.handle, out: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n, hidden_size), "float32")
        W = T.match_buffer(weight, (hidden_size,), "float32")
        O = T.match_buffer(out, (n, hidden_size), "float32")
        if n <= SERIAL_ROWS:
            for i in T.serial(n):
                norm_row(X, W, O, i)
        else:
            for i in T.parallel(n):
                norm_row(X, W, O, i)

    return hand_scheduled(func)


def rms_norm_quantize(isa: Isa, hidden_size: int, eps: float, zero: int):
    """x `[n, hidden]` f32, weight `[hidden]` f32 → the norm's rows in int8 (quantize.py)."""
    groups = hidden_size // GROUP
    inverse = _inverse_rms(isa, hidden_size, eps)
    put = quantized_group(isa, zero)
    tile_rows = isa.int8_rows

    @T.inline
    def norm_row(X, W, A, n, i):
        R = T.alloc_buffer((1,), "float32")
        inverse(X, R, i)
        for g in T.serial(groups):
            V = T.alloc_buffer((GROUP,), "float32")
            for v in T.vectorized(GROUP):
                V[v] = X[i, g * GROUP + v] * R[0] * W[g * GROUP + v]
            put(V, A, slot_of(n, tile_rows, groups, i, g))

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, weight: T.handle, a: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n, hidden_size), "float32")
        W = T.match_buffer(weight, (hidden_size,), "float32")
        As = T.match_buffer(a, (n, groups, WORDS), "int32")
        A = T.decl_buffer((n * groups, WORDS), "int32", data=As.data)
        if n <= SERIAL_ROWS:
            for i in T.serial(n):
                norm_row(X, W, A, n, i)
        else:
            for i in T.parallel(n):
                norm_row(X, W, A, n, i)

    return hand_scheduled(func)
