"""One step of the online softmax (Milakov & Gimelshein 2018), in powers of two."""

from tvm.script import tirx as T

from ..layout import KV_BLOCK
from .math import exp2

MASKED = -1e30  # a score that no key has; its weight is exactly zero


def online_softmax(lanes: int, vectors: int):
    """Returns the inline function `step(S, M, L, O, i, n_blocks)`.

    Row i of the scores S `[rows, blocks·16]` becomes weights relative to the new maximum; the
    running maximum M, sum L and accumulator O `[rows, vectors·lanes]` of the row are rescaled.
    """

    @T.inline
    def step(S, M, L, O, i, n_blocks):
        top = T.alloc_buffer((KV_BLOCK,), "float32")
        total = T.alloc_buffer((KV_BLOCK,), "float32")
        best = T.alloc_buffer((1,), "float32")
        for v in T.vectorized(KV_BLOCK):
            top[v] = M[i]
        for c in T.serial(n_blocks):
            for v in T.vectorized(KV_BLOCK):
                top[v] = T.max(top[v], S[i, c * KV_BLOCK + v])
        best[0] = top[0]
        for v in T.unroll(KV_BLOCK - 1):
            best[0] = T.max(best[0], top[v + 1])
        rescale: T.let = exp2(M[i] - best[0])
        M[i] = best[0]
        for v in T.vectorized(KV_BLOCK):
            total[v] = T.float32(0)
        for c in T.serial(n_blocks):
            for v in T.vectorized(KV_BLOCK):
                S[i, c * KV_BLOCK + v] = T.Select(
                    S[i, c * KV_BLOCK + v] > T.float32(0.5 * MASKED),
                    exp2(S[i, c * KV_BLOCK + v] - best[0]),
                    T.float32(0),
                )
                total[v] += S[i, c * KV_BLOCK + v]
        L[i] *= rescale
        for v in T.unroll(KV_BLOCK):
            L[i] += total[v]
        for j in T.serial(vectors):
            for v in T.vectorized(lanes):
                O[i, j * lanes + v] *= rescale

    return step
