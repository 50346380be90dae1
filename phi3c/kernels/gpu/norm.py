"""RMSNorm in float32 (Zhang & Sennrich 2019; config field rms_norm_eps)."""

import operator

from tvm.script import tirx as T

from ..root import hand_scheduled
from .limits import GpuLimits
from .reduce import reduction


def normalise(limits: GpuLimits, hidden_size: int, eps: float, dtype: str):
    """Returns the inline function `norm(X, W, O, n)`, a kernel, with the buffers of `rms_norm`.

    A workgroup has a row.
    """
    threads = limits.threads
    steps = -(-hidden_size // threads)
    added = reduction(operator.add, 0.0)

    @T.inline
    def norm(X, W, O, n):
        for i in T.thread_binding(n, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                part = T.alloc_buffer((1,), "float32", scope="local")
                total = T.alloc_buffer((1,), "float32", scope="local")
                inverse = T.alloc_buffer((1,), "float32", scope="local")
                part[0] = T.float32(0)
                for j in T.serial(steps):
                    if j * threads + tx < hidden_size:
                        value: T.let = T.Cast("float32", X[i, j * threads + tx])
                        part[0] += value * value
                added(part[0], total, tx)
                inverse[0] = T.float32(1) / T.sqrt(
                    total[0] * T.float32(1 / hidden_size) + T.float32(eps)
                )
                for j in T.serial(steps):
                    k = T.meta_var(j * threads + tx)
                    if k < hidden_size:
                        O[i, k] = T.Cast(dtype, T.Cast("float32", X[i, k]) * inverse[0] * W[k])

    return norm


def rms_norm(limits: GpuLimits, hidden_size: int, eps: float, dtype: str):
    """x `[n, hidden]` dtype, weight `[hidden]` f32 → x / sqrt(mean(x²) + eps) · weight, dtype."""
    norm = normalise(limits, hidden_size, eps, dtype)

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, weight: T.handle, out: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n, hidden_size), dtype)
        W = T.match_buffer(weight, (hidden_size,), "float32")
        O = T.match_buffer(out, (n, hidden_size), dtype)
        norm(X, W, O, n)

    return hand_scheduled(func)
