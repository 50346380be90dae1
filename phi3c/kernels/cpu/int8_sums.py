"""Sums of products of int8 activations with a task's group-quantized weight panels."""

from collections.abc import Callable

from tvm.script import tirx as T

from ..layout import GROUP, PANEL
from .int8_dot import Dot
from .int8_pairs import pair_tile
from .prefetch import ROW_AHEAD, group_prefetcher
from .quantize import OFFSET, SCALE, slot

ROW_BLOCK = 64  # rows whose sums are in the cache together
ROWS_AHEAD = 3  # groups whose weights are prefetched, where many rows pass
_QUADS = GROUP // 4

Place = Callable  # j-th panel of a task → how far it lies from the task's first


def _quad(W, panel, group, t, col, bits: int, lanes: int):
    """Quad t of `lanes` rows from `col` on: uint32x<lanes>, a stored value in each byte."""

    def every(value: int):
        return T.broadcast(T.uint32(value), lanes)

    def word(index):
        return W[panel, group, index, T.ramp(col, 1, lanes)]

    if bits == 8:
        return word(t)
    if bits == 4:
        shift = T.broadcast(T.Cast("uint32", t % 2 * 4), lanes)
        return T.bitwise_and(T.shift_right(word(t // 2), shift), every(0x0F0F0F0F))
    low = T.shift_right(word(t // 4), T.broadcast(T.Cast("uint32", t % 4 * 2), lanes))
    high = T.shift_right(word(2), T.broadcast(T.Cast("uint32", t), lanes))
    return T.bitwise_or(
        T.bitwise_and(low, every(0x03030303)),
        T.shift_left(T.bitwise_and(high, every(0x01010101)), every(2)),
    )


def _row_scale(A, at, lanes: int):
    return T.broadcast(T.reinterpret("float32", A[at, SCALE]), lanes)


def task_sums(
    dot: Dot, tile_rows: int, n_groups: int, bits: int, side: int, stride: int, place: Place
):
    """Returns the inline function `sums(A, W, S, LW, LS, F, p, start, count)`.

    A `[m·groups, 10]` i32 (quantize.py), weights W and scales S (layout.group_shapes), the same by
    panel and group in one dimension as LW and LS → F[r, 16·j + v], row start + r, r < count, times
    row v of panel p · stride + place(j), j < side.

    One row streams the weights through registers (decode is bound by reading them). More rows pass,
    tile_rows at a time, over the weights of a group that were unpacked into registers.
    """
    lanes = dot.lanes
    parts = side * PANEL // lanes  # vectors across a task's columns
    acc_len, acc_dtype = dot.acc_len, dot.acc_dtype
    ask = group_prefetcher(stride, n_groups, bits)

    def panel_of(p, j):
        return p * stride + place(j)

    @T.inline
    def one_row(A, W, S, LW, LS, F, p, first):
        acc = T.alloc_buffer((parts * lanes,), "float32")
        for i in T.unroll(parts):
            acc[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for g in T.serial(n_groups):
            at: T.let = slot(first, 1, n_groups, g, 0)
            for j in T.unroll(side):
                ask(LW, LS, p, place(j), g + ROW_AHEAD)
            h = T.alloc_buffer((parts * acc_len,), acc_dtype)
            for i in T.unroll(parts):
                h[T.ramp(i * acc_len, 1, acc_len)] = dot.start(A[at, OFFSET])
            for t in T.unroll(_QUADS):
                for i in T.unroll(parts):
                    w = T.meta_var(
                        _quad(
                            W,
                            panel_of(p, i * lanes // PANEL),
                            g,
                            t,
                            i * lanes % PANEL,
                            bits,
                            lanes,
                        )
                    )
                    h[T.ramp(i * acc_len, 1, acc_len)] = dot.step(
                        h[T.ramp(i * acc_len, 1, acc_len)], w, dot.activation(A, at, t)
                    )
            for i in T.unroll(parts):
                s = T.meta_var(
                    S[
                        panel_of(p, i * lanes // PANEL),
                        g,
                        T.ramp(i * lanes % PANEL, 1, lanes),
                    ]
                )
                total = T.meta_var(dot.finish(h[T.ramp(i * acc_len, 1, acc_len)], A[at, OFFSET]))
                acc[T.ramp(i * lanes, 1, lanes)] += T.Cast(f"float32x{lanes}", total) * (
                    T.Cast(f"float32x{lanes}", s) * _row_scale(A, at, lanes)
                )
        for i in T.unroll(parts):
            F[0, T.ramp(i * lanes, 1, lanes)] = acc[T.ramp(i * lanes, 1, lanes)]

    @T.inline
    def tile(A, w, scale, F, i, at, row, n_rows):
        """at: slot of the first of the rows; row: in F."""
        h = T.alloc_buffer((n_rows * acc_len,), acc_dtype)
        for r in T.unroll(n_rows):
            h[T.ramp(r * acc_len, 1, acc_len)] = dot.start(A[at + r, OFFSET])
        for t in T.unroll(_QUADS):
            for r in T.unroll(n_rows):
                h[T.ramp(r * acc_len, 1, acc_len)] = dot.step(
                    h[T.ramp(r * acc_len, 1, acc_len)],
                    w[T.ramp(t * lanes, 1, lanes)],
                    dot.activation(A, at + r, t),
                )
        for r in T.unroll(n_rows):
            total = T.meta_var(dot.finish(h[T.ramp(r * acc_len, 1, acc_len)], A[at + r, OFFSET]))
            F[row + r, T.ramp(i * lanes, 1, lanes)] += T.Cast(f"float32x{lanes}", total) * (
                scale[T.ramp(0, 1, lanes)] * _row_scale(A, at + r, lanes)
            )

    whole_tile = pair_tile if dot.by_pairs else tile

    @T.inline
    def many_rows(A, W, S, LW, LS, F, p, start, count):
        for r in T.serial(count):
            for i in T.unroll(parts):
                F[r, T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for g in T.serial(n_groups):
            for i in T.serial(parts):
                # Registers: a group's weights stay there while all rows pass.
                w = T.alloc_buffer((_QUADS * lanes,), "uint32")
                scale = T.alloc_buffer((lanes,), "float32")
                panel: T.let = panel_of(p, i * lanes // PANEL)
                column: T.let = i * lanes % PANEL
                if column == 0:
                    ask(LW, LS, p, place(i * lanes // PANEL), g + ROWS_AHEAD)
                for t in T.unroll(_QUADS):
                    w[T.ramp(t * lanes, 1, lanes)] = _quad(W, panel, g, t, column, bits, lanes)
                scale[T.ramp(0, 1, lanes)] = T.Cast(
                    f"float32x{lanes}", S[panel, g, T.ramp(column, 1, lanes)]
                )
                for k in T.serial(count // tile_rows):
                    row: T.let = k * tile_rows
                    at: T.let = slot(start + row, tile_rows, n_groups, g, 0)
                    whole_tile(A, w, scale, F, i, at, row, tile_rows)
                left: T.let = count % tile_rows
                last: T.let = slot(start + count - left, left, n_groups, g, 0)
                for k in T.serial(left):
                    tile(A, w, scale, F, i, last + k, count - left + k, 1)

    @T.inline
    def sums(A, W, S, LW, LS, F, p, start, count):
        if count == 1:
            one_row(A, W, S, LW, LS, F, p, start)
        else:
            many_rows(A, W, S, LW, LS, F, p, start, count)

    return sums
