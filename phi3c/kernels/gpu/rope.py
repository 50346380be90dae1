"""Rotary embedding (Su et al. 2021) with LongRoPE's factors (Ding et al. 2024), and the append of
keys and values to their KV blocks.

Which factor set a token uses is data (`factor_set`, one entry per token), so that a batch may hold
short-factor and long-factor sequences side by side.
"""

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from ..math import LOG2_E
from ..root import hand_scheduled
from .limits import GpuLimits
from .rows import for_each
from .trigonometry import cos_sin


def rope_table(limits: GpuLimits, rotary_dim: int, attention_factor: float):
    """positions `[n]` i32, factor_set `[n]` i32 (0 short, 1 long), inv_freq `[2, rotary_dim/2]` f32
    → `[n, rotary_dim]` f32: cosines, then sines, times the attention factor.

    One table per forward serves every layer.
    """
    half = rotary_dim // 2

    @T.inline
    def put(args, t, j):
        P, S, F, O = T.meta_var(args)
        cosine = T.alloc_buffer((1,), "float32", scope="local")
        sine = T.alloc_buffer((1,), "float32", scope="local")
        cos_sin(T.Cast("float32", P[t]) * F[S[t], j], cosine, sine)
        O[t, j] = cosine[0] * T.float32(attention_factor)
        O[t, half + j] = sine[0] * T.float32(attention_factor)

    run = for_each(limits, half, put)

    @T.prim_func(private=True, s_tir=True)
    def func(positions: T.handle, factor_set: T.handle, inv_freq: T.handle, out: T.handle):
        n = T.int64()
        P = T.match_buffer(positions, (n,), "int32")
        S = T.match_buffer(factor_set, (n,), "int32")
        F = T.match_buffer(inv_freq, (2, half), "float32")
        O = T.match_buffer(out, (n, rotary_dim), "float32")
        run(n, (P, S, F, O))

    return hand_scheduled(func)


def rope_append(
    limits: GpuLimits,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    kv_dtype: str,
    dtype: str,
):
    """Rotate q and k, write k and v into their slots, return q.

    qkv `[n, (heads + 2·kv_heads)·head_dim]` dtype (q heads, k heads, v heads),
    rope `[n, rotary_dim]` f32, slots `[n]` i32 (block·16 + offset),
    pages `[blocks, 2, kv_heads, head_dim·16]` (updated in place) → q `[n, heads·head_dim]` dtype.

    q is scaled by log2(e)/sqrt(head_dim), so that attention can use powers of two.
    """
    half = rotary_dim // 2
    scale = LOG2_E / head_dim**0.5
    width = (heads + 2 * kv_heads) * head_dim

    @T.inline
    def turn(QKV, C, value, t, k):
        # value[0] = element k of QKV's row t, which is element i of its head, rotated.
        i = T.meta_var(k % head_dim)
        x: T.let = T.Cast("float32", QKV[t, k])
        if i < half:
            y: T.let = T.Cast("float32", QKV[t, k + half])
            value[0] = x * C[t, i] - y * C[t, half + i]
        else:
            if i < rotary_dim:
                y: T.let = T.Cast("float32", QKV[t, k - half])
                value[0] = x * C[t, i - half] + y * C[t, i]
            else:
                value[0] = x

    @T.inline
    def put(args, t, k):
        QKV, C, S, P, Q = T.meta_var(args)
        head = T.meta_var(k // head_dim)
        i = T.meta_var(k % head_dim)
        value = T.alloc_buffer((1,), "float32", scope="local")
        if head < heads + kv_heads:
            turn(QKV, C, value, t, k)
            if head < heads:
                Q[t, k] = T.Cast(dtype, value[0] * T.float32(scale))
            else:
                P[S[t] // KV_BLOCK, 0, head - heads, i * KV_BLOCK + S[t] % KV_BLOCK] = T.Cast(
                    kv_dtype, value[0]
                )
        else:
            P[S[t] // KV_BLOCK, 1, head - (heads + kv_heads), S[t] % KV_BLOCK * head_dim + i] = (
                T.Cast(kv_dtype, QKV[t, k])
            )

    run = for_each(limits, width, put)

    @T.prim_func(private=True, s_tir=True)
    def func(qkv: T.handle, rope: T.handle, slots: T.handle, pages: T.handle, q: T.handle):
        n = T.int64()
        blocks = T.int64()
        QKV = T.match_buffer(qkv, (n, width), dtype)
        C = T.match_buffer(rope, (n, rotary_dim), "float32")
        S = T.match_buffer(slots, (n,), "int32")
        P = T.match_buffer(pages, (blocks, 2, kv_heads, head_dim * KV_BLOCK), kv_dtype)
        Q = T.match_buffer(q, (n, heads * head_dim), dtype)
        run(n, (QKV, C, S, P, Q))

    return hand_scheduled(func)
