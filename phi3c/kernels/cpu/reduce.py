"""One value out of a vector, by halves: as many steps as the logarithm of its lanes."""

from collections.abc import Callable

from tvm.script import tirx as T


def folded(combine: Callable, lanes: int):
    """Returns the inline function `fold(B)`: B[0] becomes combine over B[0] … B[lanes − 1].

    lanes: a power of two up to 16; the other values of B are spent.
    """
    assert lanes in (1, 2, 4, 8, 16), lanes

    @T.inline
    def fold(B):
        if lanes >= 16:
            for v in T.vectorized(8):
                B[v] = combine(B[v], B[v + 8])
        if lanes >= 8:
            for v in T.vectorized(4):
                B[v] = combine(B[v], B[v + 4])
        if lanes >= 4:
            for v in T.vectorized(2):
                B[v] = combine(B[v], B[v + 2])
        if lanes >= 2:
            B[0] = combine(B[0], B[1])

    return fold
