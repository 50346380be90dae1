"""Sums over the threads of a workgroup, through shared memory: on every GPU alike."""

from tvm.script import tirx as T

from .limits import GpuLimits

_PARTS = 16  # sums that a workgroup's sum is made of, by everyone


def workgroup_sum(limits: GpuLimits):
    """Returns the inline function `add_up(part, S, total, tx)`: total[0] of every thread is the
    sum of all threads' part[0]. S: two float32 per thread, shared.

    Not `tvm_thread_allreduce`: its result takes the place of a local buffer, which TVM may also
    have given to a variable that is written later; then threads write over each other's result.
    """
    threads = limits.threads

    @T.inline
    def add_up(part, S, total, tx):
        S[tx] = part[0]
        # Every sixteenth; some threads make the same sum, which spares a condition.
        total[0] = T.float32(0)
        for j in T.serial(threads // _PARTS):
            total[0] += S[j * _PARTS + tx % _PARTS]
        S[threads + tx] = total[0]
        total[0] = T.float32(0)
        for j in T.serial(_PARTS):
            total[0] += S[threads + j]

    return add_up


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
