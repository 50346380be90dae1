"""Prefill attention by CUDA's tensor cores: FlashAttention-2 (Dao 2023) with mma.sync m16n8k16,
float16 with float32 sums, on float16 pages.

A warp has all keys of its own query rows, so that the softmax stays in its registers: a row's
scores are in four neighbouring threads, and what the first product leaves in a thread is what the
second takes of it. Keys and values come to shared memory by cp.async, each while the other one is
multiplied. Both lie in their pages as the second operand wants them transposed: keys `[head_dim,
16]`, values `[16, head_dim]`.

Layouts are those of the PTX ISA (mma_gemm.py). Needs compute capability 8.0 and warps of 32.
"""

from math import gcd

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from .limits import GpuLimits
from .ragged import sequence_of
from .softmax import MASKED, UNMASKED
from .visible import NEVER, NO_WINDOW, key_of

_WARP = 32
_WARPS = 4
THREADS = _WARPS * _WARP
KEYS = 64  # of a step
_BLOCKS = KEYS // KV_BLOCK
_COPIERS = THREADS // _BLOCKS  # threads that bring a KV block
_VECTOR = 8  # halves of a copy: 16 bytes
_ALL = 0xFFFFFFFF  # lanes

# Query rows of a workgroup. Of LARGE a warp has 32, and reads a fragment of keys or values from
# shared memory for two multiplications; its sums and scores fill the registers at 96 dimensions.
SMALL, LARGE = _WARPS * 16, _WARPS * 32
_LARGEST = {SMALL: 128, LARGE: 96}  # head_dim
_BUSY = 256  # workgroups that a large GPU wants


def rows_of_large(heads: int, head_dim: int) -> int | None:
    """From more rows than this on, LARGE tiles are enough to keep a large GPU busy; None: never."""
    return _BUSY // heads * LARGE if head_dim <= _LARGEST[LARGE] else None


def has_mma_attention(limits: GpuLimits, head_dim: int, dtype: str, kv_dtype: str) -> bool:
    """Whether products in float16 keep what queries and pages hold, and a workgroup has room."""
    if dtype != "float16" or kv_dtype != "float16" or head_dim % 16 or head_dim > _LARGEST[SMALL]:
        return False
    rows = LARGE if head_dim <= _LARGEST[LARGE] else SMALL
    return shared_bytes(rows, head_dim) <= limits.shared_bytes and THREADS <= limits.threads


def shared_bytes(rows: int, head_dim: int) -> int:
    return (rows + 2 * KEYS) * head_dim * 2


