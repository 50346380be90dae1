"""RMSNorm in float32 (Zhang & Sennrich 2019; config field rms_norm_eps)."""

from tvm.script import tirx as T

from ..root import hand_scheduled
from .isa import Isa, vector_lanes
from .parallel import SERIAL_ROWS


def rms_norm(isa: Isa, hidden_size: int, eps: float):
    """x `[n, hidden]` f32, weight `[hidden]` f32 → x / sqrt(mean(x²) + eps) · weight, f32."""
    lanes = vector_lanes(isa, hidden_size)

    @T.inline
    def norm_row(X, W, O, i):
        squares = T.alloc_buffer((lanes,), "float32")
        total = T.alloc_buffer((1,), "float32")
        for v in T.vectorized(lanes):
            squares[v] = T.float32(0)
        for k in T.serial(hidden_size // lanes):
            for v in T.vectorized(lanes):
                squares[v] += X[i, k * lanes + v] * X[i, k * lanes + v]
        total[0] = T.float32(0)
        for v in T.unroll(lanes):
            total[0] += squares[v]
        total[0] = T.float32(1) / T.sqrt(total[0] * T.float32(1 / hidden_size) + T.float32(eps))
        for k in T.serial(hidden_size // lanes):
            for v in T.vectorized(lanes):
                O[i, k * lanes + v] = X[i, k * lanes + v] * total[0] * W[k * lanes + v]

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, weight: T.handle, out: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n, hidden_size), "float32")
        W = T.match_buffer(weight, (hidden_size,), "float32")
        O = T.match_buffer(out, (n, hidden_size), "float32")
        if n <= SERIAL_ROWS:
            for i in T.serial(n):
                norm_row(X, W, O, i)
        else:
            for i in T.parallel(n):
                norm_row(X, W, O, i)

    return hand_scheduled(func)
