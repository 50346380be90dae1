"""y = x Wᵀ for any number of rows, over plain and group-quantized weights."""

from tvm.script import tirx as T

from ..root import hand_scheduled
from ..weight_format import GroupFormat, WeightFormat
from .gemm import gemm
from .gemv import gemv
from .half_tile import has_half_tiles
from .limits import GpuLimits, MatrixUnits
from .mma_gemm import LARGE, SMALL, mma_gemm, rows_of_large
from .simdgroup_gemm import simdgroup_gemm
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
):
    """x `[n, in]` dtype, weight (weight.weight_buffers), (residual `[n, out]` dtype) →
    `[n, out]` out_dtype. With `residual`, y += residual. Sums are float32.

    The host chooses the kernel by n, with loops of no or one iteration: TVM refuses to put barriers
    into kernels that are inside a condition.
    """
    reader = weight_reader(limits, in_features, kind)

    @T.inline
    def store(R, O, row, o, value):
        if residual:
            O[row, o] = T.Cast(out_dtype, value + T.Cast("float32", R[row, o]))
        else:
            O[row, o] = T.Cast(out_dtype, value)

    shape = (out_features, in_features, reader, dtype, store)
    one, two, four, eight = (gemv(limits, rows, *shape) for rows in (1, 2, 4, 8))
    units = matrix if has_half_tiles(in_features, kind, dtype) else "none"
    many_from, two_sizes = GEMV_ROWS, units == "mma"
    some = None
    if units == "mma":
        many_from = rows_of_large(out_features)
        half = (out_features, in_features, kind, store)
        some, many = (mma_gemm(limits, tile, *half) for tile in (SMALL, LARGE))
    elif units == "simdgroup":
        many = simdgroup_gemm(limits, out_features, in_features, kind, store)
    else:
        many = gemm(limits, *shape)

    @T.inline
    def body(X, W, R, O, n):
        for _ in T.serial(T.Cast("int64", n == 1)):
            one(X, None, W, R, O, n)
        for _ in T.serial(T.Cast("int64", n == 2)):
            two(X, None, W, R, O, n)
        for _ in T.serial(T.Cast("int64", T.And(n > 2, n <= 4))):
            four(X, None, W, R, O, n)
        for _ in T.serial(T.Cast("int64", T.And(n > 4, n <= GEMV_ROWS))):
            eight(X, None, W, R, O, n)
        if two_sizes:
            for _ in T.serial(T.Cast("int64", T.And(n > GEMV_ROWS, n <= many_from))):
                some(X, W, R, O, n)
        for _ in T.serial(T.Cast("int64", n > many_from)):
            many(X, W, R, O, n)

    grouped = isinstance(kind, GroupFormat)
    (w_shape, w_dtype), *rest = weight_buffers(out_features, in_features, kind)
    s_shape, s_dtype = rest[0] if rest else (None, None)

    if grouped and residual:

        @T.prim_func(private=True, s_tir=True)
        def func(x: T.handle, q: T.handle, scale: T.handle, res: T.handle, out: T.handle):
            n = T.int64()
            X = T.match_buffer(x, (n, in_features), dtype)
            Q = T.match_buffer(q, w_shape, w_dtype)
            S = T.match_buffer(scale, s_shape, s_dtype)
            R = T.match_buffer(res, (n, out_features), dtype)
            O = T.match_buffer(out, (n, out_features), out_dtype)
            W = T.meta_var((Q, S))
            body(X, W, R, O, n)

    elif grouped:

        @T.prim_func(private=True, s_tir=True)
        def func(x: T.handle, q: T.handle, scale: T.handle, out: T.handle):
            n = T.int64()
            X = T.match_buffer(x, (n, in_features), dtype)
            Q = T.match_buffer(q, w_shape, w_dtype)
            S = T.match_buffer(scale, s_shape, s_dtype)
            O = T.match_buffer(out, (n, out_features), out_dtype)
            W = T.meta_var((Q, S))
            body(X, W, None, O, n)

    elif residual:

        @T.prim_func(private=True, s_tir=True)
        def func(x: T.handle, weight: T.handle, res: T.handle, out: T.handle):
            n = T.int64()
            X = T.match_buffer(x, (n, in_features), dtype)
            M = T.match_buffer(weight, w_shape, w_dtype)
            R = T.match_buffer(res, (n, out_features), dtype)
            O = T.match_buffer(out, (n, out_features), out_dtype)
            W = T.meta_var((M,))
            body(X, W, R, O, n)

    else:

        @T.prim_func(private=True, s_tir=True)
        def func(x: T.handle, weight: T.handle, out: T.handle):
            n = T.int64()
            X = T.match_buffer(x, (n, in_features), dtype)
            M = T.match_buffer(weight, w_shape, w_dtype)
            O = T.match_buffer(out, (n, out_features), out_dtype)
            W = T.meta_var((M,))
            body(X, W, None, O, n)

    return hand_scheduled(func)
