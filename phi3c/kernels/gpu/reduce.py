"""Reductions over the threads of a workgroup."""

from tvm.script import tirx as T

_NO_BUFFER = 0  # of a reduction that belongs to no block


def reduction(combine, identity: float):
    """Returns the inline function `reduce(value, result, thread)`: result[0] of every thread of a
    group is what `combine` makes of the values of all its threads, along the axis `thread`.

    One call, and not in an unrolled loop, for each result buffer: TVM puts another in its place,
    in shared memory, so it is allocated outside loops: Metal has such memory only in the scope of
    the whole kernel. TVM makes warp shuffles of it where the target has them, else steps through
    shared memory. All threads of the workgroup must come by.
    """

    @T.inline
    def reduce(value, result, thread):
        with T.attr(
            T.comm_reducer(combine, [T.float32(identity)]),
            "reduce_scope",
            T.reinterpret("handle", T.uint64(_NO_BUFFER)),
        ):
            T.tvm_thread_allreduce(T.uint32(1), value, True, result[0], thread)

    return reduce
