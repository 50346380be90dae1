"""y = x Wᵀ for any number of rows, over plain and group-quantized weights, and what stands before
and behind it in a layer: the norm of x, the gate of its products, the residual."""

from tvm.script import tirx as T

from ..root import hand_scheduled, without
from ..weight_format import GroupFormat, WeightFormat
from .activation import gate_rows
from .gemm import gemm
from .gemv import gemv, gemv_shape
from .half_tile import has_half_tiles
from .limits import GpuLimits, MatrixUnits
from .mma_gemm import from_rows, mma_gemm
from .norm import normalise
from .simdgroup_gemm import simdgroup_gemm
from .skinny_gemm import FEW, MORE, add_parts, skinny_gemm, skinny_tile, workspace_shape
from .staged import has_stages
from .weight import weight_buffers, weight_reader

GEMV_ROWS = 16  # up to here W is read once for eight rows; a tile of the GEMM has 64


def linear(
    limits: GpuLimits,
    matrix: MatrixUnits,
    out_features: int,
    in_features: int,
    kind: WeightFormat,
    residual: bool,
    dtype: str,
    out_dtype: str,
    gated: bool = False,
    eps: float | None = None,
):
    """x `[n, in]` dtype, (norm `[in]` f32), weight (weight.weight_buffers), (residual `[n, out]`
    dtype) → `[n, out]` out_dtype. Sums are float32.

    With eps, x is normalised first, as norm.py has it with the weight `norm`. With `residual`,
    y += residual. gated: the weight is `[2·out, in]`, gate and up; y = up · silu(gate).

    The host chooses the kernel by n, with loops of no or one iteration: TVM refuses to put barriers
    into kernels that are inside a condition. What few rows have in one kernel, normalised rows and
    products that wait for the gate, is workspace for many.
    """
    reader = weight_reader(limits, in_features, kind)
    normed, products = eps is not None, (2 if gated else 1) * out_features
    assert not (gated and residual)

    @T.inline
    def store(R, O, row, o, value):
        if residual:
            O[row, o] = T.Cast(out_dtype, value + T.Cast("float32", R[row, o]))
        else:
            O[row, o] = T.Cast(out_dtype, value)

    normed_here = normed and gemv_shape(limits, 1, products, in_features, reader, True).room
    by_rows = (out_features, in_features, reader, dtype, store, gated)
    one = gemv(limits, 1, *by_rows, eps if normed_here else None)
    two, four = (gemv(limits, rows, *by_rows) for rows in (2, 4))
    units = matrix if has_half_tiles(in_features, kind, dtype) else "none"
    skinny = units == "mma" and has_stages(in_features, kind)
    eight = few = some = add = tile = None
    if skinny:
        gemv_most, many_from = 4, from_rows(products)
        tile = skinny_tile(products, in_features, kind)
        half = (tile, products, in_features, kind, store)
        few, some = (skinny_gemm(limits, rows, *half) for rows in (FEW, MORE))
        add = add_parts(limits, tile, products, store)
    else:
        gemv_most = many_from = GEMV_ROWS
        eight = gemv(limits, 8, *by_rows)
    parted = skinny and tile.parts > 1
    if units == "mma":
        many = mma_gemm(limits, products, in_features, kind, store)
    elif units == "simdgroup":
        many = simdgroup_gemm(limits, products, in_features, kind, store)
    else:
        many = gemm(limits, products, in_features, reader, dtype, store)
    norm = normalise(limits, in_features, eps, dtype) if normed else None
    gate = gate_rows(limits, out_features, out_dtype) if gated else None

    @T.inline
    def choose(X, G, N, W, R, Y, P, O, n):
        """N: X or, for those kernels that do not normalise, workspace. Y: O or workspace, for
        products that are not gated yet. P: workspace for sums of parts of the input features."""
        if normed:
            for _ in T.serial(T.Cast("int64", n > (1 if normed_here else 0))):
                norm(X, G, N, n)
        for _ in T.serial(T.Cast("int64", n == 1)):
            one(X if normed_here else N, G, W, R, O, n)
        for _ in T.serial(T.Cast("int64", n == 2)):
            two(N, None, W, R, O, n)
        for _ in T.serial(T.Cast("int64", T.And(n > 2, n <= 4))):
            four(N, None, W, R, O, n)
        if skinny:
            for _ in T.serial(T.Cast("int64", T.And(n > 4, n <= FEW))):
                few(N, W, R, Y, P, n)
            for _ in T.serial(T.Cast("int64", T.And(n > FEW, n <= many_from))):
                some(N, W, R, Y, P, n)
            if parted:
                for _ in T.serial(T.Cast("int64", T.And(n > 4, n <= MORE))):
                    add(n, (P, R, Y))
        else:
            for _ in T.serial(T.Cast("int64", T.And(n > 4, n <= GEMV_ROWS))):
                eight(N, None, W, R, O, n)
        for _ in T.serial(T.Cast("int64", n > many_from)):
            many(N, W, R, Y, n)
        if gated:
            for _ in T.serial(T.Cast("int64", n > gemv_most)):
                gate(Y, O, n)

    @T.inline
    def with_sums(X, G, N, W, R, Y, O, n):
        if parted:
            P = T.alloc_buffer(workspace_shape(tile, n, products), "float32")
            choose(X, G, N, W, R, Y, P, O, n)
        else:
            choose(X, G, N, W, R, Y, None, O, n)

    @T.inline
    def body(X, G, W, R, O, n):
        if normed and gated:
            N = T.alloc_buffer((n, in_features), dtype)
            Y = T.alloc_buffer((n, products), out_dtype)
            with_sums(X, G, N, W, R, Y, O, n)
        elif normed:
            N = T.alloc_buffer((n, in_features), dtype)
            with_sums(X, G, N, W, R, O, O, n)
        elif gated:
            Y = T.alloc_buffer((n, products), out_dtype)
            with_sums(X, G, X, W, R, Y, O, n)
        else:
            with_sums(X, G, X, W, R, O, O, n)

    (w_shape, w_dtype), *rest = weight_buffers(products, in_features, kind)
    s_shape, s_dtype = rest[0] if rest else (None, None)

    if isinstance(kind, GroupFormat):

        @T.prim_func(private=True, s_tir=True)
        def func(
            x: T.handle, norm: T.handle, q: T.handle, scale: T.handle, res: T.handle, out: T.handle
        ):
            n = T.int64()
            X = T.match_buffer(x, (n, in_features), dtype)
            G = T.match_buffer(norm, (in_features,), "float32")
            Q = T.match_buffer(q, w_shape, w_dtype)
            S = T.match_buffer(scale, s_shape, s_dtype)
            R = T.match_buffer(res, (n, out_features), dtype)
            O = T.match_buffer(out, (n, out_features), out_dtype)
            W = T.meta_var((Q, S))
            body(X, G, W, R, O, n)

    else:

        @T.prim_func(private=True, s_tir=True)
        def func(x: T.handle, norm: T.handle, weight: T.handle, res: T.handle, out: T.handle):
            n = T.int64()
            X = T.match_buffer(x, (n, in_features), dtype)
            G = T.match_buffer(norm, (in_features,), "float32")
            M = T.match_buffer(weight, w_shape, w_dtype)
            R = T.match_buffer(res, (n, out_features), dtype)
            O = T.match_buffer(out, (n, out_features), out_dtype)
            W = T.meta_var((M,))
            body(X, G, W, R, O, n)

    left_out = {"G": not normed, "R": not residual}
    return hand_scheduled(without(func, {name for name, out in left_out.items() if out}))
