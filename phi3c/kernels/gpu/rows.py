"""Which thread has which element of `[n, features]` in kernels without sums: the grid's y is the
row, its x and the threads are the features."""

from tvm.script import tirx as T

from .limits import GpuLimits


def for_each(limits: GpuLimits, features: int, body):
    """Returns the inline function `run(n, args)`, a kernel: body(args, row, feature) for all."""
    threads = limits.threads
    blocks = -(-features // threads)
    whole = features % threads == 0

    @T.inline
    def run(n, args):
        for row in T.thread_binding(n, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks, thread="blockIdx.x"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    if whole:
                        body(args, row, bx * threads + tx)
                    else:
                        if bx * threads + tx < features:
                            body(args, row, bx * threads + tx)

    return run
