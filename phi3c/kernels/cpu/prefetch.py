"""Asks for memory that will be read soon, where the hardware does not see it coming."""

import numpy as np
from tvm.script import tirx as T

_LINE = 64  # bytes


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
