"""The first half of a LoRA adapter, h = A x: from the features of a row to its adapter's rank.

Every row has an adapter of its own (slot) and that adapter's rank, so a batch may mix them. A row
of rank 0 has none: nothing is written for it, and nothing of x or A is read.
"""

from tvm.script import tirx as T

from ..low_rank import LowRank
from ..root import hand_scheduled
from .limits import LANES, GpuLimits
from .sums import lanes_sum, pitch_of


def shrink(limits: GpuLimits, in_features: int, low_rank: LowRank, dtype: str):
    """x `[n, in]` dtype, a `[max_loras, max_rank, in]`, slot, rank `[n]` i32 →
    h `[n, max_rank]` f32, of whose rows the first `rank` values are written.

    LANES threads share a value of h.
    """
    teams = limits.threads // LANES
    steps = -(-in_features // LANES)
    blocks = -(-low_rank.max_rank // teams)
    pitch = pitch_of(LANES)
    add_up = lanes_sum(LANES)

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, a: T.handle, slot: T.handle, rank: T.handle, h: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n, in_features), dtype)
        A = T.match_buffer(a, low_rank.a_shape(in_features), low_rank.dtype)
        S = T.match_buffer(slot, (n,), "int32")
        R = T.match_buffer(rank, (n,), "int32")
        H = T.match_buffer(h, (n, low_rank.max_rank), "float32")
        for i in T.thread_binding(n, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks, thread="blockIdx.x"):
                for ty in T.thread_binding(teams, thread="threadIdx.y"):
                    for tx in T.thread_binding(LANES, thread="threadIdx.x"):
                        parts = T.alloc_buffer((teams * pitch,), "float32", scope="shared")
                        acc = T.alloc_buffer((1,), "float32", scope="local")
                        acc[0] = T.float32(0)
                        if bx * teams + ty < R[i]:
                            for step in T.serial(steps):
                                k = T.meta_var(step * LANES + tx)
                                if k < in_features:
                                    weight = T.meta_var(A[S[i], bx * teams + ty, k])
                                    acc[0] += T.Cast("float32", X[i, k]) * T.Cast("float32", weight)
                        parts[ty * pitch + tx] = acc[0]
                        s = T.meta_var(ty * LANES + tx)
                        total = T.alloc_buffer((1,), "float32", scope="local")
                        if s < teams:
                            if bx * teams + s < R[i]:
                                add_up(parts, s, total)
                                H[i, bx * teams + s] = total[0]

    return hand_scheduled(func)
