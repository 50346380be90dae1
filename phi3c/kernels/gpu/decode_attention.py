"""Paged attention for one query token per sequence.

A workgroup takes a part of the keys of a sequence and all query heads of one key head: scores of
the whole part in shared memory, one softmax, then the weighted values. Parts of a sequence are
joined in a second kernel (Dao et al. 2023, Flash-Decoding). Keys lie `[head_dim, 16]` in a block,
so threads that hold neighbouring tokens read neighbouring addresses; values `[16, head_dim]`, where
threads hold neighbouring dimensions.
"""

import operator

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from ..root import hand_scheduled
from .reduce import reduction
from .softmax import MASKED, UNMASKED

THREADS = 128
SPLIT = 32  # KV blocks of a part
_SHARED_SCORES = 16 * 1024  # bytes


def decode_attention(
    dtype: str, heads: int, kv_heads: int, head_dim: int, kv_dtype: str, window: int | None
):
    """q `[b, heads·head_dim]` dtype (rotated, scaled by log2(e)/sqrt(head_dim)),
    pages `[blocks, 2, kv_heads, head_dim·16]`, block_indptr `[b+1]`, block_ids `[m]`,
    kv_start `[b]` (position of the first listed slot, a multiple of 16), positions `[b]` (of the
    query, whose key is already in its slot), all i32 → `[b, heads·head_dim]` dtype.

    A query at position p sees keys max(0, p − window + 1) … p (config field sliding_window).
    """
    group = heads // kv_heads
    # Query heads of a workgroup; more of them than shared memory has room for take turns.
    most = _SHARED_SCORES // (4 * SPLIT * KV_BLOCK)
    own = next(d for d in range(min(group, most), 0, -1) if group % d == 0)
    keys = SPLIT * KV_BLOCK
    rounds = keys // THREADS
    dims = -(-head_dim // THREADS)

    largest = reduction(T.max, MASKED)
    added = reduction(operator.add, 0.0)

    @T.inline
    def attend(Q, K, V, B, b, first, at, n_keys, start, low, high, QS, S, O, M, L, tx):
        """Keys 0 … n_keys − 1 from the block that is listed at `at`, the first at `start`."""
        for i in T.serial((own * head_dim + THREADS - 1) // THREADS):
            if i * THREADS + tx < own * head_dim:
                QS[i * THREADS + tx] = T.Cast("float32", Q[b, first * head_dim + i * THREADS + tx])
        score = T.alloc_buffer((rounds * own,), "float32", scope="local")
        mine = T.alloc_buffer((own,), "float32", scope="local")
        for r in T.unroll(rounds):
            key: T.let = r * THREADS + tx
            for g in T.unroll(own):
                score[r * own + g] = T.float32(0)
            if key < n_keys:
                for d in T.serial(head_dim):
                    k: T.let = T.Cast(
                        "float32",
                        K[B[at + key // KV_BLOCK], 0, first // group, d, key % KV_BLOCK],
                    )
                    for g in T.unroll(own):
                        score[r * own + g] += QS[g * head_dim + d] * k
            for g in T.unroll(own):
                if key >= n_keys or start + key < low or start + key > high:
                    score[r * own + g] = T.float32(MASKED)
        best = T.alloc_buffer((1,), "float32", scope="local")
        sum = T.alloc_buffer((1,), "float32", scope="local")
        for g in T.serial(own):
            mine[g] = score[g]
            for r in T.unroll(rounds - 1):
                mine[g] = T.max(mine[g], score[(r + 1) * own + g])
            largest(mine[g], best, tx)
            M[g] = best[0]
            mine[g] = T.float32(0)
            for r in T.unroll(rounds):
                weight: T.let = T.Select(
                    score[r * own + g] > T.float32(UNMASKED),
                    T.exp2(score[r * own + g] - M[g]),
                    T.float32(0),
                )
                S[g * keys + r * THREADS + tx] = weight
                mine[g] += weight
            added(mine[g], sum, tx)
            L[g] = sum[0]
        for i in T.unroll(dims):
            for g in T.unroll(own):
                O[i * own + g] = T.float32(0)
            if i * THREADS + tx < head_dim:
                # Slots past the query hold nothing, not even zeros: 0 · NaN would stay.
                for key in T.serial(T.min(n_keys, high - start + 1)):
                    v: T.let = T.Cast(
                        "float32",
                        V[
                            B[at + key // KV_BLOCK],
                            1,
                            first // group,
                            key % KV_BLOCK,
                            i * THREADS + tx,
                        ],
                    )
                    for g in T.unroll(own):
                        O[i * own + g] += S[g * keys + key] * v

    @T.inline
    def part_of(BI, batch, place, mine):
        """A sequence's parts begin at BI[b] // SPLIT + b: room for all, and none overlap."""
        mine[0] = 0
        for b in T.serial(T.Cast("int32", batch)):
            if place >= BI[b] // SPLIT + b:
                mine[0] = b

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
        Q = T.match_buffer(q, (batch, heads * head_dim), dtype)
        P = T.match_buffer(pages, (blocks, 2, kv_heads, head_dim * KV_BLOCK), kv_dtype)
        BI = T.match_buffer(block_indptr, (batch + 1,), "int32")
        B = T.match_buffer(block_ids, (listed,), "int32")
        START = T.match_buffer(kv_start, (batch,), "int32")
        POS = T.match_buffer(positions, (batch,), "int32")
        OUT = T.match_buffer(out, (batch, heads * head_dim), dtype)
        K = T.decl_buffer((blocks, 2, kv_heads, head_dim, KV_BLOCK), kv_dtype, data=P.data)
        V = T.decl_buffer((blocks, 2, kv_heads, KV_BLOCK, head_dim), kv_dtype, data=P.data)
        PO = T.alloc_buffer((listed // SPLIT + batch, heads, head_dim), "float32")
        PM = T.alloc_buffer((listed // SPLIT + batch, heads), "float32")
        PL = T.alloc_buffer((listed // SPLIT + batch, heads), "float32")
        for place in T.thread_binding(listed // SPLIT + batch, thread="blockIdx.x"):
            for turn in T.thread_binding(heads // own, thread="blockIdx.y"):
                for tx in T.thread_binding(THREADS, thread="threadIdx.x"):
                    QS = T.alloc_buffer((own * head_dim,), "float32", scope="shared")
                    S = T.alloc_buffer((own * keys,), "float32", scope="shared")
                    mine = T.alloc_buffer((1,), "int32", scope="local")
                    O = T.alloc_buffer((dims * own,), "float32", scope="local")
                    M = T.alloc_buffer((own,), "float32", scope="local")
                    L = T.alloc_buffer((own,), "float32", scope="local")
                    part_of(BI, batch, T.Cast("int32", place), mine)
                    b: T.let = mine[0]
                    part: T.let = T.Cast("int32", place) - BI[b] // SPLIT - b
                    high: T.let = POS[b]
                    low: T.let = T.max(high - ((window or 2**30) - 1), START[b])
                    lo: T.let = (low - START[b]) // KV_BLOCK + part * SPLIT
                    hi: T.let = T.min(lo + SPLIT, (high - START[b]) // KV_BLOCK + 1)
                    n_keys: T.let = T.max(hi - lo, 0) * KV_BLOCK
                    begin: T.let = START[b] + lo * KV_BLOCK
                    attend(
                        Q, K, V, B, b, turn * own, BI[b] + lo, n_keys, begin, low, high,
                        QS, S, O, M, L, tx,
                    )  # fmt: skip
                    for g in T.unroll(own):
                        head: T.let = turn * own + g
                        if tx == 0:
                            PM[place, head] = M[g]
                            PL[place, head] = L[g]
                        for i in T.unroll(dims):
                            if i * THREADS + tx < head_dim:
                                PO[place, head, i * THREADS + tx] = O[i * own + g]
        for b in T.thread_binding(batch, thread="blockIdx.x"):
            for head in T.thread_binding(heads, thread="blockIdx.y"):
                for tx in T.thread_binding(THREADS, thread="threadIdx.x"):
                    best = T.alloc_buffer((1,), "float32", scope="local")
                    total = T.alloc_buffer((1,), "float32", scope="local")
                    acc = T.alloc_buffer((dims,), "float32", scope="local")
                    first: T.let = BI[b] // SPLIT + T.Cast("int32", b)
                    parts: T.let = (BI[b + 1] - BI[b] + SPLIT - 1) // SPLIT
                    best[0] = T.float32(MASKED)
                    total[0] = T.float32(0)
                    for i in T.unroll(dims):
                        acc[i] = T.float32(0)
                    for part in T.serial(parts):
                        best[0] = T.max(best[0], PM[first + part, head])
                    for part in T.serial(parts):
                        weight: T.let = T.exp2(PM[first + part, head] - best[0])
                        total[0] += weight * PL[first + part, head]
                        for i in T.unroll(dims):
                            if i * THREADS + tx < head_dim:
                                acc[i] += weight * PO[first + part, head, i * THREADS + tx]
                    for i in T.unroll(dims):
                        if i * THREADS + tx < head_dim:
                            OUT[b, head * head_dim + i * THREADS + tx] = T.Cast(
                                dtype, acc[i] / total[0]
                            )

    return hand_scheduled(func)
