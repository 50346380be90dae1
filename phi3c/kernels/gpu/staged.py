"""Operands of skinny_gemm.py: brought to shared memory by cp.async as they are stored, several
stages ahead, and made from there, in a thread's registers, to what mma.sync m16n8k16 takes.

The weight is the first operand, 16 output features of it, x the second one, of 8 rows. A stage has
STEP input features. Beside float16 weights they come in order, by ldmatrix. But which of them the
instruction counts as which is free, as long as both operands agree: beside quantized weights thread
t of the four that share a row has features 16t … 16t + 15 in four multiplications, four of them in
each. They are half of a group, and two vectors of x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm.script import tirx as T

from ..layout import GROUP
from ..weight_format import GroupFormat, WeightFormat
from .async_copy import CHUNK, async_copy, half_rows

STEP = 64  # input features
MULTIPLICATIONS = STEP // 16  # of a stage
_GROUPS = STEP // GROUP  # of a row
_WORDS = 4  # of a vector of 8 float16
_CHUNKS = STEP // CHUNK  # vectors of a row of float16
_ROW = STEP // 2  # its words
KEPT = 5


@dataclass(frozen=True)
class StagedTile:
    """words: uint32 of a stage.

    `fetch(M, S, base, last, first, step, tx)`: the rows first … of M (X, or the tuple of the
    weight's buffers) to S[base …], cp.async without its commit; rows past `last` are zeros, as
    features past the last.
    `keep(lane, k)`: what `read` needs in k, KEPT registers, from the beginning on.
    `read(S, base, row, lane, k, to)`: the rows row … row + 7 of x, or row + 15 of a weight, as the
    operands of MULTIPLICATIONS, two or four uint32 of a thread for each.
    """

    words: int
    fetch: Callable
    keep: Callable
    read: Callable


def has_stages(in_features: int, kind: WeightFormat) -> bool:
    """Of weights that have half_tile.has_half_tiles: whether copies are aligned, and float16
    suffices on the way."""
    if isinstance(kind, GroupFormat):
        return kind.scale_dtype == "float16" and in_features % STEP == 0
    return True


def staged_x(rows: int, threads: int, in_features: int, kind: WeightFormat) -> StagedTile:
    """Of x `[n, in]` float16, for a workgroup, and beside a weight of that kind."""

    @T.inline
    def read_in_order(S, base, row, lane, k, to):
        for m in T.unroll(MULTIPLICATIONS // 2):
            T.ptx_legacy.ldmatrix(
                False, 4, ".b16", to.data, m * 4, S.data,
                base + _place(row + lane % 8, m * 4 + lane // 8), dtype="float16",
            )  # fmt: skip

    @T.inline
    def read_vectors(S, base, row, lane, k, to):
        for c in T.unroll(2):
            at = T.meta_var(base + _place(row + lane // 4, lane % 4 * 2 + c))
            for w in T.vectorized(_WORDS):
                to[c * _WORDS + w] = S[at + w]

    read = read_vectors if isinstance(kind, GroupFormat) else read_in_order
    fetch = half_rows(rows, threads, STEP, in_features, lambda X: X, _place)
    return StagedTile(rows * _ROW, fetch, _nothing, read)


def staged_weight(rows: int, threads: int, in_features: int, kind: WeightFormat) -> StagedTile:
    """Of a weight (weight.weight_buffers), `[out, in]`."""
    if isinstance(kind, GroupFormat):
        return _groups(rows, threads, kind)

    @T.inline
    def read(S, base, row, lane, k, to):
        for m in T.unroll(MULTIPLICATIONS):
            T.ptx_legacy.ldmatrix(
                False, 4, ".b16", to.data, m * 4, S.data,
                base + _place(row + lane % 16, m * 2 + lane // 16), dtype="float16",
            )  # fmt: skip

    fetch = half_rows(rows, threads, STEP, in_features, lambda W: W[0], _place)
    return StagedTile(rows * _ROW, fetch, _nothing, read)


@T.inline
def _nothing(lane, k):
    pass


def _place(row, chunk):
    """Of a vector of float16, in words. A row has all banks once. What is read at once, the same
    vector of 8 rows or all even or odd ones of two rows, is in different banks."""
    return row * _ROW + T.bitwise_xor(chunk, row % _CHUNKS) * _WORDS


def _kept(value, lane):
    """A constant that stays in a register: it comes from thread 0, as if others had another one.
    Else the compiler writes it anew for each use, as instructions take one that is not in a
    register at most, and this is the second one."""
    own = value + T.Cast("uint32", lane)
    return T.tvm_warp_shuffle(T.uint32(0xFFFFFFFF), own, 0, 32, 32)


def _pair(low: float, high: float):
    """Two float16, as a word."""
    halves = np.array([low, high], np.float16)
    assert (halves == [low, high]).all()
    return T.uint32(int(halves.view(np.uint32)[0]))


def _groups(rows: int, threads: int, kind: GroupFormat) -> StagedTile:
    """A stage: the words of a row's two groups as they are, row by row; then two scales a row.

    1024 + q is a float16 with q in its low bits. From there q − zero is exact, and its product with
    the scale is rounded once: to what half_tile.py makes by way of float32.
    """
    bits, zero = kind.bits, kind.zero
    words = _GROUPS * bits  # of a row
    size = 4 if words % 4 == 0 else 2  # words of a copy
    per_row = words // size
    copies = -(-rows * per_row // threads)
    whole = copies * threads == rows * per_row
    scales = rows * words  # where they begin
    copy, copy_scales = async_copy(4 * size), async_copy(4)
    permute, add, multiply, multiply_add = (
        T.ptx[name] for name in ("prmt.b32", "add.rn.f16x2", "mul.rn.f16x2", "fma.rn.f16x2")
    )
    thousand = _pair(1024, 1024)
    assert rows <= threads

    @T.inline
    def copy_words(W, S, base, last, first, step, c):
        row = T.meta_var(first + c // per_row)
        word = T.meta_var(c % per_row * size)
        copy(
            S.access_ptr("w", offset=base + c * size),
            T.address_of(W[0][T.min(row, last), step * _GROUPS + word // bits, word % bits]),
            4 * size,
            T.Select(row <= last, T.uint32(4 * size), T.uint32(0)),
        )

    @T.inline
    def fetch(W, S, base, last, first, step, tx):
        for i in T.unroll(copies):
            if whole:
                copy_words(W, S, base, last, first, step, i * threads + tx)
            else:
                if i * threads + tx < rows * per_row:
                    copy_words(W, S, base, last, first, step, i * threads + tx)
        if tx < rows:
            copy_scales(
                S.access_ptr("w", offset=base + scales + tx),
                T.address_of(W[1][T.min(first + tx, last), step * _GROUPS]),
                4,
                T.Select(first + tx <= last, T.uint32(4), T.uint32(0)),
            )

    # `part`: which half of which group a thread has.

    @T.inline
    def load(S, at, part, raw):
        for v in T.vectorized(words // 4):
            raw[v] = S[at + part * (words // 4) + v]

    @T.inline
    def load_three_bits(S, at, part, raw):
        raw[0] = S[at + part // 2 * 3 + part % 2]
        raw[1] = T.shift_right(S[at + part // 2 * 3 + 2], T.Cast("uint32", part % 2 * 16))

    # Of the pair p, q − zero. A byte is where both halves want it, below one of 1024.

    @T.inline
    def keep_bytes(lane, k):
        for i in T.unroll(2):
            k[i] = _kept(T.Cast("uint32", 0x5150 + i * 0x0202), lane)

    @T.inline
    def unpack_bytes(raw, p, k, to):
        permute(to[p], raw[p // 2], thousand, k[p % 2])
        add(to[p], to[p], _pair(-1024 - zero, -1024 - zero))

    # Both halves get the byte; the upper one keeps 16 q of it.
    @T.inline
    def keep_nibbles(lane, k):
        for i in T.unroll(4):
            k[i] = _kept(T.Cast("uint32", 0x5050 + i * 0x0101), lane)
        k[4] = _kept(_pair(1, 1 / 16), lane)

    @T.inline
    def unpack_nibbles(raw, p, k, to):
        permute(to[p], raw[p // 4], thousand, k[p % 4])
        to[p] = T.bitwise_and(to[p], T.uint32(0x64F0640F))
        multiply_add(to[p], to[p], k[4], _pair(-1024 - zero, -64 - zero))

    # Of the high bits, the upper half keeps the second, twice of it.
    @T.inline
    def keep_three_bits(lane, k):
        k[0] = _kept(T.uint32(0x5050), lane)
        k[1] = _kept(_pair(4, 2), lane)
        k[2] = _kept(_pair(1, 1 / 4), lane)

    @T.inline
    def unpack_three_bits(raw, p, k, to):
        high = T.alloc_buffer((1,), "uint32", scope="local")
        high[0] = T.shift_right(raw[1], T.Cast("uint32", p * 2))
        permute(high[0], high[0], thousand, k[0])
        high[0] = T.bitwise_and(high[0], T.uint32(0x64026401))
        multiply_add(high[0], high[0], k[1], _pair(-4096, -2048))
        to[p] = T.shift_right(raw[0], T.Cast("uint32", p * 4))
        permute(to[p], to[p], thousand, k[0])
        to[p] = T.bitwise_and(to[p], T.uint32(0x640C6403))
        multiply_add(to[p], to[p], k[2], _pair(-1024 - zero, -256 - zero))
        add(to[p], to[p], high[0])

    load_raw = load_three_bits if bits == 3 else load
    keep = {3: keep_three_bits, 4: keep_nibbles, 8: keep_bytes}[bits]
    unpack = {3: unpack_three_bits, 4: unpack_nibbles, 8: unpack_bytes}[bits]

    @T.inline
    def read(S, base, row, lane, k, to):
        for h in T.unroll(2):
            raw = T.alloc_buffer((max(words // 4, 2),), "uint32", scope="local")
            pairs = T.alloc_buffer((2 * MULTIPLICATIONS,), "uint32", scope="local")
            scale = T.alloc_buffer((1,), "uint32", scope="local")
            own = T.meta_var(row + h * 8 + lane // 4)
            load_raw(S, base + own * words, lane % 4, raw)
            scale[0] = S[base + scales + own]
            permute(
                scale[0], scale[0], T.uint32(0), T.Cast("uint32", 0x1010 + lane % 4 // 2 * 0x2222)
            )
            for p in T.unroll(2 * MULTIPLICATIONS):
                unpack(raw, p, k, pairs)
                multiply(to[p * 2 + h], pairs[p], scale[0])

    return StagedTile(rows * (words + 1), fetch, keep, read)
