"""Prefill attention on any GPU.

Blocked online softmax (Dao et al. 2022). A workgroup takes a tile of a sequence's query tokens and
one head; it goes over the keys in chunks: scores, the softmax's step, weighted values, which stay
in registers.
"""

import operator

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from .ragged import sequence_of
from .reduce import reduction
from .softmax import MASKED, UNMASKED
from .visible import NEVER, NO_WINDOW, key_of

QUERY_TILE = 16  # query tokens of a workgroup
CHUNK = 4  # KV blocks of a step
KEYS = CHUNK * KV_BLOCK
PER_ROW = 8  # threads of a row in the softmax
THREADS = QUERY_TILE * PER_ROW
SCORE_ROWS = QUERY_TILE * KEYS // THREADS  # scores of a thread, all of one key
LANES = 32  # threads over the dimensions of the values
VALUE_ROWS = QUERY_TILE * LANES // THREADS  # rows of a thread there


def portable_attention(
    dtype: str, heads: int, kv_heads: int, head_dim: int, kv_dtype: str, window: int | None
):
    """Returns the inline function `attend`, a kernel, as prefill_attention.py has it."""
    group = heads // kv_heads
    reach = window or NO_WINDOW
    dims = -(-head_dim // LANES)
    queries = QUERY_TILE * head_dim

    largest = reduction(T.max, MASKED)
    added = reduction(operator.add, 0.0)
    find = sequence_of(QUERY_TILE)

    @T.inline
    def scores(K, QS, S, QP, QE, key, seen, block, kvh, lane, column, side):
        """Of one key with SCORE_ROWS rows, from row side · SCORE_ROWS on."""
        acc = T.alloc_buffer((SCORE_ROWS,), "float32", scope="local")
        for r in T.unroll(SCORE_ROWS):
            acc[r] = T.float32(0)
        for d in T.serial(head_dim):
            k: T.let = T.if_then_else(
                seen, T.Cast("float32", K[block, 0, kvh, d, lane]), T.float32(0)
            )
            for r in T.unroll(SCORE_ROWS):
                acc[r] += QS[(side * SCORE_ROWS + r) * head_dim + d] * k
        for r in T.unroll(SCORE_ROWS):
            row = T.meta_var(side * SCORE_ROWS + r)
            S[row * KEYS + column] = T.Select(
                T.And(
                    T.And(key[1] <= QE[row], QE[row] < key[2]),
                    key[0] > QP[row] - reach,
                ),
                acc[r],
                T.float32(MASKED),
            )

    @T.inline
    def softmax_step(S, A, best, total, top, sum, row, tx):
        """The scores of a row become weights; A[row]: the factor of what is there already.

        They are kept in registers between, as every turn from reading to writing is a barrier.
        """
        score = T.alloc_buffer((KEYS // PER_ROW,), "float32", scope="local")
        mine = T.alloc_buffer((2,), "float32", scope="local")
        mine[0] = T.float32(MASKED)
        for i in T.unroll(KEYS // PER_ROW):
            score[i] = S[row * KEYS + i * PER_ROW + tx]
            mine[0] = T.max(mine[0], score[i])
        largest(mine[0], top, tx)
        mine[0] = T.max(best[0], top[0])
        mine[1] = T.float32(0)
        for i in T.unroll(KEYS // PER_ROW):
            score[i] = T.Select(
                score[i] > T.float32(UNMASKED), T.exp2(score[i] - mine[0]), T.float32(0)
            )
            mine[1] += score[i]
        added(mine[1], sum, tx)
        for i in T.unroll(KEYS // PER_ROW):
            S[row * KEYS + i * PER_ROW + tx] = score[i]
        factor: T.let = T.exp2(best[0] - mine[0])
        total[0] = total[0] * factor + sum[0]
        best[0] = mine[0]
        A[row] = factor

    @T.inline
    def weighted_values(V, S, A, O, B, at, here, kvh, first_row, lane):
        for r in T.unroll(VALUE_ROWS):
            for i in T.unroll(dims):
                O[r * dims + i] *= A[first_row + r]
        for t in T.serial(here):
            block: T.let = B[at + t // KV_BLOCK]
            v = T.alloc_buffer((dims,), "float32", scope="local")
            for i in T.unroll(dims):
                v[i] = T.if_then_else(
                    i * LANES + lane < head_dim,
                    T.Cast("float32", V[block, 1, kvh, t % KV_BLOCK, i * LANES + lane]),
                    T.float32(0),
                )
            for r in T.unroll(VALUE_ROWS):
                for i in T.unroll(dims):
                    O[r * dims + i] += S[(first_row + r) * KEYS + t] * v[i]

    @T.inline
    def attend(Q, P, QI, BI, B, START, LENGTH, POS, ENTER, LEAVE, OUT, n, batch):
        K = T.decl_buffer((P.shape[0], 2, kv_heads, head_dim, KV_BLOCK), kv_dtype, data=P.data)
        V = T.decl_buffer((P.shape[0], 2, kv_heads, KV_BLOCK, head_dim), kv_dtype, data=P.data)
        for place in T.thread_binding(n // QUERY_TILE + batch, thread="blockIdx.x"):
            for h in T.thread_binding(heads, thread="blockIdx.y"):
                for ty in T.thread_binding(QUERY_TILE, thread="threadIdx.y"):
                    for tx in T.thread_binding(PER_ROW, thread="threadIdx.x"):
                        QS = T.alloc_buffer((queries,), "float32", scope="shared")
                        S = T.alloc_buffer((QUERY_TILE * KEYS,), "float32", scope="shared")
                        QP = T.alloc_buffer((QUERY_TILE,), "int32", scope="shared")
                        QE = T.alloc_buffer((QUERY_TILE,), "int32", scope="shared")
                        A = T.alloc_buffer((QUERY_TILE,), "float32", scope="shared")
                        mine = T.alloc_buffer((1,), "int32", scope="local")
                        oldest = T.alloc_buffer((1,), "int32", scope="local")
                        key = T.alloc_buffer((3,), "int32", scope="local")
                        best = T.alloc_buffer((1,), "float32", scope="local")
                        total = T.alloc_buffer((1,), "float32", scope="local")
                        top = T.alloc_buffer((1,), "float32", scope="local")
                        sum = T.alloc_buffer((1,), "float32", scope="local")
                        O = T.alloc_buffer((VALUE_ROWS * dims,), "float32", scope="local")
                        flat: T.let = ty * PER_ROW + tx
                        find(QI, batch, T.Cast("int32", place), mine)
                        b: T.let = mine[0]
                        tile: T.let = T.Cast("int32", place) - QI[b] // QUERY_TILE - b
                        first: T.let = QI[b] + tile * QUERY_TILE
                        # None for a place that no tile has.
                        n_rows: T.let = T.max(T.min(QI[b + 1] - first, QUERY_TILE), 0)
                        last: T.let = T.max(n_rows - 1, 0)
                        for i in T.serial((queries + THREADS - 1) // THREADS):
                            e: T.let = i * THREADS + flat
                            if e < queries:
                                row: T.let = T.min(first + T.min(e // head_dim, last), n - 1)
                                QS[e] = T.Cast("float32", Q[row, h * head_dim + e % head_dim])
                        own: T.let = T.min(first + T.min(ty, last), n - 1)
                        QP[ty] = POS[own]
                        QE[ty] = ENTER[own]
                        best[0] = T.float32(MASKED)
                        total[0] = T.float32(0)
                        for i in T.unroll(VALUE_ROWS * dims):
                            O[i] = T.float32(0)
                        oldest[0] = NEVER
                        for i in T.serial(QUERY_TILE):
                            oldest[0] = T.min(oldest[0], QP[i])
                        # Slots, counted from kv_start: the first any row sees, one past the last.
                        first_block: T.let = T.max(oldest[0] - reach + 1 - START[b], 0) // KV_BLOCK
                        end: T.let = LENGTH[b] - START[b] + tile * QUERY_TILE + n_rows
                        n_blocks: T.let = (end + KV_BLOCK - 1) // KV_BLOCK - first_block
                        steps: T.let = T.if_then_else(
                            n_rows > 0, (n_blocks + CHUNK - 1) // CHUNK, 0
                        )
                        for step in T.serial(steps):
                            base: T.let = first_block + step * CHUNK
                            column: T.let = flat % KEYS
                            slot: T.let = base * KV_BLOCK + column
                            nth: T.let = START[b] + slot - LENGTH[b]
                            key_of(
                                slot, nth, end, START[b] + slot, QI, POS, ENTER, LEAVE, b, key
                            )  # fmt: skip
                            seen: T.let = slot < end
                            block: T.let = T.if_then_else(seen, B[BI[b] + slot // KV_BLOCK], 0)
                            scores(
                                K, QS, S, QP, QE, key, seen, block, h // group,
                                column % KV_BLOCK, column, flat // KEYS,
                            )  # fmt: skip
                            softmax_step(S, A, best, total, top, sum, ty, tx)
                            # Slots past the end hold nothing, not even zeros: 0 · NaN would stay.
                            here: T.let = T.min(end - base * KV_BLOCK, KEYS)
                            weighted_values(
                                V, S, A, O, B, BI[b] + base, here, h // group,
                                flat // LANES * VALUE_ROWS, flat % LANES,
                            )  # fmt: skip
                        A[ty] = total[0]
                        for r in T.unroll(VALUE_ROWS):
                            row: T.let = flat // LANES * VALUE_ROWS + r
                            for i in T.unroll(dims):
                                d: T.let = i * LANES + flat % LANES
                                if row < n_rows and d < head_dim:
                                    OUT[first + row, h * head_dim + d] = T.Cast(
                                        dtype, O[r * dims + i] / A[row]
                                    )

    return attend
