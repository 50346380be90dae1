"""The second half of a LoRA adapter, y += B h: from an adapter's rank to the columns of a linear.

B lies in panels of sixteen columns (low_rank.py): sixteen neighbouring threads read a line of it.
"""

from tvm.script import tirx as T

from ..layout import PANEL
from ..low_rank import LowRank
from ..root import hand_scheduled
from .limits import GpuLimits
from .rows import for_each


def expand(limits: GpuLimits, out_features: int, low_rank: LowRank, dtype: str):
    """h `[n, max_rank]` f32, b `[max_loras, panels, max_rank, 16]`, slot, rank `[n]` i32,
    y `[n, out]` dtype (updated in place). Rows of rank 0 are left as they are.
    """

    @T.inline
    def add(args, i, o):
        H, B, S, R, Y = T.meta_var(args)
        acc = T.alloc_buffer((1,), "float32", scope="local")
        if R[i] > 0:
            acc[0] = T.Cast("float32", Y[i, o])
            for k in T.serial(R[i]):
                acc[0] += T.Cast("float32", B[S[i], o // PANEL, k, o % PANEL]) * H[i, k]
            Y[i, o] = T.Cast(dtype, acc[0])

    run = for_each(limits, out_features, add)

    @T.prim_func(private=True, s_tir=True)
    def func(h: T.handle, b: T.handle, slot: T.handle, rank: T.handle, y: T.handle):
        n = T.int64()
        H = T.match_buffer(h, (n, low_rank.max_rank), "float32")
        B = T.match_buffer(b, low_rank.b_shape(out_features), low_rank.dtype)
        S = T.match_buffer(slot, (n,), "int32")
        R = T.match_buffer(rank, (n,), "int32")
        Y = T.match_buffer(y, (n, out_features), dtype)
        run(n, (H, B, S, R, Y))

    return hand_scheduled(func)
