"""Asks for memory that will be read soon, where the hardware does not see it coming."""

import numpy as np
from tvm.script import tirx as T

_LINE = 64  # bytes
# Groups of weights that one row asks for before it needs them. The hardware stops at every page and
# starts anew in every panel: left to it, one row reads at 85 % of the bandwidth.
ROW_AHEAD = 8


def prefetch(element):
    """An expression that asks for the line of a buffer's element, into the nearest cache."""
    read, nearest, data = 0, 3, 1
    return T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(element), read, nearest, data)


def prefetcher(dtype: str):
    """Returns the inline function `ahead(P, block, side, head, start, count)`.

    It prefetches `count` values of `dtype` from P[block, side, head, start] on, whole lines.
    """
    step = _LINE // np.dtype(dtype).itemsize

    @T.inline
    def ahead(P, block, side, head, start, count):
        for i in T.unroll(count // step):
            T.evaluate(prefetch(P[block, side, head, start + i * step]))

    return ahead


def later(task, j: int, side: int, length: int, i):
    """Step i of a task's panel j, counted through panels of `length` steps, `side` to a task.

    A step past the end is one of the next task.
    """
    over = T.if_then_else(i < length, 0, (side - 1) * length)
    return (task * side + j) * length + i + over


def group_prefetcher(side: int, n_groups: int, bits: int):
    """Returns the inline function `ahead(W, S, p, j, g)`: asks for group g of panel p · side + j,
    in the weights W `[panels·groups, bits, 16]` and scales S `[panels·groups, 16]`; a group past
    the end is one of the panel `side` further on, which the next task has in the same place.
    """

    @T.inline
    def ahead(W, S, p, j, g):
        at: T.let = later(p, j, side, n_groups, g)
        for word in T.unroll(bits):
            T.evaluate(prefetch(W[at, word, 0]))
        T.evaluate(prefetch(S[at, 0]))

    return ahead
