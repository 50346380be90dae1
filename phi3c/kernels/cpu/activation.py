"""The gated activation of Phi-3's MLP: up · silu(gate)."""

from tvm.script import tirx as T

from ..root import hand_scheduled
from .isa import Isa, vector_lanes
from .math import silu

_TASK = 1024  # columns of a parallel task: enough to pay for its launch, few enough to share a row


def silu_mul(isa: Isa, intermediate_size: int):
    """gate_up `[n, 2·intermediate]` f32 (gate columns, then up) → `[n, intermediate]` f32."""
    lanes = vector_lanes(isa, intermediate_size)
    vectors = intermediate_size // lanes
    per_task = next(d for d in range(min(vectors, _TASK // lanes), 0, -1) if vectors % d == 0)
    tasks = vectors // per_task

    @T.prim_func(private=True, s_tir=True)
    def func(gate_up: T.handle, out: T.handle):
        n = T.int64()
        G = T.match_buffer(gate_up, (n, 2 * intermediate_size), "float32")
        O = T.match_buffer(out, (n, intermediate_size), "float32")
        for task in T.parallel(n * tasks):
            for k in T.serial(per_task):
                for v in T.vectorized(lanes):
                    col = T.meta_var((task % tasks * per_task + k) * lanes + v)
                    O[task // tasks, col] = (
                        silu(G[task // tasks, col]) * G[task // tasks, intermediate_size + col]
                    )

    return hand_scheduled(func)
