"""Activations to int8, a scale for each group of 32, in the order in which int8 linears read them.

Rows lie in tiles, the last one of what rows are left, and in a tile group by group: what a tile of
rows needs of a group is contiguous, whatever the number of features. One row lies as it is.

A group is ten 32-bit words: eight of four int8 each, low byte first; the bits of the float32 scale;
the offset −zero · Σa, which is what Σqa lacks to be Σ(q − zero)a.
"""

import operator

import numpy as np
from tvm.script import tirx as T

from ..layout import GROUP
from ..root import hand_scheduled
from .isa import Isa
from .parallel import SERIAL_ROWS
from .reduce import folded

OCTETS = GROUP // 4  # words of int8
SCALE, OFFSET = OCTETS, OCTETS + 1
WORDS = OCTETS + 2
_TINY_BITS = int(np.float32(1e-30).view(np.int32))  # a group of zeros has this scale, not 0


def slot(first, rows, groups: int, group, row):
    """Place of a group of row first + `row`, in the tile of `rows` rows that begins at `first`."""
    return first * groups + group * rows + row


def slot_of(m, tile_rows: int, groups: int, row, group):
    """The same, of any row of m."""
    first = row // tile_rows * tile_rows
    return slot(first, T.min(m - first, tile_rows), groups, group, row - first)


def quantized_group(isa: Isa, zero: int):
    """Returns the inline function `put(V, A, at)`: V `[32]` f32 → A[at] `[10]` i32 (see above).

    x ≈ scale · a, a = round(x / scale), scale = max|x| / 127 of the group. The largest is found
    among the bits, as integers: NaN is the largest there, so that it stays NaN in the scale.
    """
    lanes = min(isa.lanes, 16)
    largest, added = folded(T.max, lanes), folded(operator.add, lanes)

    @T.inline
    def put(V, A, at):
        top = T.alloc_buffer((lanes,), "int32")
        total = T.alloc_buffer((lanes,), "int32")
        octets = T.alloc_buffer((GROUP,), "int8")
        for v in T.vectorized(lanes):
            top[v] = _TINY_BITS
            total[v] = 0
        for j in T.unroll(GROUP // lanes):
            for v in T.vectorized(lanes):
                bits = T.meta_var(T.reinterpret("int32", V[j * lanes + v]))
                top[v] = T.max(top[v], T.bitwise_and(bits, T.int32(0x7FFFFFFF)))
        largest(top)
        most: T.let = T.reinterpret("float32", top[0])
        inverse: T.let = T.float32(127) / most
        for j in T.unroll(GROUP // lanes):
            for v in T.vectorized(lanes):
                rounded = T.meta_var(T.Cast("int32", T.nearbyint(V[j * lanes + v] * inverse)))
                total[v] += rounded
                octets[j * lanes + v] = T.Cast("int8", rounded)
        A[at, T.ramp(0, 1, OCTETS)] = T.reinterpret(f"int32x{OCTETS}", octets[T.ramp(0, 1, GROUP)])
        A[at, SCALE] = T.reinterpret("int32", most * T.float32(1 / 127))
        added(total)
        A[at, OFFSET] = total[0] * -zero

    return put


def quantize_rows(isa: Isa, features: int, zero: int):
    """x `[m, features]` f32 → `[m, groups, 10]` i32, in the order of `slot`."""
    groups = features // GROUP
    tile_rows = isa.int8_rows
    put = quantized_group(isa, zero)

    @T.inline
    def row(X, A, m, i):
        for g in T.serial(groups):
            V = T.alloc_buffer((GROUP,), "float32")
            for v in T.vectorized(GROUP):
                V[v] = X[i, g * GROUP + v]
            put(V, A, slot_of(m, tile_rows, groups, i, g))

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, a: T.handle):
        m = T.int64()
        X = T.match_buffer(x, (m, features), "float32")
        As = T.match_buffer(a, (m, groups, WORDS), "int32")
        A = T.decl_buffer((m * groups, WORDS), "int32", data=As.data)
        if m <= SERIAL_ROWS:
            for i in T.serial(m):
                row(X, A, m, i)
        else:
            for i in T.parallel(m):
                row(X, A, m, i)

    return hand_scheduled(func)
