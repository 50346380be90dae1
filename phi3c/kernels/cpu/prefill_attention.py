"""Paged attention for many query tokens per sequence: prefill, chunked prefill, chains and trees.

Blocked online softmax (Dao et al. 2022). A query tile and a chunk of keys are scored as a small
matrix product straight from the KV blocks, whose keys lie `[head_dim, 16]`.

What a new token may see among the new tokens is an interval in depth-first order: token j is an
ancestor of token i, or i itself, iff enter[j] <= enter[i] < leave[j]. A plain chunk is the chain
enter[j] = j, leave[j] = n, so one kernel serves both.
"""

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from ..root import hand_scheduled
from .isa import Isa, vector_lanes
from .softmax import MASKED, online_softmax

QUERY_TILE = 32  # query tokens in a tile
CHUNK = 4  # KV blocks between two rescalings of the accumulator
NEVER = 2**31 - 1  # an `enter` that no query reaches
ALWAYS = -(2**31)


def prefill_attention(
    isa: Isa, heads: int, kv_heads: int, head_dim: int, kv_dtype: str, window: int | None
):
    """q `[n, heads·head_dim]` f32 (rotated, scaled by log2(e)/sqrt(head_dim)),
    pages `[blocks, 2, kv_heads, head_dim·16]`, query_indptr `[b+1]`, block_indptr `[b+1]`,
    block_ids `[m]`, kv_start `[b]` (position of the first listed slot, a multiple of 16),
    kv_length `[b]` (tokens before this forward), positions, enter, leave `[n]`, all i32
    → `[n, heads·head_dim]` f32.

    New token t of a sequence lies in slot kv_length + t; its position is that of its depth in the
    tree. A query at position p sees keys at positions p − window + 1 … p (config field
    sliding_window) that are old tokens, itself, or its ancestors.
    """
    group = heads // kv_heads
    rows = isa.attention_rows
    lanes = vector_lanes(isa, head_dim)
    vectors = head_dim // lanes
    columns = next(d for d in (3, 4, 2, 1) if vectors % d == 0)  # vectors of O in registers
    value_rows = 4
    keys = CHUNK * KV_BLOCK
    reach = window or 2**30

    softmax = online_softmax(lanes, vectors)

    @T.inline
    def scores(Q, K, S, KP, KE, KL, QP, QE, h, block, c, token, n_rows):
        # token[r] is the row of q that tile row r stands for, clamped to the tile's last one.
        for tile in T.serial((n_rows + rows - 1) // rows):
            acc = T.alloc_buffer((rows, KV_BLOCK), "float32")
            for r in T.unroll(rows):
                for v in T.vectorized(KV_BLOCK):
                    acc[r, v] = T.float32(0)
            for d in T.serial(head_dim):
                k = T.alloc_buffer((KV_BLOCK,), "float32")
                for v in T.vectorized(KV_BLOCK):
                    k[v] = T.Cast("float32", K[block, 0, h // group, d, v])
                for r in T.unroll(rows):
                    for v in T.vectorized(KV_BLOCK):
                        acc[r, v] += Q[token[tile * rows + r], h * head_dim + d] * k[v]
            for r in T.unroll(rows):
                for v in T.vectorized(KV_BLOCK):
                    i = T.meta_var(tile * rows + r)
                    j = T.meta_var(c * KV_BLOCK + v)
                    S[i, j] = T.Select(
                        T.And(
                            T.And(KE[j] <= QE[i], QE[i] < KL[j]),
                            KP[j] > QP[i] - reach,
                        ),
                        acc[r, v],
                        T.float32(MASKED),
                    )

    @T.inline
    def weighted_values(S, V, O, kvh, block, c, tokens, n_rows):
        for tile in T.serial((n_rows + value_rows - 1) // value_rows):
            for col in T.serial(vectors // columns):
                acc = T.alloc_buffer((value_rows, columns, lanes), "float32")
                for r in T.unroll(value_rows):
                    for j in T.unroll(columns):
                        for v in T.vectorized(lanes):
                            acc[r, j, v] = O[tile * value_rows + r, (col * columns + j) * lanes + v]
                for t in T.serial(tokens):
                    x = T.alloc_buffer((columns, lanes), "float32")
                    for j in T.unroll(columns):
                        for v in T.vectorized(lanes):
                            x[j, v] = T.Cast(
                                "float32", V[block, 1, kvh, t, (col * columns + j) * lanes + v]
                            )
                    for r in T.unroll(value_rows):
                        for j in T.unroll(columns):
                            for v in T.vectorized(lanes):
                                acc[r, j, v] += S[tile * value_rows + r, c * KV_BLOCK + t] * x[j, v]
                for r in T.unroll(value_rows):
                    for j in T.unroll(columns):
                        for v in T.vectorized(lanes):
                            O[tile * value_rows + r, (col * columns + j) * lanes + v] = acc[r, j, v]

    @T.prim_func(private=True, s_tir=True)
    def func(
        q: T.handle,
        pages: T.handle,
        query_indptr: T.handle,
        block_indptr: T.handle,
        block_ids: T.handle,
        kv_start: T.handle,
        kv_length: T.handle,
        positions: T.handle,
        enter: T.handle,
        leave: T.handle,
        out: T.handle,
    ):
        n = T.int64()
        batch = T.int64()
        blocks = T.int64()
        listed = T.int64()
        Q = T.match_buffer(q, (n, heads * head_dim), "float32")
        P = T.match_buffer(pages, (blocks, 2, kv_heads, head_dim * KV_BLOCK), kv_dtype)
        QI = T.match_buffer(query_indptr, (batch + 1,), "int32")
        BI = T.match_buffer(block_indptr, (batch + 1,), "int32")
        B = T.match_buffer(block_ids, (listed,), "int32")
        START = T.match_buffer(kv_start, (batch,), "int32")
        LENGTH = T.match_buffer(kv_length, (batch,), "int32")
        POS = T.match_buffer(positions, (n,), "int32")
        ENTER = T.match_buffer(enter, (n,), "int32")
        LEAVE = T.match_buffer(leave, (n,), "int32")
        OUT = T.match_buffer(out, (n, heads * head_dim), "float32")
        K = T.decl_buffer((blocks, 2, kv_heads, head_dim, KV_BLOCK), kv_dtype, data=P.data)
        V = T.decl_buffer((blocks, 2, kv_heads, KV_BLOCK, head_dim), kv_dtype, data=P.data)
        # A sequence's tiles begin at QI[b] // QUERY_TILE + b: room for all, and none overlap.
        tiles: T.let = n // QUERY_TILE + batch
        for task in T.parallel(heads * tiles):
            h: T.let = task // tiles
            place: T.let = T.Cast("int32", task % tiles)
            S = T.alloc_buffer((QUERY_TILE, keys), "float32")
            O = T.alloc_buffer((QUERY_TILE, head_dim), "float32")
            M = T.alloc_buffer((QUERY_TILE,), "float32")
            L = T.alloc_buffer((QUERY_TILE,), "float32")
            token = T.alloc_buffer((QUERY_TILE,), "int32")
            QP = T.alloc_buffer((QUERY_TILE,), "int32")
            QE = T.alloc_buffer((QUERY_TILE,), "int32")
            KP = T.alloc_buffer((keys,), "int32")
            KE = T.alloc_buffer((keys,), "int32")
            KL = T.alloc_buffer((keys,), "int32")
            oldest = T.alloc_buffer((1,), "int32")
            for b in T.serial(batch):
                n_new: T.let = QI[b + 1] - QI[b]
                tile: T.let = place - QI[b] // QUERY_TILE - T.Cast("int32", b)
                if tile >= 0 and tile * QUERY_TILE < n_new:
                    n_rows: T.let = T.min(n_new - tile * QUERY_TILE, QUERY_TILE)
                    oldest[0] = NEVER
                    for i in T.serial(QUERY_TILE):
                        token[i] = QI[b] + tile * QUERY_TILE + T.min(i, n_rows - 1)
                        QP[i] = POS[token[i]]
                        QE[i] = ENTER[token[i]]
                        oldest[0] = T.min(oldest[0], QP[i])
                        M[i] = T.float32(MASKED)
                        L[i] = T.float32(0)
                        for j in T.serial(vectors):
                            for v in T.vectorized(lanes):
                                O[i, j * lanes + v] = T.float32(0)
                    # Slots, counted from kv_start: the first any row sees, and one past the last.
                    first_block: T.let = T.max(oldest[0] - reach + 1 - START[b], 0) // KV_BLOCK
                    end: T.let = LENGTH[b] - START[b] + tile * QUERY_TILE + n_rows
                    n_blocks: T.let = (end + KV_BLOCK - 1) // KV_BLOCK - first_block
                    for chunk in T.serial((n_blocks + CHUNK - 1) // CHUNK):
                        base: T.let = first_block + chunk * CHUNK
                        here: T.let = T.min(n_blocks - chunk * CHUNK, CHUNK)
                        for j in T.serial(here * KV_BLOCK):
                            slot: T.let = base * KV_BLOCK + j
                            new: T.let = START[b] + slot - LENGTH[b]
                            if slot >= end:
                                KE[j] = NEVER
                                KL[j] = NEVER
                                KP[j] = NEVER
                            else:
                                if new < 0:
                                    KE[j] = ALWAYS
                                    KL[j] = NEVER
                                    KP[j] = START[b] + slot
                                else:
                                    KE[j] = ENTER[QI[b] + new]
                                    KL[j] = LEAVE[QI[b] + new]
                                    KP[j] = POS[QI[b] + new]
                        for c in T.serial(here):
                            kblock: T.let = T.Cast("int64", B[BI[b] + base + c])
                            scores(Q, K, S, KP, KE, KL, QP, QE, h, kblock, c, token, n_rows)
                        for i in T.serial(n_rows):
                            softmax(S, M, L, O, i, here)
                        for c in T.serial(here):
                            vblock: T.let = T.Cast("int64", B[BI[b] + base + c])
                            # Slots past the end hold nothing, not even zeros: 0 · NaN would stay.
                            tokens: T.let = T.min(end - (base + c) * KV_BLOCK, KV_BLOCK)
                            weighted_values(S, V, O, h // group, vblock, c, tokens, n_rows)
                    for i in T.serial(n_rows):
                        for j in T.serial(vectors):
                            for v in T.vectorized(lanes):
                                OUT[QI[b] + tile * QUERY_TILE + i, h * head_dim + j * lanes + v] = (
                                    O[i, j * lanes + v] / L[i]
                                )

    return hand_scheduled(func)
