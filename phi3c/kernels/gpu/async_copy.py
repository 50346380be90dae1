"""Tiles on their way to shared memory by CUDA's cp.async (compute capability 8.0)."""

from collections.abc import Callable

from tvm.script import tirx as T

CHUNK = 8  # float16 of a vector: 16 bytes, the most that a copy has


def async_copy(size: int):
    """cp.async of so many bytes. The prefetch: a row's next features are in the same 128 bytes."""
    return T.ptx[f"cp.async.{'cg' if size == 16 else 'ca'}.shared.global.L2::128B"]


def half_rows(
    rows: int, threads: int, depth: int, in_features: int, matrix: Callable, at: Callable
):
    """Returns the inline function `fetch(M, S, base, last, first, step, tx)`: the rows first … of
    matrix(M), `[…, in]` float16, their features step · depth …, to S[base + at(row, chunk) …],
    without the commit. Rows past `last` are zeros, as features past the last."""
    chunks = depth // CHUNK
    copies = rows * chunks // threads
    copy = async_copy(16)
    assert copies * threads == rows * chunks and in_features % CHUNK == 0

    @T.inline
    def fetch(M, S, base, last, first, step, tx):
        for i in T.unroll(copies):
            c = T.meta_var(i * threads + tx)
            row = T.meta_var(first + c // chunks)
            feature = T.meta_var(step * depth + c % chunks * CHUNK)
            held = T.meta_var(T.And(row <= last, feature < in_features))
            copy(
                S.access_ptr("w", offset=base + at(c // chunks, c % chunks)),
                T.address_of(matrix(M)[T.min(row, last), T.min(feature, in_features - CHUNK)]),
                16,
                T.Select(held, T.uint32(16), T.uint32(0)),
            )

    return fetch
