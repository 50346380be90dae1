"""y = x Wᵀ over weight panels (layout.py), for any number of rows."""

import numpy as np
from tvm.script import tirx as T

from ..layout import PANEL
from ..plain_weight import as_float32
from ..root import hand_scheduled
from .isa import Isa
from .layout import panel_shape
from .prefetch import later, prefetch

_AHEAD_BYTES = 2048  # of a panel, that one row asks for before it needs them


def linear(isa: Isa, out_features: int, in_features: int, weight_dtype: str, residual: bool):
    """x `[m, in]` f32, weight `[panels, in, 16]`, (residual `[m, out]` f32) → `[m, out]` f32.

    Each parallel task owns a group of panels and passes over all rows with it, so that a weight is
    read from memory once. One row runs as a GEMV; full tiles keep rows × panels accumulators in
    registers. With `residual`, y += residual.
    """
    n_panels = panel_shape(out_features, in_features)[0]
    group = isa.linear_panels if n_panels % isa.linear_panels == 0 else 1
    rows = isa.linear_rows
    tail = out_features % PANEL
    ahead = _AHEAD_BYTES // (PANEL * np.dtype(weight_dtype).itemsize)  # input features

    @T.inline
    def store(acc, R, O, r, g, col, row):
        if col + PANEL <= out_features:
            for v in T.vectorized(PANEL):
                if residual:
                    O[row, col + v] = acc[r, g, v] + R[row, col + v]
                else:
                    O[row, col + v] = acc[r, g, v]
        else:
            # A copy, so that the scalar loop does not force the accumulators out of registers.
            last = T.alloc_buffer((PANEL,), "float32")
            for v in T.vectorized(PANEL):
                last[v] = acc[r, g, v]
            for v in T.serial(tail):
                if residual:
                    O[row, col + v] = last[v] + R[row, col + v]
                else:
                    O[row, col + v] = last[v]

    @T.inline
    def tile(X, W, L, R, O, p, row, n_rows):
        acc = T.alloc_buffer((n_rows, group, PANEL), "float32")
        for r in T.unroll(n_rows):
            for g in T.unroll(group):
                for v in T.vectorized(PANEL):
                    acc[r, g, v] = T.float32(0)
        for k in T.serial(in_features):
            w = T.alloc_buffer((group, PANEL), "float32")
            if n_rows == 1:
                for g in T.unroll(group):
                    T.evaluate(prefetch(L[later(p, g, group, in_features, k + ahead), 0]))
            for g in T.unroll(group):
                for v in T.vectorized(PANEL):
                    w[g, v] = as_float32(W[p * group + g, k, v], weight_dtype)
            for r in T.unroll(n_rows):
                for g in T.unroll(group):
                    for v in T.vectorized(PANEL):
                        acc[r, g, v] += X[row + r, k] * w[g, v]
        for r in T.unroll(n_rows):
            for g in T.unroll(group):
                store(acc, R, O, r, g, (p * group + g) * PANEL, row + r)

    @T.inline
    def body(X, W, R, O, m):
        L = T.decl_buffer((n_panels * in_features, PANEL), weight_dtype, data=W.data)
        for p in T.parallel(n_panels // group):
            for t in T.serial(m // rows):
                tile(X, W, L, R, O, p, t * rows, rows)
            for t in T.serial(m % rows):
                tile(X, W, L, R, O, p, m // rows * rows + t, 1)

    if residual:

        @T.prim_func(private=True, s_tir=True)
        def linear_add(x: T.handle, weight: T.handle, res: T.handle, out: T.handle):
            m = T.int64()
            X = T.match_buffer(x, (m, in_features), "float32")
            W = T.match_buffer(weight, (n_panels, in_features, PANEL), weight_dtype)
            R = T.match_buffer(res, (m, out_features), "float32")
            O = T.match_buffer(out, (m, out_features), "float32")
            body(X, W, R, O, m)

        return hand_scheduled(linear_add)

    @T.prim_func(private=True, s_tir=True)
    def linear_plain(x: T.handle, weight: T.handle, out: T.handle):
        m = T.int64()
        X = T.match_buffer(x, (m, in_features), "float32")
        W = T.match_buffer(weight, (n_panels, in_features, PANEL), weight_dtype)
        O = T.match_buffer(out, (m, out_features), "float32")
        body(X, W, None, O, m)

    return hand_scheduled(linear_plain)
