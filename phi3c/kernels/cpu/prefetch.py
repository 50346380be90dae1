"""Asks for memory that will be read soon, where the hardware cannot guess it: the next KV block."""

import numpy as np
from tvm.script import tirx as T

_LINE = 64  # bytes


def prefetcher(dtype: str):
    """Returns the inline function `ahead(P, block, side, head, start, count)`.

    It prefetches `count` values of `dtype` from P[block, side, head, start] on, whole lines.
    """
    step = _LINE // np.dtype(dtype).itemsize

    @T.inline
    def ahead(P, block, side, head, start, count):
        for i in T.unroll(count // step):
            T.evaluate(
                T.call_llvm_intrin(
                    "void",
                    "llvm.prefetch",
                    T.address_of(P[block, side, head, start + i * step]),
                    0,  # to read
                    3,  # into the nearest cache
                    1,  # data
                )
            )

    return ahead