def _place(width: int, row, chunk):
    """Of a vector in shared memory, in halves; a row has `width` vectors, an even number.

    Each row of 8 that ldmatrix reads together gets 4 banks of its own: rows that begin at the same
    bank have their vectors exchanged, each in another way.
    """
    apart = gcd(width, 8)  # rows of 8 that begin at the same bank
    return (row * width + T.bitwise_xor(chunk, row // (8 // apart) % apart)) * _VECTOR


def from_thread(value, lane):
    return T.tvm_warp_shuffle(T.uint32(_ALL), value, lane, _WARP, _WARP)


def neighbour(value, other):
    """That of the thread whose number differs in these bits."""
    return T.tvm_warp_shuffle_xor(T.uint32(_ALL), value, other, _WARP, _WARP)


def mma_attention(rows: int, heads: int, kv_heads: int, head_dim: int, window: int | None):
    """Returns the inline function `attend`, a kernel, as prefill_attention.py has it.

    rows: SMALL or LARGE.
    """
    group = heads // kv_heads
    reach = window or NO_WINDOW
    unused = 0 if window else 1  # of a key's position, enter and leave: without a window the first
    down = rows // (_WARPS * 16)  # fragments of 16 rows of a warp
    depth = head_dim // 16  # multiplications along the dimensions
    across = KEYS // 8  # fragments of scores
    wide = head_dim // 8  # fragments of weighted values
    block_halves = KV_BLOCK * head_dim
    copies = 2 * head_dim // _COPIERS  # of a thread
    find = sequence_of(rows)

    @T.inline
    def fetch_queries(Q, q, first, last, h, tx):
        for i in T.unroll(rows * wide // THREADS):
            c = T.meta_var(i * THREADS + tx)
            r = T.meta_var(first + T.min(c // wide, last))
            T.ptx["cp.async.cg.shared.global"](
                q.access_ptr("w", offset=_place(wide, c // wide, c % wide)),
                T.address_of(Q[r, h * head_dim + c % wide * _VECTOR]),
                16,
            )

    # held: how many slots of a block hold something. What is past them comes as zeros, as memory
    # there may be NaN: of a copy of 8 keys the end.
    @T.inline
    def fetch_keys(P, K, block, kvh, held, tx):
        bytes: T.let = T.Cast("uint32", T.max(T.min(held - tx % 2 * _VECTOR, _VECTOR), 0) * 2)
        for i in T.unroll(copies):
            c = T.meta_var(i * _COPIERS + tx % _COPIERS)
            to = T.meta_var(tx // _COPIERS * block_halves + _place(2, c // 2, c % 2))
            T.ptx["cp.async.cg.shared.global"](
                K.access_ptr("w", offset=to),
                T.address_of(P[block, 0, kvh, c * _VECTOR]),
                16,
                bytes,
            )
        T.ptx["cp.async.commit_group"]()

    @T.inline
    def fetch_values(P, V, block, kvh, held, tx):
        for i in T.unroll(copies):
            c = T.meta_var(i * _COPIERS + tx % _COPIERS)
            to = T.meta_var(tx // _COPIERS * block_halves + _place(wide, c // wide, c % wide))
            T.ptx["cp.async.cg.shared.global"](
                V.access_ptr("w", offset=to),
                T.address_of(P[block, 1, kvh, c * _VECTOR]),
                16,
                T.Select(c // wide < held, T.uint32(16), T.uint32(0)),
            )
        T.ptx["cp.async.commit_group"]()

    @T.inline
    def arrived():
        """All that this workgroup fetches."""
        T.ptx["cp.async.wait_group"](0)
        T.tvm_storage_sync("shared")

    def visible(key, position, late, early):
        """Whether a query sees a key: late and early are its `enter`. Whether one of several does:
        the first of their positions, the last and the first `enter`; whether all do: the others."""
        between = T.And(key[1] <= late, early < key[2])
        return T.And(between, key[0] > position - reach) if window else between

    def across_warp(operator):
        @T.inline
        def reduce(x):
            for i in T.unroll(5):
                x[0] = operator(x[0], neighbour(x[0], T.shift_left(1, i)))

        return reduce

    least_of_warp, most_of_warp = across_warp(T.min), across_warp(T.max)

    # seen: the smallest and largest position, then `enter`, of a warp's rows.
    @T.inline
    def row_range(POS, ENTER, seen, first, last, row, lane):
        for s in T.unroll(2):
            least = T.alloc_buffer((1,), "int32", scope="local")
            most = T.alloc_buffer((1,), "int32", scope="local")
            r: T.let = first + T.min(row + T.min(lane, 16 * down - 1), last)
            least[0] = T.Select(s == 0, POS[r], ENTER[r])
            most[0] = least[0]
            least_of_warp(least)
            most_of_warp(most)
            seen[s * 2] = least[0]
            seen[s * 2 + 1] = most[0]

    # A warp's rows by the j-th pair of fragments; sums has `width` fragments for 16 rows.
    @T.inline
    def add_products(a, b, sums, width, j):
        for f in T.unroll(2):
            for i in T.unroll(down):
                T.ptx_legacy.mma(
                    "m16n8k16", "row", "col", "fp16", "fp16", "fp32",
                    a.data, i * 8, b.data, f * 4,
                    sums.data, (i * width + j * 2 + f) * 4, False, dtype="float32",
                )  # fmt: skip

    # A fragment of Q, 16 × 16: matrices of rows 0–7 and 8–15, then of dimensions 8–15. Two of K,
    # each 8 keys × 16: matrices of dimensions 0–7 and 8–15, then of the keys after, transposed.
    @T.inline
    def scores(q, K, S, row, lane):
        for k in T.unroll(depth):
            a = T.alloc_buffer((down * 8,), "float16", scope="local")
            for i in T.unroll(down):
                T.ptx_legacy.ldmatrix(
                    False, 4, ".b16", a.data, i * 8, q.data,
                    _place(wide, row + i * 16 + lane % 16, k * 2 + lane // 16), dtype="float16",
                )  # fmt: skip
            for j in T.unroll(across // 2):
                b = T.alloc_buffer((8,), "float16", scope="local")
                T.ptx_legacy.ldmatrix(
                    True, 4, ".b16", b.data, 0, K.data,
                    j * block_halves + _place(2, k * 16 + lane % 16, lane // 16), dtype="float16",
                )  # fmt: skip
                add_products(a, b, S, across, j)

    # What scores begin with: MASKED stays as it is whatever product is added. Of a fragment of
    # them a thread has two neighbours of row lane / 4, then of the 8th row from it.
    @T.inline
    def mask(POS, ENTER, S, key, first, last, row, lane):
        place = T.alloc_buffer((down * 2,), "int32", scope="local")
        order = T.alloc_buffer((down * 2,), "int32", scope="local")
        for i in T.unroll(down * 2):
            r: T.let = first + T.min(row + i * 8 + lane // 4, last)
            place[i] = POS[r]
            order[i] = ENTER[r]
        for j in T.unroll(across):
            for p in T.unroll(2):
                k = T.alloc_buffer((3,), "int32", scope="local")
                for e in T.unroll(3 - unused):
                    k[unused + e] = from_thread(
                        key[j // 4 * 3 + unused + e], j % 4 * 8 + lane % 4 * 2 + p
                    )
                for i in T.unroll(down * 2):
                    S[(i // 2 * across + j) * 4 + i % 2 * 2 + p] = T.Select(
                        visible(k, place[i], order[i], order[i]),
                        T.float32(0),
                        T.float32(MASKED),
                    )

    @T.inline
    def softmax_step(S, O, best, total):
        """Scores become weights; what is there already is scaled to the row's new maximum."""
        for i in T.unroll(down):
            for g in T.unroll(2):
                row = T.meta_var(i * 2 + g)
                top = T.alloc_buffer((1,), "float32", scope="local")
                factor = T.alloc_buffer((1,), "float32", scope="local")
                top[0] = best[row]
                for j in T.unroll(across):
                    for p in T.unroll(2):
                        top[0] = T.max(top[0], S[(i * across + j) * 4 + g * 2 + p])
                for x in T.unroll(2):
                    top[0] = T.max(top[0], neighbour(top[0], x + 1))
                # Where a row has seen nothing yet, weights are to be 0, not 2^(MASKED − MASKED).
                used: T.let = T.Select(top[0] > T.float32(UNMASKED), top[0], T.float32(0))
                T.ptx["ex2.approx.ftz.f32"](factor[0], best[row] - used)
                best[row] = top[0]
                total[row] = total[row] * factor[0]
                for j in T.unroll(across):
                    for p in T.unroll(2):
                        s = T.meta_var((i * across + j) * 4 + g * 2 + p)
                        T.ptx["ex2.approx.ftz.f32"](S[s], S[s] - used)
                        total[row] = total[row] + S[s]
                for j in T.unroll(wide):
                    for p in T.unroll(2):
                        o = T.meta_var((i * wide + j) * 4 + g * 2 + p)
                        O[o] = O[o] * factor[0]

    # Two fragments of scores that are neighbours lie in a thread as one of the first operand.
    @T.inline
    def weighted_values(V, S, O, lane):
        for k in T.unroll(KEYS // 16):
            w = T.alloc_buffer((down * 8,), "float16", scope="local")
            for i in T.unroll(down):
                for e in T.unroll(8):
                    w[i * 8 + e] = T.Cast("float16", S[(i * across + k * 2) * 4 + e])
            for j in T.unroll(wide // 2):
                b = T.alloc_buffer((8,), "float16", scope="local")
                T.ptx_legacy.ldmatrix(
                    True, 4, ".b16", b.data, 0, V.data,
                    k * block_halves + _place(wide, lane % 16, j * 2 + lane // 16), dtype="float16",
                )  # fmt: skip
                add_products(w, b, O, wide, j)

    @T.inline
    def store(OUT, O, total, first, n_rows, row, h, lane):
        for i in T.unroll(down):
            for g in T.unroll(2):
                sum = T.alloc_buffer((1,), "float32", scope="local")
                part = T.alloc_buffer((1,), "float32", scope="local")
                sum[0] = total[i * 2 + g]
                for x in T.unroll(2):
                    sum[0] = sum[0] + neighbour(sum[0], x + 1)
                T.ptx["rcp.approx.ftz.f32"](part[0], sum[0])
                r: T.let = row + i * 16 + g * 8 + lane // 4
                if r < n_rows:
                    for j in T.unroll(wide):
                        for v in T.vectorized(2):
                            OUT[first + r, h * head_dim + j * 8 + lane % 4 * 2 + v] = T.Cast(
                                "float16", O[(i * wide + j) * 4 + g * 2 + v] * part[0]
                            )

    # Two keys of a step for every thread of a warp; some: whether a row of the warp sees one, all:
    # whether each row sees all of them.
    @T.inline
    def look(QI, POS, ENTER, LEAVE, seen, key, some, all, b, slot, new, end, start, lane):
        some[0] = 0
        all[0] = 1
        for i in T.unroll(2):
            one = T.alloc_buffer((3,), "int32", scope="local")
            mine: T.let = slot + i * _WARP + lane
            key_of(mine, mine - new, end, start + mine, QI, POS, ENTER, LEAVE, b, one)
            for e in T.unroll(3):
                key[i * 3 + e] = one[e]
            some[0] = T.Select(visible(one, seen[0], seen[3], seen[2]), 1, some[0])
            all[0] = T.Select(visible(one, seen[1], seen[2], seen[3]), all[0], 0)

    # The barriers are all here, and TVM's own are off: it does not know what the copies write.
    @T.inline
    def attend(Q, P, QI, BI, B, START, LENGTH, POS, ENTER, LEAVE, OUT, n, batch):
        for bx in T.thread_binding(n // rows + batch, thread="blockIdx.x"):
            for h in T.thread_binding(heads, thread="blockIdx.y"):
                for tx in T.thread_binding(THREADS, thread="threadIdx.x"):
                    K = T.alloc_buffer((KEYS * head_dim,), "float16", scope="shared")
                    V = T.alloc_buffer((KEYS * head_dim,), "float16", scope="shared")
                    q = T.alloc_buffer((rows * head_dim,), "float16", scope="shared")
                    S = T.alloc_buffer((down * across * 4,), "float32", scope="local")
                    O = T.alloc_buffer((down * wide * 4,), "float32", scope="local")
                    best = T.alloc_buffer((down * 2,), "float32", scope="local")
                    total = T.alloc_buffer((down * 2,), "float32", scope="local")
                    key = T.alloc_buffer((6,), "int32", scope="local")
                    seen = T.alloc_buffer((4,), "int32", scope="local")
                    found = T.alloc_buffer((1,), "int32", scope="local")
                    oldest = T.alloc_buffer((1,), "int32", scope="local")
                    block = T.alloc_buffer((1,), "int32", scope="local")
                    steps = T.alloc_buffer((1,), "int32", scope="local")
                    some = T.alloc_buffer((1,), "int32", scope="local")
                    all = T.alloc_buffer((1,), "int32", scope="local")
                    with T.attr(0, "hand_threaded", 0):
                        # Of a prompt the last tiles have the most keys: they begin first.
                        place: T.let = T.Cast("int32", n // rows + batch - 1 - bx)
                        find(QI, batch, place, found)
                        b: T.let = found[0]
                        tile: T.let = place - QI[b] // rows - b
                        # None for a place that no tile has.
                        n_rows: T.let = T.max(T.min(QI[b + 1] - QI[b] - tile * rows, rows), 0)
                        last: T.let = T.max(n_rows - 1, 0)
                        first: T.let = T.min(QI[b] + tile * rows, T.Cast("int32", n) - 1 - last)
                        lane: T.let = tx % _WARP
                        row: T.let = tx // _WARP * (16 * down)
                        kvh: T.let = h // group
                        # Slots, counted from kv_start: the first any row sees, one past the last.
                        oldest[0] = NEVER
                        for i in T.unroll(rows // _WARP):
                            oldest[0] = T.min(oldest[0], POS[first + T.min(i * _WARP + lane, last)])
                        least_of_warp(oldest)
                        row_range(POS, ENTER, seen, first, last, row, lane)
                        base: T.let = T.max(oldest[0] - reach + 1 - START[b], 0) // KV_BLOCK
                        end: T.let = LENGTH[b] - START[b] + tile * rows + n_rows
                        n_blocks: T.let = (end + KV_BLOCK - 1) // KV_BLOCK
                        # Of one thread: so the compiler knows that a warp stays together.
                        steps[0] = from_thread(
                            T.Select(n_rows > 0, (n_blocks - base + _BLOCKS - 1) // _BLOCKS, 0), 0
                        )
                        for i in T.unroll(down * 2):
                            best[i] = T.float32(MASKED)
                            total[i] = T.float32(0)
                        for i in T.unroll(down * wide * 4):
                            O[i] = T.float32(0)
                        if steps[0] > 0:
                            own: T.let = base + tx // _COPIERS
                            block[0] = B[BI[b] + T.min(own, n_blocks - 1)]
                            fetch_queries(Q, q, first, last, h, tx)
                            fetch_keys(P, K, block[0], kvh, end - own * KV_BLOCK, tx)
                        for step in T.serial(steps[0]):
                            at: T.let = base + step * _BLOCKS
                            look(
                                QI, POS, ENTER, LEAVE, seen, key, some, all, b,
                                at * KV_BLOCK, LENGTH[b] - START[b], end, START[b], lane,
                            )  # fmt: skip
                            some[0] = T.cuda.any_sync(
                                T.uint32(_ALL), T.Select(row < n_rows, some[0], 0)
                            )
                            if some[0] != 0:
                                if T.cuda.any_sync(T.uint32(_ALL), 1 - all[0]) != 0:
                                    mask(POS, ENTER, S, key, first, last, row, lane)
                                else:
                                    for i in T.unroll(down * across * 4):
                                        S[i] = T.float32(0)
                            arrived()
                            fetch_values(
                                P, V, block[0], kvh, end - (at + tx // _COPIERS) * KV_BLOCK, tx
                            )
                            if some[0] != 0:
                                scores(q, K, S, row, lane)
                                softmax_step(S, O, best, total)
                            arrived()
                            if step + 1 < steps[0]:
                                next: T.let = at + _BLOCKS + tx // _COPIERS
                                block[0] = B[BI[b] + T.min(next, n_blocks - 1)]
                                fetch_keys(P, K, block[0], kvh, end - next * KV_BLOCK, tx)
                            if some[0] != 0:
                                weighted_values(V, S, O, lane)
                        store(OUT, O, total, first, n_rows, row, h, lane)

    return attend
