"""y = x Wᵀ for up to eight rows of x at a time: bound by the reading of W.

A team of threads, its lanes, has some rows of W, each lane units of a few features (weight.py) of
all of them: neighbouring lanes read neighbouring memory, a lane has a unit of every row on its way
before it uses the first, and what it reads of x serves all of them, as a weight serves all rows of
x. The lanes' sums meet in shared memory.

One row of x comes to shared memory first, if there is room, as float32: lanes that would each read
a quantization group of it from global memory meet in banks. There it can be normalised too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T

from .activation import silu
from .limits import LANES, VECTOR, GpuLimits
from .sums import helped_sums, helpers_of, pitch_of
from .weight import WeightReader

_OUTS_OF_ONE, _OUTS = 8, 4  # rows of W of a thread, for one row of x and for more
_WORKGROUPS = 264  # that keep a large GPU busy
# Of a workgroup at least, in several teams where lanes are few: more of them where each workgroup
# normalises x, whose values would take the registers of weights that are on their way.
_THREADS, _THREADS_TO_NORMALISE = 128, 192
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class GemvShape:
    """lanes: of a team, which has `outs` rows of W in `steps` units a lane; teams: of a workgroup;
    x_pitch: places of a unit of x in shared memory; room: for all of x."""

    lanes: int
    steps: int
    outs: int
    teams: int
    x_pitch: int
    room: bool

    @property
    def threads(self) -> int:
        return self.lanes * self.teams


def gemv_shape(
    limits: GpuLimits,
    rows: int,
    weight_rows: int,
    in_features: int,
    reader: WeightReader,
    normed: bool = False,
) -> GemvShape:
    units = in_features // reader.unit
    outs = _OUTS_OF_ONE if rows == 1 else _OUTS
    most = min(limits.threads, limits.shared_bytes // ((rows * outs + 2) * _FLOAT))
    exact = [n for n in range(2 * LANES, most + 1, LANES) if units % n == 0]
    steps = units // exact[-1] if exact else -(-units // (most // LANES * LANES))
    lanes = -(-units // (steps * LANES)) * LANES
    wanted = _THREADS_TO_NORMALISE if normed else _THREADS
    teams = max(1, min(wanted, most) // lanes)
    while outs > 2 and weight_rows < _WORKGROUPS * outs * teams:
        outs //= 2
    # Vectors of neighbouring lanes are in different banks.
    x_pitch = reader.unit + VECTOR if reader.unit > 2 * VECTOR else reader.unit
    places = units * x_pitch + (outs + 1) * teams * pitch_of(lanes) + lanes * teams
    room = rows == 1 and places * _FLOAT <= limits.shared_bytes
    return GemvShape(lanes, steps, outs, teams, x_pitch, room)


def gemv(
    limits: GpuLimits,
    rows: int,
    out_features: int,
    in_features: int,
    reader: WeightReader,
    dtype: str,
    store: Callable,
    gated: bool = False,
    eps: float | None = None,
):
    """Returns the inline function `multiply(X, G, W, R, O, n)`, a kernel.

    X `[n, in]` in `dtype`; store(R, O, row, o, value) keeps a result. gated: W is `[2·out, in]`,
    gate and up; a result is up · silu(gate). eps, only for one row with room for it in shared
    memory: the rows of x are normalised (norm.py) with the weight G `[in]`. Their root mean square
    is the same for all features, so it divides the sums.
    """
    unit, chunk, registers = reader.unit, reader.chunk, reader.registers
    units = in_features // unit
    pairs = 2 if gated else 1
    normed = eps is not None
    shape = gemv_shape(limits, rows, pairs * out_features, in_features, reader, normed)
    lanes, outs, teams, threads = shape.lanes, shape.outs, shape.teams, shape.threads
    staged = shape.room
    assert staged or not normed
    own = outs // pairs  # results of a team
    block_outs = teams * own
    blocks = -(-out_features // block_outs)
    vector = min(chunk, limits.vector_of(dtype))
    few = VECTOR if unit % VECTOR == 0 else 1  # values of x that a thread brings at once
    whole = units % lanes == 0  # every lane has as many units
    fits = out_features % block_outs == 0
    products, results = rows * teams * outs, rows * block_outs
    sums = products + (teams if normed else 0)  # behind the products: of x²
    helpers = helpers_of(sums, threads)
    assert sums <= threads
    pitch = pitch_of(lanes)
    share = helped_sums(sums, lanes, helpers)
    scaled = reader.scale is not None

    def weight_row(first, j):
        """Of a team's results from `first` on. Past the last: that again, which is not kept."""
        o = first + j % own
        return (o if fits else T.min(o, out_features - 1)) + j // own * out_features

    def inside(u):
        """Past the last unit: that again, which is not added."""
        return u if whole else T.min(u, units - 1)

    def row_of(by, r, n):
        return by if rows == 1 else T.min(by * rows + r, n - 1)

    @T.inline
    def fetch_unit(W, raw, first, u):
        for j in T.unroll(outs):
            reader.fetch(W, raw, j * registers, weight_row(first, j), inside(u))

    # The first unit's factors wait for their use in the lane's own places of the parts: from
    # registers NVIDIA's compiler moves their loads behind the products, where the lane would wait
    # for memory again. Shared memory they must reach before the barrier behind which x is read.
    @T.inline
    def keep_factors(W, parts, place, first, u):
        for j in T.unroll(outs):
            parts[place + j * pitch] = reader.factor(W, weight_row(first, j), inside(u) * unit)

    @T.inline
    def stage(X, G, XS, squares, row, t):
        squares[0] = T.float32(0)
        for i in T.unroll((in_features + threads * few - 1) // (threads * few)):
            k = T.meta_var((i * threads + t) * few)
            stored = T.alloc_buffer((few,), dtype, scope="local")
            value = T.alloc_buffer((few,), "float32", scope="local")
            if k < in_features:
                for v in T.vectorized(few):
                    stored[v] = X[row, k + v]
                for v in T.unroll(few):
                    value[v] = T.Cast("float32", stored[v])
                if normed:
                    weight = T.alloc_buffer((few,), "float32", scope="local")
                    for v in T.vectorized(few):
                        weight[v] = G[k + v]
                    for v in T.unroll(few):
                        squares[0] += value[v] * value[v]
                        value[v] *= weight[v]
                for v in T.vectorized(few):
                    XS[k // unit * shape.x_pitch + k % unit + v] = value[v]

    @T.inline
    def load_x(X, XS, x, at, row, u, c):
        if staged:
            for w in T.unroll(chunk // few):
                for v in T.vectorized(few):
                    x[at + w * few + v] = XS[inside(u) * shape.x_pitch + c * chunk + w * few + v]
        else:
            stored = T.alloc_buffer((chunk,), dtype, scope="local")
            for w in T.unroll(chunk // vector):
                for v in T.vectorized(vector):
                    stored[w * vector + v] = X[row, inside(u) * unit + c * chunk + w * vector + v]
            for v in T.unroll(chunk):
                x[at + v] = T.Cast("float32", stored[v])

    @T.inline
    def add_products(X, XS, raw, sums, n, by, u):
        for c in T.unroll(unit // chunk):
            if rows <= outs:
                x = T.alloc_buffer((rows * chunk,), "float32", scope="local")
                for r in T.unroll(rows):
                    load_x(X, XS, x, r * chunk, row_of(by, r, n), u, c)
                for j in T.unroll(outs):
                    D = T.alloc_buffer((chunk,), "float32", scope="local")
                    reader.values(raw, j * registers, c, D, 0)
                    for r in T.unroll(rows):
                        for v in T.unroll(chunk):
                            sums[r * outs + j] += D[v] * x[r * chunk + v]
            else:
                D = T.alloc_buffer((outs * chunk,), "float32", scope="local")
                for j in T.unroll(outs):
                    reader.values(raw, j * registers, c, D, j * chunk)
                for r in T.unroll(rows):
                    x = T.alloc_buffer((chunk,), "float32", scope="local")
                    load_x(X, XS, x, 0, row_of(by, r, n), u, c)
                    for j in T.unroll(outs):
                        for v in T.unroll(chunk):
                            sums[r * outs + j] += D[j * chunk + v] * x[v]

    @T.inline
    def add_unit(X, XS, W, parts, raw, acc, n, by, place, first, u, kept):
        if whole and not scaled:
            add_products(X, XS, raw, acc, n, by, u)
        else:
            part = T.alloc_buffer((rows * outs,), "float32", scope="local")
            for i in T.unroll(rows * outs):
                part[i] = T.float32(0)
            add_products(X, XS, raw, part, n, by, u)
            for j in T.unroll(outs):
                factor = T.alloc_buffer((1,), "float32", scope="local")
                if kept and scaled:
                    factor[0] = parts[place + j * pitch]
                else:
                    factor[0] = reader.factor(W, weight_row(first, j), inside(u) * unit)
                if not whole:
                    factor[0] = T.Select(u < units, factor[0], T.float32(0))
                for r in T.unroll(rows):
                    acc[r * outs + j] += part[r * outs + j] * factor[0]

    @T.inline
    def add_up(H, s, count, total):
        total[0] = T.float32(0)
        for h in T.unroll(count):
            total[0] += H[s * helpers + h]

    @T.inline
    def finish(R, O, H, n, by, bx, t):
        total = T.alloc_buffer((1,), "float32", scope="local")
        if t < results:
            s = T.meta_var(t // own * outs + t % own)
            row = T.meta_var(by * rows + t // block_outs)
            o = T.meta_var(bx * block_outs + t % block_outs)
            add_up(H, s, helpers, total)
            if normed:
                squares = T.alloc_buffer((1,), "float32", scope="local")
                add_up(H, products, teams * helpers, squares)
                mean = T.meta_var(squares[0] * T.float32(1 / in_features))
                squares[0] = T.float32(1) / T.sqrt(mean + T.float32(eps))
                total[0] *= squares[0]
            if gated:
                up = T.alloc_buffer((1,), "float32", scope="local")
                add_up(H, s + own, helpers, up)
                if normed:
                    up[0] *= squares[0]
                total[0] = silu(total[0]) * up[0]
            if row < n and o < out_features:
                store(R, O, row, o, total[0])

    @T.inline
    def multiply(X, G, W, R, O, n):
        for by in T.thread_binding((n + (rows - 1)) // rows, thread="blockIdx.y"):
            for bx in T.thread_binding(blocks, thread="blockIdx.x"):
                for t in T.thread_binding(threads, thread="threadIdx.x"):
                    parts = T.alloc_buffer((sums * pitch,), "float32", scope="shared")
                    shared_sums = T.alloc_buffer((threads,), "float32", scope="shared")
                    raw = T.alloc_buffer((outs * registers,), reader.register_dtype, scope="local")
                    acc = T.alloc_buffer((rows * outs,), "float32", scope="local")
                    for i in T.unroll(rows * outs):
                        acc[i] = T.float32(0)
                    team = T.meta_var(t // lanes)
                    lane = T.meta_var(t % lanes)
                    first = T.meta_var(bx * block_outs + team * own)
                    place = T.meta_var(team * outs * pitch + lane)
                    if staged:
                        XS = T.alloc_buffer((units * shape.x_pitch,), "float32", scope="shared")
                        squares = T.alloc_buffer((1,), "float32", scope="local")
                        fetch_unit(W, raw, first, lane)
                        if scaled:
                            keep_factors(W, parts, place, first, lane)
                        stage(X, G, XS, squares, by, t)
                        add_unit(X, XS, W, parts, raw, acc, n, by, place, first, lane, True)
                        for step in T.serial(shape.steps - 1):
                            u = T.meta_var((step + 1) * lanes + lane)
                            fetch_unit(W, raw, first, u)
                            add_unit(X, XS, W, parts, raw, acc, n, by, place, first, u, False)
                        if normed:
                            parts[(products + team) * pitch + lane] = squares[0]
                    else:
                        for step in T.serial(shape.steps):
                            u = T.meta_var(step * lanes + lane)
                            fetch_unit(W, raw, first, u)
                            add_unit(X, None, W, parts, raw, acc, n, by, place, first, u, False)
                    for r in T.unroll(rows):
                        for j in T.unroll(outs):
                            s = T.meta_var((r * teams + team) * outs + j)
                            parts[s * pitch + lane] = acc[r * outs + j]
                    share(parts, shared_sums, t)
                    finish(R, O, shared_sums, n, by, bx, t)

    return multiply
