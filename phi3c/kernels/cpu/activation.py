"""The gated activation of Phi-3's MLP: up · silu(gate)."""

from tvm.script import tirx as T

from ..root import hand_scheduled
from .isa import Isa, vector_lanes
from .layout import GROUP
from .math import silu
from .quantize import WORDS, quantized_group, slot_of

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


def silu_mul_quantize(isa: Isa, intermediate_size: int, zero: int):
    """gate_up `[n, 2·intermediate]` f32 → up · silu(gate) in int8 (quantize.py)."""
    groups = intermediate_size // GROUP
    per_task = next(d for d in range(min(groups, _TASK // GROUP), 0, -1) if groups % d == 0)
    tasks = groups // per_task
    put = quantized_group(isa, zero)
    tile_rows = isa.int8_rows

    @T.prim_func(private=True, s_tir=True)
    def func(gate_up: T.handle, a: T.handle):
        n = T.int64()
        G = T.match_buffer(gate_up, (n, 2 * intermediate_size), "float32")
        As = T.match_buffer(a, (n, groups, WORDS), "int32")
        A = T.decl_buffer((n * groups, WORDS), "int32", data=As.data)
        for task in T.parallel(n * tasks):
            row: T.let = task // tasks
            for k in T.serial(per_task):
                g: T.let = task % tasks * per_task + k
                V = T.alloc_buffer((GROUP,), "float32")
                for v in T.vectorized(GROUP):
                    V[v] = silu(G[row, g * GROUP + v]) * G[row, intermediate_size + g * GROUP + v]
                put(V, A, slot_of(n, tile_rows, groups, row, g))

    return hand_scheduled(func)
