"""Rotary embedding (Su et al. 2021) with LongRoPE's factors (Ding et al. 2024), and the append of
keys and values to their KV blocks.

Which factor set a token uses is data (`factor_set`, one entry per token), so that a batch may hold
short-factor and long-factor sequences side by side.
"""

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from ..math import LOG2_E
from ..root import hand_scheduled
from .isa import Isa, vector_lanes
from .parallel import SERIAL_LONG_ROWS


def rope_table(rotary_dim: int, attention_factor: float):
    """positions `[n]` i32, factor_set `[n]` i32 (0 short, 1 long), inv_freq `[2, rotary_dim/2]` f32
    → `[n, rotary_dim]` f32: cosines, then sines, times the attention factor.

    One table per forward serves every layer.
    """
    half = rotary_dim // 2

    @T.inline
    def angles(P, S, F, O, t):
        for j in T.serial(half):
            angle: T.let = T.Cast("float32", P[t]) * F[S[t], j]
            O[t, j] = T.cos(angle) * T.float32(attention_factor)
            O[t, half + j] = T.sin(angle) * T.float32(attention_factor)

    @T.prim_func(private=True, s_tir=True)
    def func(positions: T.handle, factor_set: T.handle, inv_freq: T.handle, out: T.handle):
        n = T.int64()
        P = T.match_buffer(positions, (n,), "int32")
        S = T.match_buffer(factor_set, (n,), "int32")
        F = T.match_buffer(inv_freq, (2, half), "float32")
        O = T.match_buffer(out, (n, rotary_dim), "float32")
        if n <= SERIAL_LONG_ROWS:
            for t in T.serial(n):
                angles(P, S, F, O, t)
        else:
            for t in T.parallel(n):
                angles(P, S, F, O, t)

    return hand_scheduled(func)


def rope_append(isa: Isa, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, kv_dtype: str):
    """Rotate q and k, write k and v into their slots, return q.

    qkv `[n, (heads + 2·kv_heads)·head_dim]` f32 (q heads, k heads, v heads),
    rope `[n, rotary_dim]` f32, slots `[n]` i32 (block·16 + offset),
    pages `[blocks, 2, kv_heads, head_dim·16]` (updated in place) → q `[n, heads·head_dim]` f32.

    q is scaled by log2(e)/sqrt(head_dim), so that attention can use powers of two.
    """
    half = rotary_dim // 2
    rest = head_dim - rotary_dim
    lanes = vector_lanes(isa, half)
    rest_lanes = vector_lanes(isa, rest) if rest else 1
    v_lanes = vector_lanes(isa, head_dim)
    scale = LOG2_E / head_dim**0.5
    width = (heads + 2 * kv_heads) * head_dim

    @T.inline
    def token(QKV, R, S, K, V, Q, t):
        block: T.let = T.Cast("int64", S[t] // KV_BLOCK)
        offset: T.let = S[t] % KV_BLOCK
        for h in T.serial(heads):
            for j in T.serial(half // lanes):
                for v in T.vectorized(lanes):
                    i = T.meta_var(j * lanes + v)
                    x = T.meta_var(QKV[t, h * head_dim + i])
                    y = T.meta_var(QKV[t, h * head_dim + half + i])
                    Q[t, h * head_dim + i] = (x * R[t, i] - y * R[t, half + i]) * T.float32(scale)
                for v in T.vectorized(lanes):
                    i = T.meta_var(j * lanes + v)
                    x = T.meta_var(QKV[t, h * head_dim + i])
                    y = T.meta_var(QKV[t, h * head_dim + half + i])
                    Q[t, h * head_dim + half + i] = (y * R[t, i] + x * R[t, half + i]) * T.float32(
                        scale
                    )
            for j in T.serial(rest // rest_lanes):
                for v in T.vectorized(rest_lanes):
                    i = T.meta_var(h * head_dim + rotary_dim + j * rest_lanes + v)
                    Q[t, i] = QKV[t, i] * T.float32(scale)
        for h in T.serial(kv_heads):
            for i in T.serial(half):
                x: T.let = QKV[t, (heads + h) * head_dim + i]
                y: T.let = QKV[t, (heads + h) * head_dim + half + i]
                K[block, 0, h, i, offset] = T.Cast(kv_dtype, x * R[t, i] - y * R[t, half + i])
                K[block, 0, h, half + i, offset] = T.Cast(
                    kv_dtype, y * R[t, i] + x * R[t, half + i]
                )
            for i in T.serial(rest):
                K[block, 0, h, rotary_dim + i, offset] = T.Cast(
                    kv_dtype, QKV[t, (heads + h) * head_dim + rotary_dim + i]
                )
            for j in T.serial(head_dim // v_lanes):
                for v in T.vectorized(v_lanes):
                    i = T.meta_var(j * v_lanes + v)
                    V[block, 1, h, offset, i] = T.Cast(
                        kv_dtype, QKV[t, (heads + kv_heads + h) * head_dim + i]
                    )

    @T.prim_func(private=True, s_tir=True)
    def func(qkv: T.handle, rope: T.handle, slots: T.handle, pages: T.handle, q: T.handle):
        n = T.int64()
        blocks = T.int64()
        QKV = T.match_buffer(qkv, (n, width), "float32")
        R = T.match_buffer(rope, (n, rotary_dim), "float32")
        S = T.match_buffer(slots, (n,), "int32")
        P = T.match_buffer(pages, (blocks, 2, kv_heads, head_dim * KV_BLOCK), kv_dtype)
        Q = T.match_buffer(q, (n, heads * head_dim), "float32")
        K = T.decl_buffer((blocks, 2, kv_heads, head_dim, KV_BLOCK), kv_dtype, data=P.data)
        V = T.decl_buffer((blocks, 2, kv_heads, KV_BLOCK, head_dim), kv_dtype, data=P.data)
        if n <= SERIAL_LONG_ROWS:
            for t in T.serial(n):
                token(QKV, R, S, K, V, Q, t)
        else:
            for t in T.parallel(n):
                token(QKV, R, S, K, V, Q, t)

    return hand_scheduled(func)
