"""Phi-3's gate_up_proj with its activation, up · silu(gate), from int8 rows to int8 rows.

A task owns the gate and the up columns of one group of 32, so that it can round the group itself:
no launch of its own, and no `[n, 2·intermediate]` rows in memory, for the activation.
"""

from tvm.script import tirx as T

from ..root import hand_scheduled
from .int8_sums import ROW_BLOCK, task_sums
from .isa import Isa
from .layout import GROUP, PANEL, group_shapes
from .math import silu
from .quantize import WORDS, quantized_group, slot_of

_HALF = GROUP // PANEL  # panels of a group's gate columns, and of its up columns


def int8_gated(
    isa: Isa,
    intermediate_size: int,
    in_features: int,
    bits: int,
    scale_dtype: str,
    zero: int,
):
    """a `[m, groups, 10]` i32 (quantize.py), q, scale (layout.group_shapes) of the weight
    `[2·intermediate, in]` (gate rows, then up) → `[m, intermediate / 32, 10]` i32.

    zero: of the linear that reads the result.
    """
    q_shape, scale_shape = group_shapes(2 * intermediate_size, in_features, bits)
    n_panels, n_groups = q_shape[:2]
    tasks = intermediate_size // GROUP
    up = n_panels // 2  # the first panel of up columns
    tile_rows = isa.int8_rows
    row_block = ROW_BLOCK // tile_rows * tile_rows

    def place(j):
        return j % _HALF + j // _HALF * up

    dot = isa.dot.for_bits(bits)
    sums = task_sums(dot, tile_rows, n_groups, bits, 2 * _HALF, _HALF, place)
    put = quantized_group(isa, zero)

    @T.prim_func(private=True, s_tir=True)
    def func(a: T.handle, q: T.handle, scale: T.handle, out: T.handle):
        m = T.int64()
        As = T.match_buffer(a, (m, n_groups, WORDS), "int32")
        W = T.match_buffer(q, q_shape, "uint32")
        S = T.match_buffer(scale, scale_shape, scale_dtype)
        Os = T.match_buffer(out, (m, tasks, WORDS), "int32")
        A = T.decl_buffer((m * n_groups, WORDS), "int32", data=As.data)
        O = T.decl_buffer((m * tasks, WORDS), "int32", data=Os.data)
        LW = T.decl_buffer((n_panels * n_groups, bits, PANEL), "uint32", data=W.data)
        LS = T.decl_buffer((n_panels * n_groups, PANEL), scale_dtype, data=S.data)
        for p in T.parallel(tasks):
            F = T.alloc_buffer((row_block, 2 * GROUP), "float32")
            for block in T.serial((m + row_block - 1) // row_block):
                start: T.let = block * row_block
                count: T.let = T.min(m - start, row_block)
                sums(A, W, S, LW, LS, F, p, start, count)
                for r in T.serial(count):
                    V = T.alloc_buffer((GROUP,), "float32")
                    for v in T.vectorized(GROUP):
                        V[v] = silu(F[r, v]) * F[r, GROUP + v]
                    put(V, O, slot_of(m, tile_rows, tasks, start + r, p))

    return hand_scheduled(func)
