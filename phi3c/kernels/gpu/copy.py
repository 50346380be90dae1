"""Moves tokens between slots of the KV blocks: copy on write after a fork, and compaction of the
accepted path of a verified tree."""

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from ..root import hand_scheduled
from .limits import GpuLimits


def copy_slots(limits: GpuLimits, kv_heads: int, head_dim: int, kv_dtype: str):
    """pages `[blocks, 2, kv_heads, head_dim·16]` (updated in place), source, target `[n]` i32.

    Tokens are copied in the order given, so a target may be a source that was already read: a
    thread has one feature of one head, and copies it for all tokens.
    """
    threads = limits.threads
    features = kv_heads * head_dim

    @T.inline
    def copy(P, S, D, n, feature, part, feature_step, token_step):
        # Keys (part 0) lie [head_dim, 16], values (part 1) [16, head_dim].
        h = T.meta_var(feature // head_dim)
        i = T.meta_var(feature % head_dim)
        for t in T.serial(n):
            s: T.let = S[t]
            d: T.let = D[t]
            P[d // KV_BLOCK, part, h, i * feature_step + d % KV_BLOCK * token_step] = P[
                s // KV_BLOCK, part, h, i * feature_step + s % KV_BLOCK * token_step
            ]

    @T.prim_func(private=True, s_tir=True)
    def func(pages: T.handle, source: T.handle, target: T.handle):
        n = T.int64()
        blocks = T.int64()
        P = T.match_buffer(pages, (blocks, 2, kv_heads, head_dim * KV_BLOCK), kv_dtype)
        S = T.match_buffer(source, (n,), "int32")
        D = T.match_buffer(target, (n,), "int32")
        for bx in T.thread_binding((features + threads - 1) // threads, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                if bx * threads + tx < features:
                    copy(P, S, D, n, bx * threads + tx, 0, KV_BLOCK, 1)
                    copy(P, S, D, n, bx * threads + tx, 1, 1, head_dim)

    return hand_scheduled(func)
