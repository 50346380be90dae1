"""Activations to int8, a scale for each group of 32, in the order in which int8 linears read them.

Rows lie in tiles, the last one of what rows are left, and in a tile group by group: what a tile of
rows needs of a group is contiguous, whatever the number of features. One row lies as it is.
"""

from tvm.script import tirx as T

from ..root import hand_scheduled
from .layout import GROUP
from .parallel import SERIAL_ROWS

_EIGHT = 8  # int32 words of four int8 in a group


def slot(first, rows, groups: int, group, row):
    """Place of a group of row first + `row`, in the tile of `rows` rows that begins at `first`."""
    return first * groups + group * rows + row


def quantize_rows(features: int, zero: int, tile_rows: int):
    """x `[m, features]` f32 → a `[m, groups, 8]` int32 (four int8 each, low byte first),
    scale `[m, groups]` f32, offset `[m, groups]` int32, all in the order of `slot`.

    x ≈ scale · a, a = round(x / scale), scale = max|x| / 127 of the group. `offset` is −zero · Σa:
    what Σqa lacks to be Σ(q − zero)a.
    """
    groups = features // GROUP

    @T.inline
    def group(X, A, S, Z, i, g, at):
        top = T.alloc_buffer((8,), "float32")
        best = T.alloc_buffer((1,), "float32")
        total = T.alloc_buffer((8,), "int32")
        octets = T.alloc_buffer((GROUP,), "int8")
        summed = T.alloc_buffer((1,), "int32")
        for v in T.vectorized(8):
            top[v] = T.float32(1e-30)
        for j in T.unroll(GROUP // 8):
            for v in T.vectorized(8):
                top[v] = T.max(top[v], T.abs(X[i, g * GROUP + j * 8 + v]))
        best[0] = top[0]
        for v in T.unroll(7):
            best[0] = T.max(best[0], top[v + 1])
        S[at] = best[0] * T.float32(1 / 127)
        inverse: T.let = T.float32(127) / best[0]
        for v in T.vectorized(8):
            total[v] = 0
        for j in T.unroll(GROUP // 8):
            for v in T.vectorized(8):
                rounded = T.meta_var(
                    T.Cast("int32", T.nearbyint(X[i, g * GROUP + j * 8 + v] * inverse))
                )
                total[v] += rounded
                octets[j * 8 + v] = T.Cast("int8", rounded)
        summed[0] = 0
        for v in T.unroll(8):
            summed[0] += total[v]
        Z[at] = summed[0] * -zero
        A[at, T.ramp(0, 1, _EIGHT)] = T.reinterpret(f"int32x{_EIGHT}", octets[T.ramp(0, 1, GROUP)])

    @T.inline
    def row(X, A, S, Z, m, i):
        first: T.let = i // tile_rows * tile_rows
        rows: T.let = T.min(m - first, tile_rows)
        for g in T.serial(groups):
            at: T.let = slot(first, rows, groups, g, i - first)
            group(X, A, S, Z, i, g, at)

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, a: T.handle, scale: T.handle, offset: T.handle):
        m = T.int64()
        X = T.match_buffer(x, (m, features), "float32")
        As = T.match_buffer(a, (m, groups, _EIGHT), "int32")
        Ss = T.match_buffer(scale, (m, groups), "float32")
        Zs = T.match_buffer(offset, (m, groups), "int32")
        A = T.decl_buffer((m * groups, _EIGHT), "int32", data=As.data)
        S = T.decl_buffer((m * groups,), "float32", data=Ss.data)
        Z = T.decl_buffer((m * groups,), "int32", data=Zs.data)
        if m <= SERIAL_ROWS:
            for i in T.serial(m):
                row(X, A, S, Z, m, i)
        else:
            for i in T.parallel(m):
                row(X, A, S, Z, m, i)

    return hand_scheduled(func)
