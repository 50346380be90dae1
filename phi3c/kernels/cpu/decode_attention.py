"""Paged attention for one query token per sequence.

Online softmax (Milakov & Gimelshein 2018) over chunks of KV blocks; the query heads of a group
share each block while it is in cache. Blocks of a head lie far apart, so the next one is prefetched
while one is used. A long context is split, so that few heads keep many cores busy; the parts are
joined at the end (Dao et al. 2023, Flash-Decoding).
"""

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from ..root import hand_scheduled
from .isa import Isa, vector_lanes
from .math import exp2
from .prefetch import prefetcher
from .softmax import MASKED, online_softmax

CHUNK = 8  # KV blocks between two rescalings of the accumulator
SPLIT = 32  # KV blocks of a part: enough work to pay for joining it


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

    @T.inline
    def attend(Q, K, V, P, B, S, M, L, O, b, kvh, at, lo, hi, start, low, high):
        """Blocks lo … hi − 1 of a sequence whose list begins at `at`, keys low … high."""
        for chunk in T.serial((hi - lo + CHUNK - 1) // CHUNK):
            base: T.let = lo + chunk * CHUNK
            here: T.let = T.min(hi - base, CHUNK)
            for c in T.serial(here):
                block: T.let = T.Cast("int64", B[at + base + c])
                first: T.let = start + (base + c) * KV_BLOCK
                more: T.let = c + 1 < here
                following: T.let = T.Cast("int64", B[at + base + T.if_then_else(more, c + 1, 0)])
                side: T.let = T.if_then_else(more, 0, 1)
                scores(Q, K, P, S, b, kvh, block, first, c, low, high, following, side)
            for g in T.serial(group):
                softmax(S, M, L, O, g, here)
            for c in T.serial(here):
                vblock: T.let = T.Cast("int64", B[at + base + c])
                # Slots past the query hold nothing, not even zeros: 0 · NaN would reach O.
                tokens: T.let = T.min(high - start - (base + c) * KV_BLOCK + 1, KV_BLOCK)
                vnext: T.let = T.Cast("int64", B[at + T.min(base + c + 1, hi - 1)])
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

    @T.inline
    def join(PO, PM, PL, OUT, b, head, first, parts):
        """The parts of one query head: weights relative to the largest maximum."""
        top = T.alloc_buffer((1,), "float32")
        total = T.alloc_buffer((1,), "float32")
        acc = T.alloc_buffer((head_dim,), "float32")
        top[0] = T.float32(MASKED)
        total[0] = T.float32(0)
        for j in T.serial(vectors):
            for v in T.vectorized(lanes):
                acc[j * lanes + v] = T.float32(0)
        for part in T.serial(parts):
            top[0] = T.max(top[0], PM[first + part, head])
        for part in T.serial(parts):
            weight: T.let = exp2(PM[first + part, head] - top[0])
            total[0] += weight * PL[first + part, head]
            for j in T.serial(vectors):
                for v in T.vectorized(lanes):
                    acc[j * lanes + v] += weight * PO[first + part, head, j * lanes + v]
        for j in T.serial(vectors):
            for v in T.vectorized(lanes):
                OUT[b, head * head_dim + j * lanes + v] = acc[j * lanes + v] / total[0]

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
        most = T.alloc_buffer((1,), "int32")
        most[0] = 1
        for b in T.serial(batch):
            most[0] = T.max(most[0], BI[b + 1] - BI[b])
        parts: T.let = T.Cast("int64", (most[0] + SPLIT - 1) // SPLIT)
        # A sequence's parts begin at BI[b] // SPLIT + b: room for all, and none overlap.
        PO = T.alloc_buffer((listed // SPLIT + batch, heads, head_dim), "float32")
        PM = T.alloc_buffer((listed // SPLIT + batch, heads), "float32")
        PL = T.alloc_buffer((listed // SPLIT + batch, heads), "float32")
        # Heads outermost: where sequences differ in length, every thread has some of each.
        # Truncated, as nothing is negative: floors of what is not constant take TVM seconds.
        for task in T.parallel(kv_heads * batch * parts):
            kvh: T.let = T.truncdiv(task, batch * parts)
            b: T.let = T.truncmod(T.truncdiv(task, parts), batch)
            part: T.let = T.truncmod(task, parts)
            S = T.alloc_buffer((group, keys), "float32")
            O = T.alloc_buffer((group, head_dim), "float32")
            M = T.alloc_buffer((group,), "float32")
            L = T.alloc_buffer((group,), "float32")
            high: T.let = POS[b]
            low: T.let = T.max(high - ((window or 2**30) - 1), START[b])
            lo: T.let = (low - START[b]) // KV_BLOCK + T.Cast("int32", part) * SPLIT
            hi: T.let = T.min(lo + SPLIT, (high - START[b]) // KV_BLOCK + 1)
            for g in T.serial(group):
                M[g] = T.float32(MASKED)
                L[g] = T.float32(0)
                for j in T.serial(vectors):
                    for v in T.vectorized(lanes):
                        O[g, j * lanes + v] = T.float32(0)
            attend(Q, K, V, P, B, S, M, L, O, b, kvh, BI[b], lo, hi, START[b], low, high)
            place: T.let = BI[b] // SPLIT + T.Cast("int32", b + part)
            written: T.let = T.Cast("int32", part) * SPLIT < BI[b + 1] - BI[b]
            for g in T.serial(group):
                head: T.let = kvh * group + g
                if parts == 1:
                    for j in T.serial(vectors):
                        for v in T.vectorized(lanes):
                            OUT[b, head * head_dim + j * lanes + v] = O[g, j * lanes + v] / L[g]
                elif written:
                    PM[place, head] = M[g]
                    PL[place, head] = L[g]
                    for j in T.serial(vectors):
                        for v in T.vectorized(lanes):
                            PO[place, head, j * lanes + v] = O[g, j * lanes + v]
        if parts > 1:
            for row in T.parallel(batch * heads):
                b: T.let = row // heads
                own: T.let = (BI[b + 1] - BI[b] + SPLIT - 1) // SPLIT
                join(PO, PM, PL, OUT, b, row % heads, BI[b] // SPLIT + T.Cast("int32", b), own)

    return hand_scheduled(func)
