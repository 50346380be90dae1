"""Paged attention for one query token per sequence.

Online softmax (Milakov & Gimelshein 2018) over chunks of KV blocks; the query heads of a group
share each block while it is in cache. Blocks of a head lie far apart, so the next one is prefetched
while one is used.
"""

from tvm.script import tirx as T

from ..root import hand_scheduled
from .isa import Isa, vector_lanes
from .layout import KV_BLOCK
from .prefetch import prefetcher
from .softmax import MASKED, online_softmax

CHUNK = 8  # KV blocks between two rescalings of the accumulator


def decode_attention(
    isa: Isa, heads: int, kv_heads: int, head_dim: int, kv_dtype: str, window: int | None
):
    """q `[b, heads·head_dim]` f32 (rotated, scaled by log2(e)/sqrt(head_dim)),
    pages `[blocks, 2, kv_heads, head_dim·16]`, block_indptr `[b+1]`, block_ids `[m]`,
    kv_start `[b]` (position of the first listed slot, a multiple of 16), positions `[b]` (of the
    query, whose key is already in its slot), all i32 → `[b, heads·head_dim]` f32.

    A query at position p sees keys max(0, p − window + 1) … p (config field sliding_window).
    """
    group = heads // kv_heads
    lanes = vector_lanes(isa, head_dim)
    vectors = head_dim // lanes
    partial = next(d for d in (4, 2, 1) if head_dim % d == 0)  # independent sums hide FMA latency
    keys = CHUNK * KV_BLOCK

    softmax = online_softmax(lanes, vectors)
    ahead = prefetcher(kv_dtype)

    @T.inline
    def scores(Q, K, P, S, b, kvh, block, first, c, low, high, following, side):
        for g in T.serial(group):
            acc = T.alloc_buffer((partial, KV_BLOCK), "float32")
            for u in T.unroll(partial):
                for v in T.vectorized(KV_BLOCK):
                    acc[u, v] = T.float32(0)
            for d in T.serial(head_dim // partial):
                if g == 0:
                    ahead(P, following, side, kvh, d * partial * KV_BLOCK, partial * KV_BLOCK)
                for u in T.unroll(partial):
                    for v in T.vectorized(KV_BLOCK):
                        acc[u, v] += Q[b, (kvh * group + g) * head_dim + d * partial + u] * T.Cast(
                            "float32", K[block, 0, kvh, d * partial + u, v]
                        )
            for u in T.unroll(partial - 1):
                for v in T.vectorized(KV_BLOCK):
                    acc[0, v] += acc[u + 1, v]
            for v in T.vectorized(KV_BLOCK):
                S[g, c * KV_BLOCK + v] = T.Select(
                    T.And(first + v >= low, first + v <= high), acc[0, v], T.float32(MASKED)
                )

    @T.prim_func(private=True, s_tir=True)
    def func(
        q: T.handle,
        pages: T.handle,
        block_indptr: T.handle,
        block_ids: T.handle,
        kv_start: T.handle,
        positions: T.handle,
        out: T.handle,
    ):
        batch = T.int64()
        blocks = T.int64()
        listed = T.int64()
        Q = T.match_buffer(q, (batch, heads * head_dim), "float32")
        P = T.match_buffer(pages, (blocks, 2, kv_heads, head_dim * KV_BLOCK), kv_dtype)
        BI = T.match_buffer(block_indptr, (batch + 1,), "int32")
        B = T.match_buffer(block_ids, (listed,), "int32")
        START = T.match_buffer(kv_start, (batch,), "int32")
        POS = T.match_buffer(positions, (batch,), "int32")
        OUT = T.match_buffer(out, (batch, heads * head_dim), "float32")
        K = T.decl_buffer((blocks, 2, kv_heads, head_dim, KV_BLOCK), kv_dtype, data=P.data)
        V = T.decl_buffer((blocks, 2, kv_heads, KV_BLOCK, head_dim), kv_dtype, data=P.data)
        for task in T.parallel(batch * kv_heads):
            b: T.let = task // kv_heads
            kvh: T.let = task % kv_heads
            S = T.alloc_buffer((group, keys), "float32")
            O = T.alloc_buffer((group, head_dim), "float32")
            M = T.alloc_buffer((group,), "float32")
            L = T.alloc_buffer((group,), "float32")
            high: T.let = POS[b]
            low: T.let = T.max(high - ((window or 2**30) - 1), START[b])
            first_block: T.let = (low - START[b]) // KV_BLOCK
            n_blocks: T.let = (high - START[b]) // KV_BLOCK + 1 - first_block
            for g in T.serial(group):
                M[g] = T.float32(MASKED)
                L[g] = T.float32(0)
                for j in T.serial(vectors):
                    for v in T.vectorized(lanes):
                        O[g, j * lanes + v] = T.float32(0)
            for chunk in T.serial((n_blocks + CHUNK - 1) // CHUNK):
                base: T.let = first_block + chunk * CHUNK
                here: T.let = T.min(n_blocks - chunk * CHUNK, CHUNK)
                for c in T.serial(here):
                    block: T.let = T.Cast("int64", B[BI[b] + base + c])
                    first: T.let = START[b] + (base + c) * KV_BLOCK
                    more: T.let = c + 1 < here
                    following: T.let = T.Cast(
                        "int64", B[BI[b] + base + T.if_then_else(more, c + 1, 0)]
                    )
                    side: T.let = T.if_then_else(more, 0, 1)
                    scores(Q, K, P, S, b, kvh, block, first, c, low, high, following, side)
                for g in T.serial(group):
                    softmax(S, M, L, O, g, here)
                for c in T.serial(here):
                    vblock: T.let = T.Cast("int64", B[BI[b] + base + c])
                    # Slots past the query hold nothing, not even zeros: 0 · NaN would reach O.
                    tokens: T.let = T.min(high - START[b] - (base + c) * KV_BLOCK + 1, KV_BLOCK)
                    last: T.let = first_block + n_blocks - 1
                    vnext: T.let = T.Cast("int64", B[BI[b] + T.min(base + c + 1, last)])
                    vside: T.let = T.if_then_else(c + 1 < here, 1, 0)
                    for g in T.serial(group):
                        acc = T.alloc_buffer((vectors, lanes), "float32")
                        for j in T.unroll(vectors):
                            for v in T.vectorized(lanes):
                                acc[j, v] = O[g, j * lanes + v]
                        for t in T.serial(tokens):
                            if g == 0:
                                ahead(P, vnext, vside, kvh, t * head_dim, head_dim)
                            for j in T.unroll(vectors):
                                for v in T.vectorized(lanes):
                                    acc[j, v] += S[g, c * KV_BLOCK + t] * T.Cast(
                                        "float32", V[vblock, 1, kvh, t, j * lanes + v]
                                    )
                        for j in T.unroll(vectors):
                            for v in T.vectorized(lanes):
                                O[g, j * lanes + v] = acc[j, v]
            for g in T.serial(group):
                for j in T.serial(vectors):
                    for v in T.vectorized(lanes):
                        OUT[b, (kvh * group + g) * head_dim + j * lanes + v] = (
                            O[g, j * lanes + v] / L[g]
                        )

    return hand_scheduled(func)
