"""y = x Wᵀ with int8 activations over group-quantized weight panels.

A linear with adapters adds their B h (expand.py) to a task's sums before it stores them: rows
without one have the same bits as in the linear without adapters.
"""

from tvm.script import tirx as T

from ..layout import PANEL
from ..low_rank import LowRank
from ..root import hand_scheduled
from .expand import expansion
from .int8_dot import Dot
from .int8_sums import ROW_BLOCK, task_sums
from .layout import group_shapes
from .quantize import WORDS


def int8_linear(
    dot: Dot,
    tile_rows: int,
    out_features: int,
    in_features: int,
    bits: int,
    scale_dtype: str,
    residual: bool,
    low_rank: LowRank | None = None,
):
    """a `[m, groups, 10]` i32 (quantize.py), q, scale (layout.group_shapes),
    (residual `[m, out]` f32), (h `[m, max_rank]` f32, b `[max_loras, panels, max_rank, 16]`,
    slot, rank `[m]` i32) → `[m, out]` f32.
    """
    q_shape, scale_shape = group_shapes(out_features, in_features, bits)
    n_panels, n_groups = q_shape[:2]
    side = next(d for d in (4, 3, 2, 1) if n_panels % d == 0)  # panels of a parallel task
    row_block = ROW_BLOCK // tile_rows * tile_rows
    tail = out_features % PANEL
    adapted = low_rank is not None
    sums = task_sums(dot, tile_rows, n_groups, bits, side, side, lambda j: j)
    expand = expansion(side, side, lambda j: j)

    @T.inline
    def store(F, R, O, at, j, row, col):
        if col + PANEL <= out_features:
            for v in T.vectorized(PANEL):
                if residual:
                    O[row, col + v] = F[at, j * PANEL + v] + R[row, col + v]
                else:
                    O[row, col + v] = F[at, j * PANEL + v]
        else:
            for v in T.serial(tail):
                if residual:
                    O[row, col + v] = F[at, j * PANEL + v] + R[row, col + v]
                else:
                    O[row, col + v] = F[at, j * PANEL + v]

    @T.inline
    def body(rows, W, S, R, H, B, slot, rank, O, m):
        A = T.decl_buffer((m * n_groups, WORDS), "int32", data=rows.data)
        LW = T.decl_buffer((n_panels * n_groups, bits, PANEL), "uint32", data=W.data)
        LS = T.decl_buffer((n_panels * n_groups, PANEL), scale_dtype, data=S.data)
        for p in T.parallel(n_panels // side):
            F = T.alloc_buffer((row_block, side * PANEL), "float32")
            for block in T.serial((m + row_block - 1) // row_block):
                start: T.let = block * row_block
                count: T.let = T.min(m - start, row_block)
                sums(A, W, S, LW, LS, F, p, start, count)
                for r in T.serial(count):
                    if adapted:
                        expand(H, B, F, p, r, start + r, slot[start + r], rank[start + r])
                    for j in T.unroll(side):
                        store(F, R, O, r, j, start + r, (p * side + j) * PANEL)

    if residual and adapted:

        @T.prim_func(private=True, s_tir=True)
        def with_both(
            a: T.handle,
            q: T.handle,
            scale: T.handle,
            res: T.handle,
            h: T.handle,
            b: T.handle,
            slot: T.handle,
            rank: T.handle,
            out: T.handle,
        ):
            m = T.int64()
            A = T.match_buffer(a, (m, n_groups, WORDS), "int32")
            W = T.match_buffer(q, q_shape, "uint32")
            S = T.match_buffer(scale, scale_shape, scale_dtype)
            R = T.match_buffer(res, (m, out_features), "float32")
            H = T.match_buffer(h, (m, low_rank.max_rank), "float32")
            B = T.match_buffer(b, low_rank.b_shape(out_features), low_rank.dtype)
            Slot = T.match_buffer(slot, (m,), "int32")
            Rank = T.match_buffer(rank, (m,), "int32")
            O = T.match_buffer(out, (m, out_features), "float32")
            body(A, W, S, R, H, B, Slot, Rank, O, m)

        return hand_scheduled(with_both)

    if adapted:

        @T.prim_func(private=True, s_tir=True)
        def with_adapters(
            a: T.handle,
            q: T.handle,
            scale: T.handle,
            h: T.handle,
            b: T.handle,
            slot: T.handle,
            rank: T.handle,
            out: T.handle,
        ):
            m = T.int64()
            A = T.match_buffer(a, (m, n_groups, WORDS), "int32")
            W = T.match_buffer(q, q_shape, "uint32")
            S = T.match_buffer(scale, scale_shape, scale_dtype)
            H = T.match_buffer(h, (m, low_rank.max_rank), "float32")
            B = T.match_buffer(b, low_rank.b_shape(out_features), low_rank.dtype)
            Slot = T.match_buffer(slot, (m,), "int32")
            Rank = T.match_buffer(rank, (m,), "int32")
            O = T.match_buffer(out, (m, out_features), "float32")
            body(A, W, S, None, H, B, Slot, Rank, O, m)

        return hand_scheduled(with_adapters)

    if residual:

        @T.prim_func(private=True, s_tir=True)
        def with_residual(
            a: T.handle,
            q: T.handle,
            scale: T.handle,
            res: T.handle,
            out: T.handle,
        ):
            m = T.int64()
            A = T.match_buffer(a, (m, n_groups, WORDS), "int32")
            W = T.match_buffer(q, q_shape, "uint32")
            S = T.match_buffer(scale, scale_shape, scale_dtype)
            R = T.match_buffer(res, (m, out_features), "float32")
            O = T.match_buffer(out, (m, out_features), "float32")
            body(A, W, S, R, None, None, None, None, O, m)

        return hand_scheduled(with_residual)

    @T.prim_func(private=True, s_tir=True)
    def plain(
        a: T.handle,
        q: T.handle,
        scale: T.handle,
        out: T.handle,
    ):
        m = T.int64()
        A = T.match_buffer(a, (m, n_groups, WORDS), "int32")
        W = T.match_buffer(q, q_shape, "uint32")
        S = T.match_buffer(scale, scale_shape, scale_dtype)
        O = T.match_buffer(out, (m, out_features), "float32")
        body(A, W, S, None, None, None, None, None, O, m)

    return hand_scheduled(plain)
