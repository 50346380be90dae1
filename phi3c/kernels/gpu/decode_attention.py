"""Paged attention for one query token per sequence.

A workgroup takes a part of the keys of a sequence and some query heads of one key head. It goes
over them in steps of a few KV blocks (kv_step.py): scores, one softmax step, weighted values. The
parts of a sequence are joined in a second kernel (parts.py).
"""

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from ..root import hand_scheduled
from .kv_step import BLOCKS, KEYS, kv_step, shares_of
from .limits import VECTOR, GpuLimits, MatrixUnits
from .parts import first_block, joined, part_shift, places
from .ragged import find_sequence
from .softmax import MASKED, UNMASKED

_BANKS = 32  # of shared memory
_OCTET = 8  # scores that one thread compares, and such octets of a step
assert _OCTET**2 == KEYS


def decode_attention(
    limits: GpuLimits,
    matrix: MatrixUnits,
    dtype: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    window: int | None,
):
    """q `[b, heads·head_dim]` dtype (rotated, scaled by log2(e)/sqrt(head_dim)),
    pages `[blocks, 2, kv_heads, head_dim·16]`, block_indptr `[b+1]`, block_ids `[m]`,
    kv_start `[b]` (position of the first listed slot, a multiple of 16), positions `[b]` (of the
    query, whose key is already in its slot), all i32 → `[b, heads·head_dim]` dtype.

    A query at position p sees keys max(0, p − window + 1) … p (config field sliding_window).
    """
    group = heads // kv_heads
    shares = shares_of(limits, head_dim)
    kv = kv_step(shares, limits, matrix, kv_dtype)
    threads, vector, columns = shares.threads, shares.vector, shares.columns
    key_lanes, value_lanes = shares.key_lanes, shares.value_lanes
    padded = shares.key_vectors * key_lanes  # a query, with zeros

    def score_pitch(own: int) -> int:
        """Between two lanes' parts of scores: threads that write at once meet no bank twice."""
        return own * KEYS + _BANKS // 2

    def scratch(own: int) -> int:
        return max(key_lanes * score_pitch(own), value_lanes * own * head_dim)

    def fits(own: int) -> bool:
        floats = scratch(own) + own * (padded + 2 * KEYS + _OCTET + value_lanes + 2)
        return kv.shared_bytes + 4 * floats <= limits.shared_bytes and own * _OCTET <= threads

    # Query heads of a workgroup; more of them than shared memory has room for take turns.
    own = next(d for d in range(group, 0, -1) if group % d == 0 and (d == 1 or fits(d)))
    pitch = score_pitch(own)
    rounds = -(-own * KEYS // threads)
    join = joined(heads, head_dim, dtype, window)

    @T.inline
    def fetch_query(Q, QS, b, first, tx):
        for i in T.unroll((own * padded + threads - 1) // threads):
            e = T.meta_var(i * threads + tx)
            if e < own * padded:
                QS[e] = T.if_then_else(
                    e % padded < head_dim,
                    T.Cast("float32", Q[b, (first + e // padded) * head_dim + e % padded]),
                    T.float32(0),
                )

    @T.inline
    def scores(QS, k, vector_of, acc, PARTS, tx):
        """Of a thread's keys: what its dimensions add to them."""
        lane = T.meta_var(shares.key_lane(tx))
        for i in T.unroll(own * VECTOR):
            acc[i] = T.float32(0)
        for i in kv.loop(shares.key_vectors):
            kv.read_key(k, vector_of, i, tx)
            for g in T.unroll(own):
                q = T.meta_var(QS[g * padded + i * key_lanes + lane])
                for e in T.unroll(VECTOR):
                    acc[g * VECTOR + e] += q * T.Cast("float32", vector_of[e])
        for g in T.unroll(own):
            for e in T.vectorized(VECTOR):
                key = T.meta_var(shares.key_block(tx) * KV_BLOCK + shares.quad(tx) * VECTOR + e)
                PARTS[lane * pitch + g * KEYS + key] = acc[g * VECTOR + e]

    @T.inline
    def largest(S, at, some, top):
        """top[0] = the largest of it and OCTET values of S."""
        for i in T.unroll(_OCTET // VECTOR):
            for e in T.vectorized(VECTOR):
                some[e] = S[at + i * VECTOR + e]
            for e in T.unroll(VECTOR):
                top[0] = T.max(top[0], some[e])

    @T.inline
    def softmax_step(PARTS, S, TOP, W, F, best, some, top, first, last, tx):
        """PARTS → W, the keys' weights, and F, the factor of what is there already.

        The largest score is found in two rounds of a few, each by all threads that ask for it.
        """
        for r in T.unroll(rounds):
            s = T.meta_var(r * threads + tx)
            if s < own * KEYS:
                top[0] = T.float32(0)
                for i in T.unroll(key_lanes):
                    top[0] += PARTS[i * pitch + s]
                S[s] = T.Select(
                    T.And(first <= s % KEYS, s % KEYS <= last), top[0], T.float32(MASKED)
                )
        if tx < own * _OCTET:
            top[0] = T.float32(MASKED)
            largest(S, tx * _OCTET, some, top)
            TOP[tx] = top[0]
        for r in T.unroll(rounds):
            s = T.meta_var(r * threads + tx)
            if s < own * KEYS:
                top[0] = best[r]
                largest(TOP, s // KEYS * _OCTET, some, top)
                W[s] = T.Select(S[s] > T.float32(UNMASKED), T.exp2(S[s] - top[0]), T.float32(0))
                if s % KEYS == 0:
                    F[s // KEYS] = T.exp2(best[r] - top[0])
                best[r] = top[0]

    @T.inline
    def weighted_values(W, F, v, vector_of, O, L, some, tx):
        for g in T.unroll(own):
            L[g] *= F[g]
            for c in T.unroll(vector):
                O[g * vector + c] *= F[g]
        for i in kv.loop(shares.value_vectors // VECTOR):
            for j in T.unroll(VECTOR):
                kv.read_value(v, vector_of, j * vector, i * VECTOR + j, tx)
            for g in T.unroll(own):
                for j in T.vectorized(VECTOR):
                    some[j] = W[g * KEYS + tx // columns * shares.value_vectors + i * VECTOR + j]
                for j in T.unroll(VECTOR):
                    L[g] += some[j]
                    for c in T.unroll(vector):
                        O[g * vector + c] += some[j] * T.Cast("float32", vector_of[j * vector + c])

    @T.inline
    def attend(Q, P, K, V, BI, B, START, POS, PO, PM, PL, batch, shift, place, turn, tx):
        QS = T.alloc_buffer((own * padded,), "float32", scope="shared")
        PARTS = T.alloc_buffer((scratch(own),), "float32", scope="shared")
        S = T.alloc_buffer((own * KEYS,), "float32", scope="shared")
        TOP = T.alloc_buffer((own * _OCTET,), "float32", scope="shared")
        W = T.alloc_buffer((own * KEYS,), "float32", scope="shared")
        F = T.alloc_buffer((own,), "float32", scope="shared")
        M = T.alloc_buffer((own,), "float32", scope="shared")
        LS = T.alloc_buffer((value_lanes * own,), "float32", scope="shared")
        k = T.alloc_buffer((kv.keys,), kv_dtype, scope=kv.scope)
        v = T.alloc_buffer((kv.values,), kv_dtype, scope=kv.scope)
        seq = T.alloc_buffer((1,), "int32", scope="local")
        part = T.alloc_buffer((4,), "int32", scope="local")
        vector_of = T.alloc_buffer((VECTOR * VECTOR,), kv_dtype, scope="local")
        acc = T.alloc_buffer((own * VECTOR,), "float32", scope="local")
        O = T.alloc_buffer((own * vector,), "float32", scope="local")
        L = T.alloc_buffer((own,), "float32", scope="local")
        best = T.alloc_buffer((rounds,), "float32", scope="local")
        some = T.alloc_buffer((VECTOR,), "float32", scope="local")
        top = T.alloc_buffer((1,), "float32", scope="local")
        find_sequence(BI, shift, batch, place, seq)
        b: T.let = seq[0]
        nth: T.let = place - T.shift_right(BI[b], shift) - b
        block: T.let = first_block(START, POS, b, window) + T.shift_left(nth, shift)
        # The part's first block in the list, and its first and last key, counted from there.
        part[0] = BI[b] + block
        part[1] = POS[b] - START[b] - (window or 2**30) + 1 - block * KV_BLOCK
        part[2] = T.min(POS[b] - START[b] - block * KV_BLOCK, T.shift_left(KV_BLOCK, shift) - 1)
        part[3] = T.max(part[2] + KEYS, 0) // KEYS  # steps; none for a place that no part has
        for i in T.unroll(rounds):
            best[i] = T.float32(MASKED)
        for g in T.unroll(own):
            L[g] = T.float32(0)
            for c in T.unroll(vector):
                O[g * vector + c] = T.float32(0)
        for step in T.serial(part[3]):
            last = T.meta_var(part[2] - step * KEYS)
            at = T.meta_var(part[0] + step * BLOCKS)
            kv.fetch(P, K, V, B, k, v, at, T.min(last, KEYS - 1), turn * own // group, tx)
            if step == 0:
                fetch_query(Q, QS, b, turn * own, tx)
            kv.arrived()
            scores(QS, k, vector_of, acc, PARTS, tx)
            softmax_step(
                PARTS, S, TOP, W, F, best, some, top, part[1] - step * KEYS, last, tx
            )  # fmt: skip
            if tx < value_lanes * columns:
                weighted_values(W, F, v, vector_of, O, L, some, tx)
        lane = T.meta_var(tx // columns)
        column = T.meta_var(tx % columns)
        if tx < value_lanes * columns:
            for g in T.unroll(own):
                for c in T.vectorized(vector):
                    PARTS[(lane * own + g) * head_dim + column * vector + c] = O[g * vector + c]
                if column == 0:
                    LS[lane * own + g] = L[g]
        for r in T.unroll(rounds):
            if (r * threads + tx) % KEYS == 0 and r * threads + tx < own * KEYS:
                M[(r * threads + tx) // KEYS] = best[r]
        for i in T.unroll((own * head_dim + threads - 1) // threads):
            e = T.meta_var(i * threads + tx)
            if part[3] > 0 and e < own * head_dim:
                top[0] = T.float32(0)
                for j in T.unroll(value_lanes):
                    top[0] += PARTS[j * own * head_dim + e]
                PO[place, turn * own + e // head_dim, e % head_dim] = top[0]
        if part[3] > 0 and tx < own:
            top[0] = T.float32(0)
            for j in T.unroll(value_lanes):
                top[0] += LS[j * own + tx]
            PL[place, turn * own + tx] = top[0]
            PM[place, turn * own + tx] = M[tx]

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
        n_places = T.meta_var(places(listed, batch, kv_heads))
        PO = T.alloc_buffer((n_places, heads, head_dim), "float32")
        PM = T.alloc_buffer((n_places, heads), "float32")
        PL = T.alloc_buffer((n_places, heads), "float32")
        shift: T.let = part_shift(listed, kv_heads)
        for place in T.thread_binding(n_places, thread="blockIdx.x"):
            for turn in T.thread_binding(heads // own, thread="blockIdx.y"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    attend(
                        Q, P, K, V, BI, B, START, POS, PO, PM, PL, batch,
                        shift, T.Cast("int32", place), turn, tx,
                    )  # fmt: skip
        join(BI, START, POS, PO, PM, PL, OUT, shift, batch)

    return hand_scheduled(func)
