"""The second half of a LoRA adapter, y += B h: from an adapter's rank to the columns of a linear.

B lies in panels of sixteen columns (`[max_loras, ceil(out/16), max_rank, 16]`), as the weights of
linears do, so a linear's task can add the adapters to the columns that it has computed.
"""

from collections.abc import Callable

from tvm.script import tirx as T

from ..layout import PANEL
from ..low_rank import LowRank
from ..root import hand_scheduled

_SIDE = 4  # panels of a task, as in int8_linear.py


def expansion(side: int, stride: int, place: Callable):
    """Returns the inline function `expand(H, B, F, p, r, row, slot, rank)`.

    F[r, 16·j + v] += Σ B[slot, p · stride + place(j), k, v] · H[row, k], k < rank, j < side.
    """

    @T.inline
    def expand(H, B, F, p, r, row, slot, rank):
        acc = T.alloc_buffer((side * PANEL,), "float32")
        for j in T.unroll(side):
            acc[T.ramp(j * PANEL, 1, PANEL)] = F[r, T.ramp(j * PANEL, 1, PANEL)]
        for k in T.serial(rank):
            for j in T.unroll(side):
                b = T.meta_var(B[slot, p * stride + place(j), k, T.ramp(0, 1, PANEL)])
                acc[T.ramp(j * PANEL, 1, PANEL)] += T.broadcast(H[row, k], PANEL) * T.Cast(
                    f"float32x{PANEL}", b
                )
        for j in T.unroll(side):
            F[r, T.ramp(j * PANEL, 1, PANEL)] = acc[T.ramp(j * PANEL, 1, PANEL)]

    return expand


def expand(out_features: int, low_rank: LowRank):
    """h `[n, max_rank]` f32, b `[max_loras, panels, max_rank, 16]`, slot, rank `[n]` i32,
    y `[n, out]` f32 (updated in place).
    """
    n_panels = -(-out_features // PANEL)
    side = next(d for d in (_SIDE, 3, 2, 1) if n_panels % d == 0)
    tail = out_features % PANEL
    add = expansion(side, side, lambda j: j)

    @T.inline
    def store(F, Y, row, j, col):
        if col + PANEL <= out_features:
            for v in T.vectorized(PANEL):
                Y[row, col + v] += F[0, j * PANEL + v]
        else:
            for v in T.serial(tail):
                Y[row, col + v] += F[0, j * PANEL + v]

    @T.prim_func(private=True, s_tir=True)
    def func(h: T.handle, b: T.handle, slot: T.handle, rank: T.handle, y: T.handle):
        n = T.int64()
        H = T.match_buffer(h, (n, low_rank.max_rank), "float32")
        B = T.match_buffer(b, low_rank.b_shape(out_features), low_rank.dtype)
        S = T.match_buffer(slot, (n,), "int32")
        R = T.match_buffer(rank, (n,), "int32")
        Y = T.match_buffer(y, (n, out_features), "float32")
        for p in T.parallel(n_panels // side):
            F = T.alloc_buffer((1, side * PANEL), "float32")
            for i in T.serial(n):
                if R[i] > 0:
                    for v in T.vectorized(side * PANEL):
                        F[0, v] = T.float32(0)
                    add(H, B, F, p, 0, i, S[i], R[i])
                    for j in T.unroll(side):
                        store(F, Y, i, j, (p * side + j) * PANEL)

    return hand_scheduled(func)
