"""The gated activation of Phi-3's MLP: up · silu(gate)."""

from tvm.script import tirx as T

from ..math import LOG2_E
from ..root import hand_scheduled
from .limits import GpuLimits
from .rows import for_each


def silu(x):
    """x · sigmoid(x) for a float32 expression. The power stays finite: fast-math knows no inf."""
    return x / (T.float32(1) + T.exp2(T.min(x * T.float32(-LOG2_E), T.float32(126))))


def gate_rows(limits: GpuLimits, intermediate_size: int, dtype: str):
    """Returns the inline function `gate(G, O, n)`, a kernel, with the buffers of `silu_mul`."""

    @T.inline
    def put(args, t, k):
        G, O = T.meta_var(args)
        gate: T.let = T.Cast("float32", G[t, k])
        O[t, k] = T.Cast(dtype, silu(gate) * T.Cast("float32", G[t, intermediate_size + k]))

    run = for_each(limits, intermediate_size, put)

    @T.inline
    def gate(G, O, n):
        run(n, (G, O))

    return gate


def silu_mul(limits: GpuLimits, intermediate_size: int, dtype: str):
    """gate_up `[n, 2·intermediate]` (gate columns, then up) → `[n, intermediate]`, in dtype."""
    gate = gate_rows(limits, intermediate_size, dtype)

    @T.prim_func(private=True, s_tir=True)
    def func(gate_up: T.handle, out: T.handle):
        n = T.int64()
        G = T.match_buffer(gate_up, (n, 2 * intermediate_size), dtype)
        O = T.match_buffer(out, (n, intermediate_size), dtype)
        gate(G, O, n)

    return hand_scheduled(func)
