"""Tiles of an int8 linear by NEON's i8mm: a step is two rows, two columns and eight features."""

from tvm.script import tirx as T

from ..layout import GROUP
from .quantize import OFFSET, SCALE

COLUMNS = 8  # of a tile
_STEPS = GROUP // 8
_HALVES = COLUMNS // 4  # vectors across the columns
_PAIRS = COLUMNS // 2


def _columns(w, t, pair):
    """Quads 2t and 2t+1 of two columns, int8x16: those of the first, then those of the second."""
    at = (2 * t * _HALVES + pair // 2) * 4  # of the four columns that hold the pair
    quads = [w[T.ramp(at + q * COLUMNS, 1, 4)] for q in range(2)]
    first = pair % 2 * 2
    return T.reinterpret("int8x16", T.Shuffle(quads, [first, first + 4, first + 1, first + 5]))


def _rows(A, at, t):
    """Quads 2t and 2t+1 of two rows, int8x16: those of the first, then those of the second."""
    words = [A[at + r, T.ramp(t // 2 * 4, 1, 4)] for r in range(2)]
    first = t % 2 * 2
    return T.reinterpret("int8x16", T.Shuffle(words, [first, first + 1, first + 4, first + 5]))


def _products(acc, w, a):
    """acc int32x4 plus the first column with both rows, then the second column with both."""
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.usmmla.v4i32.v16i8", acc, w, a)


@T.inline
def pair_tile(A, w, scale, F, i, at, row, n_rows):
    """The tile of int8_linear.py; n_rows: even; w `[8 quads, 8 columns]`."""
    h = T.alloc_buffer((n_rows * COLUMNS,), "int32")
    for k in T.unroll(n_rows * _HALVES):
        h[T.ramp(k * 4, 1, 4)] = T.broadcast(T.int32(0), 4)
    for t in T.unroll(_STEPS):
        for r in T.unroll(n_rows // 2):
            for c in T.unroll(_PAIRS):
                k = T.meta_var((r * _PAIRS + c) * 4)
                h[T.ramp(k, 1, 4)] = _products(
                    h[T.ramp(k, 1, 4)], _columns(w, t, c), _rows(A, at + 2 * r, t)
                )
    for r in T.unroll(n_rows):
        for half in T.unroll(_HALVES):
            k = T.meta_var((r // 2 * _PAIRS + 2 * half) * 4)
            both = T.meta_var([h[T.ramp(k, 1, 4)], h[T.ramp(k + 4, 1, 4)]])
            own = T.meta_var([r % 2 + 2 * j for j in range(4)])
            total = T.meta_var(T.Shuffle(both, own) + T.broadcast(A[at + r, OFFSET], 4))
            s = T.meta_var(T.broadcast(T.reinterpret("float32", A[at + r, SCALE]), 4))
            F[row + r, T.ramp(i * COLUMNS + 4 * half, 1, 4)] += T.Cast("float32x4", total) * (
                scale[T.ramp(4 * half, 1, 4)] * s
            )
