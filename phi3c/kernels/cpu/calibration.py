"""What a machine can do at best: the two rates that a compiled model is measured against."""

from tvm.script import tirx as T

from ..root import hand_scheduled
from .int8_dot import Dot
from .isa import Isa

STREAMS = 8  # independent sums, so that additions do not wait for one another
READ_LANES = 16
DOTS = 12  # independent integer accumulators


def read_stream(tasks: int):
    """x `[tasks, rows, 8, 16]` f32, each value read once → `[tasks, 8, 16]` f32, their sums."""

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, out: T.handle):
        rows = T.int64()
        X = T.match_buffer(x, (tasks, rows, STREAMS, READ_LANES), "float32")
        O = T.match_buffer(out, (tasks, STREAMS, READ_LANES), "float32")
        for task in T.parallel(tasks):
            acc = T.alloc_buffer((STREAMS, READ_LANES), "float32")
            for s in T.unroll(STREAMS):
                for v in T.vectorized(READ_LANES):
                    acc[s, v] = T.float32(0)
            for row in T.serial(rows):
                for s in T.unroll(STREAMS):
                    for v in T.vectorized(READ_LANES):
                        acc[s, v] += X[task, row, s, v]
            for s in T.unroll(STREAMS):
                for v in T.vectorized(READ_LANES):
                    O[task, s, v] = acc[s, v]

    return hand_scheduled(func)


def int8_products(isa: Isa, tasks: int):
    """w `[8, lanes]` u32, a `[8]` i32 in cache, repeated `steps` (an `[steps]` i8's extent) times
    → `[tasks, 12, …]`: 12 · 8 · steps integer dot steps a task, of 4 · lanes products each.
    """
    dot: Dot = isa.dot.for_bits(4)
    lanes, acc_len, acc_dtype = dot.lanes, dot.acc_len, dot.acc_dtype

    @T.prim_func(private=True, s_tir=True)
    def func(w: T.handle, a: T.handle, count: T.handle, out: T.handle):
        steps = T.int64()
        W = T.match_buffer(w, (8, lanes), "uint32")
        A = T.match_buffer(a, (8,), "int32")
        T.match_buffer(count, (steps,), "int8")
        O = T.match_buffer(out, (tasks, DOTS * acc_len), acc_dtype)
        for task in T.parallel(tasks):
            acc = T.alloc_buffer((DOTS * acc_len,), acc_dtype)
            for i in T.unroll(DOTS):
                acc[T.ramp(i * acc_len, 1, acc_len)] = T.broadcast(T.Cast(acc_dtype, 0), acc_len)
            for _ in T.serial(steps):
                for t in T.serial(8):
                    for i in T.unroll(DOTS):
                        acc[T.ramp(i * acc_len, 1, acc_len)] = dot.step(
                            acc[T.ramp(i * acc_len, 1, acc_len)],
                            W[(t + i) % 8, T.ramp(0, 1, lanes)],
                            T.broadcast(A[t], lanes),
                        )
            for i in T.unroll(DOTS):
                O[task, T.ramp(i * acc_len, 1, acc_len)] = acc[T.ramp(i * acc_len, 1, acc_len)]

    return hand_scheduled(func)
