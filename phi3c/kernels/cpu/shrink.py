"""The first half of a LoRA adapter, h = A x: from the features of a row to its adapter's rank.

Every row has an adapter of its own (slot) and that adapter's rank, so a batch may mix them. A row
of rank 0 has none: nothing is read or written for it.
"""

import operator

from tvm.script import tirx as T

from ..layout import GROUP
from ..low_rank import LowRank
from ..root import hand_scheduled
from .isa import Isa, vector_lanes
from .parallel import SERIAL_ROWS
from .quantize import SCALE, WORDS, slot_of
from .reduce import folded

RANK_BLOCK = 8  # sums at a time, a vector each, which share the load of a row's features


def _products(lanes: int, step: int, steps: int, feature):
    """Returns the inline function `multiply(X, A, H, m, i, slot, rank)`: H[i, k] = A[slot, k] · x.

    k < rank, rounded up to whole blocks. feature(X, m, i, t, k): feature k of part t of row i of m
    in X, float32; a row has `steps` parts of `step` vectors.
    """
    added = folded(operator.add, lanes)

    @T.inline
    def multiply(X, A, H, m, i, slot, rank):
        for block in T.serial((rank + RANK_BLOCK - 1) // RANK_BLOCK):
            acc = T.alloc_buffer((RANK_BLOCK, lanes), "float32")
            for k in T.unroll(RANK_BLOCK):
                for v in T.vectorized(lanes):
                    acc[k, v] = T.float32(0)
            for t in T.serial(steps):
                for j in T.unroll(step):
                    x = T.alloc_buffer((lanes,), "float32")
                    for v in T.vectorized(lanes):
                        x[v] = feature(X, m, i, t, j * lanes + v)
                    for k in T.unroll(RANK_BLOCK):
                        for v in T.vectorized(lanes):
                            a = T.meta_var(
                                A[slot, block * RANK_BLOCK + k, (t * step + j) * lanes + v]
                            )
                            acc[k, v] += x[v] * T.Cast("float32", a)
            for k in T.unroll(RANK_BLOCK):
                total = T.alloc_buffer((lanes,), "float32")
                for v in T.vectorized(lanes):
                    total[v] = acc[k, v]
                added(total)
                H[i, block * RANK_BLOCK + k] = total[0]

    return multiply


def shrink(isa: Isa, in_features: int, low_rank: LowRank):
    """x `[n, in]` f32, a `[max_loras, max_rank, in]`, slot, rank `[n]` i32 → h `[n, max_rank]` f32.

    Of a row of h the first `rank` values are written (and zeros, to a whole block).
    """
    lanes = vector_lanes(isa, in_features)
    vectors = in_features // lanes
    step = next(d for d in (4, 2, 1) if vectors % d == 0)

    def feature(X, m, i, t, k):
        return X[i, t * (step * lanes) + k]

    multiply = _products(lanes, step, vectors // step, feature)

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, a: T.handle, slot: T.handle, rank: T.handle, h: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n, in_features), "float32")
        A = T.match_buffer(a, low_rank.a_shape(in_features), low_rank.dtype)
        S = T.match_buffer(slot, (n,), "int32")
        R = T.match_buffer(rank, (n,), "int32")
        H = T.match_buffer(h, (n, low_rank.max_rank), "float32")
        if n <= SERIAL_ROWS:
            for i in T.serial(n):
                multiply(X, A, H, n, i, S[i], R[i])
        else:
            for i in T.parallel(n):
                multiply(X, A, H, n, i, S[i], R[i])

    return hand_scheduled(func)


def int8_shrink(isa: Isa, in_features: int, low_rank: LowRank):
    """`shrink` of int8 rows x `[n, groups, 10]` i32 (quantize.py)."""
    groups = in_features // GROUP
    lanes = isa.lanes
    tile_rows = isa.int8_rows

    def feature(X, m, i, t, k):
        at = slot_of(m, tile_rows, groups, i, t)
        scale = T.reinterpret("float32", X[1][at, SCALE])
        return T.Cast("float32", X[0][at, k]) * scale

    multiply = _products(lanes, GROUP // lanes, groups, feature)

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, a: T.handle, slot: T.handle, rank: T.handle, h: T.handle):
        n = T.int64()
        Xs = T.match_buffer(x, (n, groups, WORDS), "int32")
        A = T.match_buffer(a, low_rank.a_shape(in_features), low_rank.dtype)
        S = T.match_buffer(slot, (n,), "int32")
        R = T.match_buffer(rank, (n,), "int32")
        H = T.match_buffer(h, (n, low_rank.max_rank), "float32")
        W = T.decl_buffer((n * groups, WORDS), "int32", data=Xs.data)
        O = T.decl_buffer((n * groups, 4 * WORDS), "int8", data=Xs.data)
        X = T.meta_var((O, W))
        if n <= SERIAL_ROWS:
            for i in T.serial(n):
                multiply(X, A, H, n, i, S[i], R[i])
        else:
            for i in T.parallel(n):
                multiply(X, A, H, n, i, S[i], R[i])

    return hand_scheduled(func)
