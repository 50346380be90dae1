"""Sums of neighbouring threads, many at once, through shared memory: on every GPU alike."""

from tvm.script import tirx as T


def pitch_of(lanes: int) -> int:
    """Places in shared memory for the parts of a sum of `lanes` threads: one more than there are,
    so that threads that add up one sum each meet no two in a bank.

    The buffers are one-dimensional: TVM takes such padding out of two-dimensional ones.
    """
    return lanes + 1


def lanes_sum(lanes: int):
    """Returns the inline function `add_up(S, s, total)`: total[0] = sum s of those whose parts are
    in S, shared.
    """

    @T.inline
    def add_up(S, s, total):
        total[0] = T.float32(0)
        for k in T.serial(lanes):
            total[0] += S[s * pitch_of(lanes) + k]

    return add_up
