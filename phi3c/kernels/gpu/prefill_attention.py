"""Paged attention for many query tokens per sequence: prefill, chunks, chains and trees."""

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from ..root import hand_scheduled
from .limits import GpuLimits, MatrixUnits
from .mma_attention import LARGE, SMALL, has_mma_attention, mma_attention, rows_of_large
from .portable_attention import portable_attention


def prefill_attention(
    limits: GpuLimits,
    matrix: MatrixUnits,
    dtype: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    window: int | None,
):
    """q `[n, heads·head_dim]` dtype (rotated, scaled by log2(e)/sqrt(head_dim)),
    pages `[blocks, 2, kv_heads, head_dim·16]`, query_indptr `[b+1]`, block_indptr `[b+1]`,
    block_ids `[m]`, kv_start `[b]` (position of the first listed slot, a multiple of 16),
    kv_length `[b]` (tokens before this forward), positions, enter, leave `[n]`, all i32
    → `[n, heads·head_dim]` dtype.

    New token t of a sequence lies in slot kv_length + t; its position is that of its depth in the
    tree. A query at position p sees keys at positions p − window + 1 … p (config field
    sliding_window) that are old tokens, itself, or its ancestors (visible.py).
    """
    shape = (heads, kv_heads, head_dim)
    if matrix == "mma" and has_mma_attention(limits, head_dim, dtype, kv_dtype):
        many_from = rows_of_large(heads, head_dim)
        attend = few = mma_attention(SMALL, *shape, window)
        if many_from is not None:
            attend = by_rows(many_from, few, mma_attention(LARGE, *shape, window))
    else:
        attend = portable_attention(dtype, *shape, kv_dtype, window)

    @T.prim_func(private=True, s_tir=True)
    def func(
        q: T.handle,
        pages: T.handle,
        query_indptr: T.handle,
        block_indptr: T.handle,
        block_ids: T.handle,
        kv_start: T.handle,
        kv_length: T.handle,
        positions: T.handle,
        enter: T.handle,
        leave: T.handle,
        out: T.handle,
    ):
        n = T.int64()
        batch = T.int64()
        blocks = T.int64()
        listed = T.int64()
        Q = T.match_buffer(q, (n, heads * head_dim), dtype)
        P = T.match_buffer(pages, (blocks, 2, kv_heads, head_dim * KV_BLOCK), kv_dtype)
        QI = T.match_buffer(query_indptr, (batch + 1,), "int32")
        BI = T.match_buffer(block_indptr, (batch + 1,), "int32")
        B = T.match_buffer(block_ids, (listed,), "int32")
        START = T.match_buffer(kv_start, (batch,), "int32")
        LENGTH = T.match_buffer(kv_length, (batch,), "int32")
        POS = T.match_buffer(positions, (n,), "int32")
        ENTER = T.match_buffer(enter, (n,), "int32")
        LEAVE = T.match_buffer(leave, (n,), "int32")
        OUT = T.match_buffer(out, (n, heads * head_dim), dtype)
        attend(Q, P, QI, BI, B, START, LENGTH, POS, ENTER, LEAVE, OUT, n, batch)

    return hand_scheduled(func)


def by_rows(many_from: int, few, many):
    """One kernel or the other; the host chooses, as in linear.py."""

    @T.inline
    def attend(Q, P, QI, BI, B, START, LENGTH, POS, ENTER, LEAVE, OUT, n, batch):
        for _ in T.serial(T.Cast("int64", n <= many_from)):
            few(Q, P, QI, BI, B, START, LENGTH, POS, ENTER, LEAVE, OUT, n, batch)
        for _ in T.serial(T.Cast("int64", n > many_from)):
            many(Q, P, QI, BI, B, START, LENGTH, POS, ENTER, LEAVE, OUT, n, batch)

    return attend
