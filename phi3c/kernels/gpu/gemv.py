"""y = x Wᵀ for up to eight rows of x at a time: bound by the reading of W.

32 threads or more share an output row, each with units of a few features (weight.py), so that
together they read whole lines of memory; a weight, once read, serves all rows of x. Their sums meet
in shared memory.
"""

from collections.abc import Callable

from tvm.script import tirx as T

from .limits import LANES, GpuLimits
from .sums import lanes_sum, pitch_of
from .weight import VECTOR, WeightReader

_OUTS = 2  # output rows of a thread, which share what it reads of x

_WORKGROUPS = 512  # that a large GPU wants to be busy


def _lanes(limits: GpuLimits, out_features: int, units: int) -> int:
    """Threads of an output row: more of them where few rows would leave a large GPU idle."""
    lanes = LANES
    while (
        2 * lanes <= limits.threads // 2
        and 2 * (2 * lanes) <= units
        and out_features * lanes < _WORKGROUPS * limits.threads * _OUTS
    ):
        lanes *= 2
    return lanes


def gemv(
    limits: GpuLimits,
    rows: int,
    out_features: int,
    in_features: int,
    reader: WeightReader,
    dtype: str,
    store: Callable,
):
    """Returns the inline function `multiply(X, W, R, O, n)`, a kernel.

    X `[n, in]` in `dtype`; store(R, O, row, o, value) keeps a result.
    """
    units = in_features // reader.unit
    lanes = _lanes(limits, out_features, units)
    teams = limits.threads // lanes
    block_outs = teams * _OUTS
    sums = block_outs * rows
    unit = reader.unit
    vector = VECTOR if unit % VECTOR == 0 else 1
    whole = units % lanes == 0  # every lane has as many units
    fits = out_features % block_outs == 0
    blocks = -(-out_features // block_outs)
    pitch = pitch_of(lanes)
    add_up = lanes_sum(lanes)

    # Past the last row: the last one again, whose result is not kept.
    def clamped(o):
        return o if fits else T.min(o, out_features - 1)

    def row_of(by, r, n):
        return by if rows == 1 else T.min(by * rows + r, n - 1)

    @T.inline
    def add_unit(X, W, acc, n, by, first_out, u):
        D = T.alloc_buffer((_OUTS * unit,), "float32", scope="local")
        for j in T.unroll(_OUTS):
            reader.read(W, D, j * unit, clamped(first_out + j * teams), u)
        for r in T.unroll(rows):
            stored = T.alloc_buffer((unit,), dtype, scope="local")
            for w in T.unroll(unit // vector):
                for v in T.vectorized(vector):
                    stored[w * vector + v] = X[row_of(by, r, n), u * unit + w * vector + v]
            for j in T.unroll(_OUTS):
                part = T.alloc_buffer((1,), "float32", scope="local")
                part[0] = T.float32(0)
                for v in T.unroll(unit):
                    part[0] += D[j * unit + v] * T.Cast("float32", stored[v])
                acc[r * _OUTS + j] += part[0] * reader.scale(W, clamped(first_out + j * teams), u)

    @T.inline
    def multiply(X, W, R, O, n):
        for by in T.thread_binding((n + (rows - 1)) // rows, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks, thread="blockIdx.x"):
                for ty in T.thread_binding(teams, thread="threadIdx.y"):
                    for tx in T.thread_binding(lanes, thread="threadIdx.x"):
                        parts = T.alloc_buffer((sums * pitch,), "float32", scope="shared")
                        acc = T.alloc_buffer((rows * _OUTS,), "float32", scope="local")
                        for i in T.unroll(rows * _OUTS):
                            acc[i] = T.float32(0)
                        for step in T.serial((units + lanes - 1) // lanes):
                            if whole:
                                add_unit(X, W, acc, n, by, bx * block_outs + ty, step * lanes + tx)
                            else:
                                if step * lanes + tx < units:
                                    add_unit(
                                        X, W, acc, n, by, bx * block_outs + ty, step * lanes + tx
                                    )
                        for r in T.unroll(rows):
                            for j in T.unroll(_OUTS):
                                at = T.meta_var(r * block_outs + j * teams + ty)
                                parts[at * pitch + tx] = acc[r * _OUTS + j]
                        s = T.meta_var(ty * lanes + tx)
                        total = T.alloc_buffer((1,), "float32", scope="local")
                        if s < sums:
                            add_up(parts, s, total)
                            row = T.meta_var(by * rows + s // block_outs)
                            o = T.meta_var(bx * block_outs + s % block_outs)
                            if row < n and o < out_features:
                                store(R, O, row, o, total[0])

    return multiply
