"""Moves tokens between slots of the KV blocks: copy on write after a fork, and compaction of the
accepted path of a verified tree."""

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from ..root import hand_scheduled


def copy_slots(kv_heads: int, head_dim: int, kv_dtype: str):
    """pages `[blocks, 2, kv_heads, head_dim·16]` (updated in place), source, target `[n]` i32.

    Tokens are copied in the order given, so a target may be a source that was already read.
    """

    @T.prim_func(private=True, s_tir=True)
    def func(pages: T.handle, source: T.handle, target: T.handle):
        n = T.int64()
        blocks = T.int64()
        P = T.match_buffer(pages, (blocks, 2, kv_heads, head_dim * KV_BLOCK), kv_dtype)
        S = T.match_buffer(source, (n,), "int32")
        D = T.match_buffer(target, (n,), "int32")
        K = T.decl_buffer((blocks, 2, kv_heads, head_dim, KV_BLOCK), kv_dtype, data=P.data)
        V = T.decl_buffer((blocks, 2, kv_heads, KV_BLOCK, head_dim), kv_dtype, data=P.data)
        for t in T.serial(n):
            s: T.let = T.Cast("int64", S[t])
            d: T.let = T.Cast("int64", D[t])
            for h in T.serial(kv_heads):
                for i in T.serial(head_dim):
                    K[d // KV_BLOCK, 0, h, i, d % KV_BLOCK] = K[
                        s // KV_BLOCK, 0, h, i, s % KV_BLOCK
                    ]
                for i in T.serial(head_dim):
                    V[d // KV_BLOCK, 1, h, d % KV_BLOCK, i] = V[
                        s // KV_BLOCK, 1, h, s % KV_BLOCK, i
                    ]

    return hand_scheduled(func)
