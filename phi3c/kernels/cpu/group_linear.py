"""y = x Wᵀ over group-quantized weight panels, with float32 activations."""

import operator

from tvm.script import tirx as T

from ..layout import GROUP, PANEL
from ..root import hand_scheduled
from .group_weight import near_one, quad, value
from .isa import Isa
from .layout import group_shapes
from .prefetch import ROW_AHEAD, group_prefetcher
from .reduce import folded

ROW_BLOCK = 64  # rows that share one dequantized tile of weights


def group_linear(
    isa: Isa,
    out_features: int,
    in_features: int,
    bits: int,
    zero: int,
    scale_dtype: str,
    residual: bool,
):
    """x `[m, in]` f32, q, scale (layout.group_shapes), (residual `[m, out]`) → `[m, out]` f32.

    One row streams the weights through registers. For more, a tile of weights is dequantized into
    L1 and used by up to 64 rows, in register tiles as in linear.py. With `residual`, y += residual.
    """
    q_shape, scale_shape = group_shapes(out_features, in_features, bits)
    n_panels, n_groups = q_shape[:2]
    side = isa.linear_panels if n_panels % isa.linear_panels == 0 else 1
    rows = isa.linear_rows
    per_tile = next(d for d in (4, 3, 2, 1) if n_groups % d == 0)  # groups in a tile
    depth = per_tile * GROUP
    tail = out_features % PANEL
    ask = group_prefetcher(side, n_groups, bits)
    added = folded(operator.add, PANEL)
    one = 2**bits  # what near_one divides by, and adds: Σ(q − zero)x = one·Σ(1 + q/one)x − …

    @T.inline
    def one_row(X, W, S, LW, LS, A, p, row):
        for j in T.unroll(side):
            for v in T.vectorized(PANEL):
                A[0, j, v] = T.float32(0)
        for g in T.serial(n_groups):
            total = T.alloc_buffer((PANEL,), "float32")
            h = T.alloc_buffer((side, 2, PANEL), "float32")  # two sums: additions wait less
            for j in T.unroll(side):
                ask(LW, LS, p, j, g + ROW_AHEAD)
                for u in T.unroll(2):
                    for v in T.vectorized(PANEL):
                        h[j, u, v] = T.float32(0)
            for v in T.vectorized(PANEL):
                total[v] = X[row, g * GROUP + v] + X[row, g * GROUP + PANEL + v]
            added(total)
            for t in T.unroll(GROUP // 4):
                for b in T.unroll(4):
                    for j in T.unroll(side):
                        for v in T.vectorized(PANEL):
                            octets = T.meta_var(quad(W, p * side + j, g, t, v, bits))
                            h[j, b % 2, v] += X[row, g * GROUP + t * 4 + b] * near_one(
                                octets, b, bits
                            )
            for j in T.unroll(side):
                for v in T.vectorized(PANEL):
                    A[0, j, v] += T.Cast("float32", S[p * side + j, g, v]) * (
                        (h[j, 0, v] + h[j, 1, v]) * T.float32(one)
                        - total[0] * T.float32(one + zero)
                    )

    @T.inline
    def dequantize(W, S, D, p, tile):
        for g in T.serial(per_tile):
            for j in T.unroll(side):
                panel = T.meta_var(p * side + j)
                group = T.meta_var(tile * per_tile + g)
                for k in T.unroll(GROUP):
                    for v in T.vectorized(PANEL):
                        D[g * GROUP + k, j, v] = value(W, panel, group, k, v, bits, zero) * T.Cast(
                            "float32", S[panel, group, v]
                        )

    @T.inline
    def multiply(X, D, A, row, at, tile, n_rows):
        # Rows `row` … of X into rows `at` … of the accumulator A.
        acc = T.alloc_buffer((n_rows, side, PANEL), "float32")
        for r in T.unroll(n_rows):
            for j in T.unroll(side):
                for v in T.vectorized(PANEL):
                    acc[r, j, v] = A[at + r, j, v]
        for k in T.serial(depth):
            w = T.alloc_buffer((side, PANEL), "float32")
            for j in T.unroll(side):
                for v in T.vectorized(PANEL):
                    w[j, v] = D[k, j, v]
            for r in T.unroll(n_rows):
                for j in T.unroll(side):
                    for v in T.vectorized(PANEL):
                        acc[r, j, v] += X[row + r, tile * depth + k] * w[j, v]
        for r in T.unroll(n_rows):
            for j in T.unroll(side):
                for v in T.vectorized(PANEL):
                    A[at + r, j, v] = acc[r, j, v]

    @T.inline
    def store(A, R, O, at, j, row, col):
        if col + PANEL <= out_features:
            for v in T.vectorized(PANEL):
                if residual:
                    O[row, col + v] = A[at, j, v] + R[row, col + v]
                else:
                    O[row, col + v] = A[at, j, v]
        else:
            for v in T.serial(tail):
                if residual:
                    O[row, col + v] = A[at, j, v] + R[row, col + v]
                else:
                    O[row, col + v] = A[at, j, v]

    @T.inline
    def many_rows(X, W, S, D, A, p, start, count):
        for r in T.serial(count):
            for j in T.unroll(side):
                for v in T.vectorized(PANEL):
                    A[r, j, v] = T.float32(0)
        for tile in T.serial(n_groups // per_tile):
            dequantize(W, S, D, p, tile)
            for t in T.serial(count // rows):
                multiply(X, D, A, start + t * rows, t * rows, tile, rows)
            for t in T.serial(count % rows):
                at = T.meta_var(count // rows * rows + t)
                multiply(X, D, A, start + at, at, tile, 1)

    @T.inline
    def body(X, W, S, R, O, m):
        LW = T.decl_buffer((n_panels * n_groups, bits, PANEL), "uint32", data=W.data)
        LS = T.decl_buffer((n_panels * n_groups, PANEL), scale_dtype, data=S.data)
        for p in T.parallel(n_panels // side):
            A = T.alloc_buffer((ROW_BLOCK, side, PANEL), "float32")
            D = T.alloc_buffer((depth, side, PANEL), "float32")
            for block in T.serial((m + ROW_BLOCK - 1) // ROW_BLOCK):
                start: T.let = block * ROW_BLOCK
                count: T.let = T.min(m - start, ROW_BLOCK)
                if count == 1:
                    one_row(X, W, S, LW, LS, A, p, start)
                else:
                    many_rows(X, W, S, D, A, p, start, count)
                for r in T.serial(count):
                    for j in T.unroll(side):
                        store(A, R, O, r, j, start + r, (p * side + j) * PANEL)

    if residual:

        @T.prim_func(private=True, s_tir=True)
        def with_residual(x: T.handle, q: T.handle, scale: T.handle, res: T.handle, out: T.handle):
            m = T.int64()
            X = T.match_buffer(x, (m, in_features), "float32")
            W = T.match_buffer(q, q_shape, "uint32")
            S = T.match_buffer(scale, scale_shape, scale_dtype)
            R = T.match_buffer(res, (m, out_features), "float32")
            O = T.match_buffer(out, (m, out_features), "float32")
            body(X, W, S, R, O, m)

        return hand_scheduled(with_residual)

    @T.prim_func(private=True, s_tir=True)
    def plain(x: T.handle, q: T.handle, scale: T.handle, out: T.handle):
        m = T.int64()
        X = T.match_buffer(x, (m, in_features), "float32")
        W = T.match_buffer(q, q_shape, "uint32")
        S = T.match_buffer(scale, scale_shape, scale_dtype)
        O = T.match_buffer(out, (m, out_features), "float32")
        body(X, W, S, None, O, m)

    return hand_scheduled(plain)


def group_embedding(vocab_size: int, hidden_size: int, bits: int, zero: int, scale_dtype: str):
    """ids `[n]` i32, q, scale (layout.group_shapes) → `[n, hidden]` f32."""
    q_shape, scale_shape = group_shapes(vocab_size, hidden_size, bits)

    @T.prim_func(private=True, s_tir=True)
    def func(ids: T.handle, q: T.handle, scale: T.handle, out: T.handle):
        n = T.int64()
        I = T.match_buffer(ids, (n,), "int32")
        W = T.match_buffer(q, q_shape, "uint32")
        S = T.match_buffer(scale, scale_shape, scale_dtype)
        O = T.match_buffer(out, (n, hidden_size), "float32")
        for t in T.serial(n):
            panel: T.let = I[t] // PANEL
            row: T.let = I[t] % PANEL
            for g in T.serial(hidden_size // GROUP):
                for k in T.serial(GROUP):
                    O[t, g * GROUP + k] = value(W, panel, g, k, row, bits, zero) * T.Cast(
                        "float32", S[panel, g, row]
                    )

    return hand_scheduled(func)
