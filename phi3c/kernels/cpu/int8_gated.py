"""Phi-3's gate_up_proj with its activation, up · silu(gate), from int8 rows to int8 rows.

A task owns the gate and the up columns of one group of 32, so that it can round the group itself:
no launch of its own, and no `[n, 2·intermediate]` rows in memory, for the activation. Adapters
(expand.py) are added before it.
"""

from tvm.script import tirx as T

from ..layout import GROUP, PANEL
from ..low_rank import LowRank
from ..root import hand_scheduled
from .expand import expansion
from .int8_sums import ROW_BLOCK, task_sums
from .isa import Isa
from .layout import group_shapes
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
    low_rank: LowRank | None = None,
):
    """a `[m, groups, 10]` i32 (quantize.py), q, scale (layout.group_shapes) of the weight
    `[2·intermediate, in]` (gate rows, then up), (h `[m, max_rank]` f32,
    b `[max_loras, panels, max_rank, 16]`, slot, rank `[m]` i32) → `[m, intermediate / 32, 10]` i32.

    zero: of the linear that reads the result.
    """
    q_shape, scale_shape = group_shapes(2 * intermediate_size, in_features, bits)
    n_panels, n_groups = q_shape[:2]
    tasks = intermediate_size // GROUP
    up = n_panels // 2  # the first panel of up columns
    tile_rows = isa.int8_rows
    row_block = ROW_BLOCK // tile_rows * tile_rows
    adapted = low_rank is not None

    def place(j):
        return j % _HALF + j // _HALF * up

    dot = isa.dot.for_bits(bits)
    sums = task_sums(dot, tile_rows, n_groups, bits, 2 * _HALF, _HALF, place)
    put = quantized_group(isa, zero)

    expand = expansion(2 * _HALF, _HALF, place)

    @T.inline
    def body(rows, W, S, H, B, slot, rank, out, m):
        A = T.decl_buffer((m * n_groups, WORDS), "int32", data=rows.data)
        O = T.decl_buffer((m * tasks, WORDS), "int32", data=out.data)
        LW = T.decl_buffer((n_panels * n_groups, bits, PANEL), "uint32", data=W.data)
        LS = T.decl_buffer((n_panels * n_groups, PANEL), scale_dtype, data=S.data)
        for p in T.parallel(tasks):
            F = T.alloc_buffer((row_block, 2 * GROUP), "float32")
            for block in T.serial((m + row_block - 1) // row_block):
                start: T.let = block * row_block
                count: T.let = T.min(m - start, row_block)
                sums(A, W, S, LW, LS, F, p, start, count)
                for r in T.serial(count):
                    if adapted:
                        expand(H, B, F, p, r, start + r, slot[start + r], rank[start + r])
                    V = T.alloc_buffer((GROUP,), "float32")
                    for v in T.vectorized(GROUP):
                        V[v] = silu(F[r, v]) * F[r, GROUP + v]
                    put(V, O, slot_of(m, tile_rows, tasks, start + r, p))

    if adapted:

        @T.prim_func(private=True, s_tir=True)
        def with_adapters(
            a: T.handle,
            q: T.handle,
            scale: T.handle,
            h: T.handle,
            b: T.handle,
            slot: T.handle,
            rank: T.handle,
            out: T.handle,
        ):
            m = T.int64()
            A = T.match_buffer(a, (m, n_groups, WORDS), "int32")
            W = T.match_buffer(q, q_shape, "uint32")
            S = T.match_buffer(scale, scale_shape, scale_dtype)
            H = T.match_buffer(h, (m, low_rank.max_rank), "float32")
            B = T.match_buffer(b, low_rank.b_shape(2 * intermediate_size), low_rank.dtype)
            Slot = T.match_buffer(slot, (m,), "int32")
            Rank = T.match_buffer(rank, (m,), "int32")
            O = T.match_buffer(out, (m, tasks, WORDS), "int32")
            body(A, W, S, H, B, Slot, Rank, O, m)

        return hand_scheduled(with_adapters)

    @T.prim_func(private=True, s_tir=True)
    def plain(a: T.handle, q: T.handle, scale: T.handle, out: T.handle):
        m = T.int64()
        A = T.match_buffer(a, (m, n_groups, WORDS), "int32")
        W = T.match_buffer(q, q_shape, "uint32")
        S = T.match_buffer(scale, scale_shape, scale_dtype)
        O = T.match_buffer(out, (m, tasks, WORDS), "int32")
        body(A, W, S, None, None, None, None, O, m)

    return hand_scheduled(plain)
