"""Brings tiles of x and W to shared memory as float16, for the matrix units (simdgroup_gemm.py, and
mma_gemm.py where W is quantized), in two moves: `fetch` to a thread's registers, still as stored,
and `put` from there to shared memory, dequantized. Between the two a kernel multiplies, so that
memory is waited for once, after the multiplications of the step before.

A tile has DEPTH input features of its rows, and two threads a row. It lies in shared memory in
vectors of CHUNK features; where, the kernel says: `at(row, chunk)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T

from ..layout import GROUP
from ..weight_format import GroupFormat, WeightFormat

DEPTH = GROUP  # input features between two barriers: one scale a row
CHUNK = 8  # features of a vector: what a matrix of 8 × 8 has in a row
_SHARE = DEPTH // 2  # features of a thread


@dataclass(frozen=True)
class HalfTile:
    """How one operand gets there.

    registers, register_dtype: of a thread, the buffer `raw`; beside it is `factor`, one float32.
    `fetch(M, raw, factor, last, first, step, tx)`: rows first …, past `last` that one again (what
    comes of it is not kept); M is X, or the tuple of the weight's buffers. Features past the last
    are zeros.
    `put(raw, factor, S, base, at, tx)`: to S[base + at(row, chunk) …].
    """

    registers: int
    register_dtype: str
    fetch: Callable
    put: Callable


def has_half_tiles(in_features: int, kind: WeightFormat, dtype: str) -> bool:
    """Whether products in float16 keep what these weights and activations hold, and rows are
    aligned vectors."""
    if dtype != "float16" or in_features % CHUNK:
        return False
    return isinstance(kind, GroupFormat) or kind == "float16"


def x_tile(rows: int, in_features: int, vector: int) -> HalfTile:
    """Of x `[n, in]` float16; `vector`: values that a load may fetch."""
    return _stored_half(rows, in_features, vector, lambda X: X)


def weight_tile(rows: int, in_features: int, kind: WeightFormat, vector: int) -> HalfTile:
    """Of a weight (weight.weight_buffers), `[out, in]`."""
    if isinstance(kind, GroupFormat):
        return _groups(kind, vector)
    return _stored_half(rows, in_features, vector, lambda W: W[0])


def _stored_half(rows: int, in_features: int, vector: int, matrix: Callable) -> HalfTile:
    """Four threads read 64 neighbouring bytes of a row; every thread has two rows."""
    chunks = DEPTH // CHUNK
    half = rows // 2  # threads / chunks
    whole = in_features % DEPTH == 0

    @T.inline
    def copy(M, raw, to, row, feature):
        for w in T.unroll(CHUNK // vector):
            for v in T.vectorized(vector):
                raw[to + w * vector + v] = matrix(M)[row, feature + w * vector + v]

    @T.inline
    def fetch(M, raw, factor, last, first, step, tx):
        for i in T.unroll(2):
            row = T.meta_var(T.min(first + i * half + tx // chunks, last))
            feature = T.meta_var(step * DEPTH + tx % chunks * CHUNK)
            if whole:
                copy(M, raw, i * CHUNK, row, feature)
            else:
                if feature < in_features:
                    copy(M, raw, i * CHUNK, row, feature)
                else:
                    for v in T.unroll(CHUNK):
                        raw[i * CHUNK + v] = T.float16(0)

    @T.inline
    def put(raw, factor, S, base, at, tx):
        for i in T.unroll(2):
            for w in T.unroll(CHUNK // vector):
                for v in T.vectorized(vector):
                    S[base + at(i * half + tx // chunks, tx % chunks) + w * vector + v] = raw[
                        i * CHUNK + w * vector + v
                    ]

    return HalfTile(2 * CHUNK, "float16", fetch, put)


def _groups(kind: GroupFormat, vector: int) -> HalfTile:
    """A thread has one half of a row's group.

    (1 + q/2^bits) − (1 + zero/2^bits) is made as in weight.py. Times the scale it is rounded once,
    to float16: with a float16 scale the product is exact in float32.
    """
    bits = kind.bits
    three = bits == 3
    top = 23 - bits  # where a mantissa has q
    words = 2 if three else _SHARE * bits // 32

    def moved(word, place: int, to: int):
        """The word, shifted so that bit `place` comes to be bit `to`."""
        if place > to:
            return T.shift_right(word, T.uint32(place - to))
        return T.shift_left(word, T.uint32(to - place)) if place < to else word

    def field(word, place: int, width: int, to: int):
        return T.bitwise_and(moved(word, place, to), T.uint32((2**width - 1) << to))

    def value(raw, v: int):
        """Of feature v of a thread, short of the factor."""
        if three:
            low, high = field(raw[0], 2 * v, 2, top), field(raw[1], v, 1, top + 2)
            mantissa = T.bitwise_or(low, high)
        else:
            per_word = 32 // bits
            mantissa = field(raw[v // per_word], v % per_word * bits, bits, top)
        near_one = T.bitwise_or(mantissa, T.uint32(0x3F800000))
        return T.reinterpret("float32", near_one) - T.float32(1 + kind.zero / 2**bits)

    @T.inline
    def read(W, raw, row, step, part):
        if three:
            raw[0] = W[0][row, step, part]
            raw[1] = T.shift_right(W[0][row, step, 2], T.Cast("uint32", part * _SHARE))
        else:
            for v in T.vectorized(words):
                raw[v] = W[0][row, step, part * words + v]

    @T.inline
    def fetch(W, raw, factor, last, first, step, tx):
        row: T.let = T.min(first + tx // 2, last)
        read(W, raw, row, step, tx % 2)
        factor[0] = T.Cast("float32", W[1][row, step]) * T.float32(2**bits)

    # Written out, as the shifts are chosen by Python: a loop's variable is none of its numbers.
    @T.inline
    def put_chunk(raw, factor, S, to, first):
        D = T.alloc_buffer((CHUNK,), "float16", scope="local")
        D[0] = T.Cast("float16", value(raw, first) * factor[0])
        D[1] = T.Cast("float16", value(raw, first + 1) * factor[0])
        D[2] = T.Cast("float16", value(raw, first + 2) * factor[0])
        D[3] = T.Cast("float16", value(raw, first + 3) * factor[0])
        D[4] = T.Cast("float16", value(raw, first + 4) * factor[0])
        D[5] = T.Cast("float16", value(raw, first + 5) * factor[0])
        D[6] = T.Cast("float16", value(raw, first + 6) * factor[0])
        D[7] = T.Cast("float16", value(raw, first + 7) * factor[0])
        for w in T.unroll(CHUNK // vector):
            for v in T.vectorized(vector):
                S[to + w * vector + v] = D[w * vector + v]

    @T.inline
    def put(raw, factor, S, base, at, tx):
        put_chunk(raw, factor, S, base + at(tx // 2, tx % 2 * 2), 0)
        put_chunk(raw, factor, S, base + at(tx // 2, tx % 2 * 2 + 1), CHUNK)

    return HalfTile(words, "uint32", fetch, put)
