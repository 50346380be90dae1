"""The parts that decode attention makes of a sequence's keys, and how they are joined (Dao et al.
2023, Flash-Decoding).

A part has 2^shift of the listed KV blocks: few, so that one short sequence keeps a large GPU
busy, and more in long contexts and large batches, so that joining stays cheap and memory small.
Part i of sequence b has place (block_indptr[b] >> shift) + b + i: room for all, and none overlap.
"""

from math import gcd

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from .kv_step import BLOCKS
from .limits import VECTOR
from .softmax import MASKED

_WORKGROUPS = 4096  # more make a large GPU no busier
_THREADS = 128
_SLICE = 32  # dimensions that a workgroup joins, at most
_AT_ONCE = 4  # parts that a thread asks of memory at once


def most_parts(kv_heads: int) -> int:
    """Of a batch, but for one more a sequence. A power of two, as graphs' block_ids are padded to
    one: with and without padding the parts are the same."""
    return 1 << (max(1, _WORKGROUPS // kv_heads).bit_length() - 1)


def part_shift(listed, kv_heads: int):
    """log2 of the KV blocks of a part, int32. listed: blocks of the batch, an int64 expression.

    From BLOCKS on, and 1 more for each doubling of the blocks that most_parts() have then: the
    exponent of a float, as kernels get a large expression of the host's in many pieces.
    """
    smallest = BLOCKS * most_parts(kv_heads)
    times = T.floordiv(listed + T.int64(smallest - 1), T.int64(smallest))
    odd = T.Cast("float32", times * T.int64(2) - T.int64(1))
    exponent = T.shift_right(T.reinterpret("int32", odd), T.int32(23)) - T.int32(127)
    return exponent + T.int32(BLOCKS.bit_length() - 1)


def places(listed, batch, kv_heads: int):
    """How many there are. The memory planner knows the other two of the three."""
    filled = T.shift_right(listed, T.Cast("int64", part_shift(listed, kv_heads)))
    most = T.min(T.floordiv(listed, T.int64(BLOCKS)), T.int64(most_parts(kv_heads)))
    return T.min(filled, most) + batch


def first_block(START, POS, b, window: int | None):
    """The first that a sequence's query sees, counted from kv_start."""
    return T.max(POS[b] - START[b] - ((window or 2**30) - 1), 0) // KV_BLOCK


def joined(heads: int, head_dim: int, dtype: str, window: int | None):
    """Returns the inline function `join`, a kernel.

    PO `[places, heads, head_dim]`: weighted values of parts, with PM `[places, heads]` as the
    score of weight 1, and PL the sums of weights → OUT `[b, heads·head_dim]`.
    """
    vector = gcd(VECTOR, head_dim)
    width = max(d for d in range(vector, _SLICE + 1, vector) if head_dim % d == 0)
    slices = head_dim // width
    columns = width // vector
    lanes = _THREADS // columns

    # Every lanes-th part from `part` on. Past the last: that again, whose weight will be zero.
    @T.inline
    def fetch(PO, PM, PL, o, m, l, part, first, last, head, dim):
        for i in T.unroll(_AT_ONCE):
            at = T.meta_var(T.min(first + part + i * lanes, last))
            m[i] = PM[at, head]
            l[i] = PL[at, head]
            for e in T.vectorized(vector):
                o[i * vector + e] = PO[at, head, dim + e]

    @T.inline
    def join_slice(BI, START, POS, PO, PM, PL, OUT, shift, b, head, first_dim, tx):
        """A slice of a head's dimensions: every lanes-th part is one thread's."""
        O = T.alloc_buffer((lanes * width,), "float32", scope="shared")
        M = T.alloc_buffer((lanes,), "float32", scope="shared")
        L = T.alloc_buffer((lanes,), "float32", scope="shared")
        o = T.alloc_buffer((_AT_ONCE * vector,), "float32", scope="local")
        m = T.alloc_buffer((_AT_ONCE,), "float32", scope="local")
        l = T.alloc_buffer((_AT_ONCE,), "float32", scope="local")
        acc = T.alloc_buffer((vector,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        best = T.alloc_buffer((1,), "float32", scope="local")
        top = T.alloc_buffer((1,), "float32", scope="local")
        parts = T.alloc_buffer((1,), "int32", scope="local")
        blocks: T.let = (POS[b] - START[b]) // KV_BLOCK - first_block(START, POS, b, window)
        parts[0] = T.shift_right(blocks, shift) + 1
        lane = T.meta_var(tx // columns)
        column = T.meta_var(tx % columns)
        dim = T.meta_var(first_dim + column * vector)
        first = T.meta_var(T.shift_right(BI[b], shift) + b)
        last = T.meta_var(first + parts[0] - 1)
        best[0] = T.float32(MASKED)
        total[0] = T.float32(0)
        for c in T.unroll(vector):
            acc[c] = T.float32(0)
        # What a step needs is asked for in the one before, and for the first before the loop: else
        # nvcc moves loads to their use, and waits for the scores first.
        fetch(PO, PM, PL, o, m, l, lane, first, last, head, dim)
        steps = T.meta_var((parts[0] + _AT_ONCE * lanes - 1) // (_AT_ONCE * lanes))
        for step in T.serial(steps):
            top[0] = best[0]
            for i in T.unroll(_AT_ONCE):
                top[0] = T.max(top[0], m[i])
            total[0] *= T.exp2(best[0] - top[0])
            for c in T.unroll(vector):
                acc[c] *= T.exp2(best[0] - top[0])
            for i in T.unroll(_AT_ONCE):
                m[i] = T.Select(
                    (step * _AT_ONCE + i) * lanes + lane < parts[0],
                    T.exp2(m[i] - top[0]),
                    T.float32(0),
                )
                total[0] += m[i] * l[i]
                for c in T.unroll(vector):
                    acc[c] += m[i] * o[i * vector + c]
            best[0] = top[0]
            if step + 1 < steps:
                part = T.meta_var((step + 1) * _AT_ONCE * lanes + lane)
                fetch(PO, PM, PL, o, m, l, part, first, last, head, dim)
        if lane < lanes:
            for c in T.vectorized(vector):
                O[lane * width + column * vector + c] = acc[c]
            if column == 0:
                M[lane] = best[0]
                L[lane] = total[0]
        if tx < width:
            top[0] = M[0]
            for i in T.unroll(lanes - 1):
                top[0] = T.max(top[0], M[i + 1])
            total[0] = T.float32(0)
            acc[0] = T.float32(0)
            for i in T.unroll(lanes):
                best[0] = T.exp2(M[i] - top[0])
                total[0] += best[0] * L[i]
                acc[0] += best[0] * O[i * width + tx]
            OUT[b, head * head_dim + first_dim + tx] = T.Cast(dtype, acc[0] / total[0])

    @T.inline
    def join(BI, START, POS, PO, PM, PL, OUT, shift, batch):
        for b in T.thread_binding(batch, thread="blockIdx.x"):
            for part_of in T.thread_binding(heads * slices, thread="blockIdx.y"):
                for tx in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    join_slice(
                        BI, START, POS, PO, PM, PL, OUT, shift, T.Cast("int32", b),
                        part_of // slices, part_of % slices * width, tx,
                    )  # fmt: skip

    return join
