"""y = x Wᵀ with int8 activations over group-quantized weight panels."""

from tvm.script import tirx as T

from ..root import hand_scheduled
from .int8_dot import Dot
from .int8_sums import ROW_BLOCK, task_sums
from .layout import PANEL, group_shapes
from .quantize import WORDS


def int8_linear(
    dot: Dot,
    tile_rows: int,
    out_features: int,
    in_features: int,
    bits: int,
    scale_dtype: str,
    residual: bool,
):
    """a `[m, groups, 10]` i32 (quantize.py), q, scale (layout.group_shapes),
    (residual `[m, out]` f32) → `[m, out]` f32.
    """
    q_shape, scale_shape = group_shapes(out_features, in_features, bits)
    n_panels, n_groups = q_shape[:2]
    side = next(d for d in (4, 3, 2, 1) if n_panels % d == 0)  # panels of a parallel task
    row_block = ROW_BLOCK // tile_rows * tile_rows
    tail = out_features % PANEL
    sums = task_sums(dot, tile_rows, n_groups, bits, side, side, lambda j: j)

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
    def body(rows, W, S, R, O, m):
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
                    for j in T.unroll(side):
                        store(F, R, O, r, j, start + r, (p * side + j) * PANEL)

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
            body(A, W, S, R, O, m)

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
        body(A, W, S, None, O, m)

    return hand_scheduled(plain)
