"""y = x Wᵀ for many rows by Metal's simdgroup matrices: 8 × 8, float16 with float32 sums.

Metal Shading Language Specification, "SIMD-Group Matrix Functions". Needs simdgroups of 32 threads,
in the order of thread_position_in_threadgroup, as Apple's GPUs have them.
"""

from collections.abc import Callable

from tvm.script import tirx as T

from ..weight_format import WeightFormat
from .half_tile import CHUNK, DEPTH, weight_tile, x_tile
from .limits import GpuLimits

TILE = 64  # rows of x, and output features, of a workgroup
_SIMDGROUP = 32
_PART = 32  # rows, and output features, of a simdgroup
_VECTOR = 4  # halves of a load: Metal has no longer vectors
_PITCH = DEPTH + CHUNK  # a row in shared memory: rows of a matrix start in other banks
_SIDE = 8  # of a matrix


def _place(row, chunk):
    """Of a row's chunk in shared memory, in halves."""
    return row * _PITCH + chunk * CHUNK


def simdgroup_gemm(
    limits: GpuLimits, out_features: int, in_features: int, kind: WeightFormat, store: Callable
):
    """Returns the inline function `multiply(X, W, R, O, n)`, a kernel, as gemm.py has it.

    X float16, W as half_tile.has_half_tiles asks for it. Shared memory has one stage, so that
    several workgroups fit a core, and cover each other's barriers.
    """
    threads = 2 * TILE
    across = TILE // _PART  # simdgroups along the output features
    assert threads == across**2 * _SIMDGROUP <= limits.threads
    sums = _SIDE * _PART  # that a simdgroup stores at once
    assert 2 * TILE * _PITCH * 2 + threads // _SIMDGROUP * sums * 4 <= limits.shared_bytes
    side = _PART // _SIDE  # matrices along a simdgroup's part
    steps = -(-in_features // DEPTH)
    blocks = -(-out_features // TILE)
    xs = x_tile(TILE, in_features, _VECTOR)
    ws = weight_tile(TILE, in_features, kind, _VECTOR)

    @T.inline
    def load(S, m, row, k, transposed):
        for i in T.unroll(side):
            T.metal.simdgroup_load(
                m.data, i, S.access_ptr("r", offset=_place(row + i * _SIDE, k)), _PITCH,
                transpose_matrix=transposed,
            )  # fmt: skip

    @T.inline
    def multiply_stage(A, B, acc, row, out):
        for k in T.unroll(DEPTH // _SIDE):
            a = T.alloc_buffer((side * 64,), "float16", scope="metal.simdgroup")
            b = T.alloc_buffer((side * 64,), "float16", scope="metal.simdgroup")
            load(A, a, row, k, False)
            load(B, b, out, k, True)
            for i in T.unroll(side):
                for j in T.unroll(side):
                    c = T.meta_var(i * side + j)
                    T.metal.simdgroup_multiply_accumulate(
                        acc.data, c, a.data, i, b.data, j, acc.data, c
                    )

    # Eight rows of the simdgroup's part at a time go through its own piece of shared memory, where
    # every thread finds one output feature of them.
    @T.inline
    def store_sums(R, O, C, acc, n, row, out, base, lane):
        for i in T.unroll(side):
            for j in T.unroll(side):
                T.metal.simdgroup_store(
                    acc.data, i * side + j, C.access_ptr("w", offset=base + j * _SIDE), _PART
                )
            T.tvm_storage_sync("warp")
            for r in T.unroll(_SIDE):
                to: T.let = row + i * _SIDE + r
                if to < n and out + lane < out_features:
                    store(R, O, to, out + lane, C[base + r * _PART + lane])
            T.tvm_storage_sync("warp")

    # The barriers are all here: TVM does not know what the matrix functions read.
    @T.inline
    def multiply(X, W, R, O, n):
        for bx in T.thread_binding((n + (TILE - 1)) // TILE, thread="blockIdx.x"):
            for by in T.thread_binding(blocks, thread="blockIdx.y"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    A = T.alloc_buffer((TILE * _PITCH,), "float16", scope="shared")
                    B = T.alloc_buffer((TILE * _PITCH,), "float16", scope="shared")
                    C = T.alloc_buffer((threads // _SIMDGROUP * sums,), "float32", scope="shared")
                    acc = T.alloc_buffer((side * side * 64,), "float32", scope="metal.simdgroup")
                    x_raw = T.alloc_buffer((xs.registers,), xs.register_dtype, scope="local")
                    w_raw = T.alloc_buffer((ws.registers,), ws.register_dtype, scope="local")
                    factor = T.alloc_buffer((1,), "float32", scope="local")
                    with T.attr(0, "hand_threaded", 0):
                        group: T.let = tx // _SIMDGROUP
                        row: T.let = group // across * _PART
                        out: T.let = group % across * _PART
                        for i in T.unroll(side * side):
                            T.metal.make_filled_simdgroup_matrix(acc.data, i, T.float32(0))
                        xs.fetch(X, x_raw, factor, n - 1, bx * TILE, 0, tx)
                        ws.fetch(W, w_raw, factor, out_features - 1, by * TILE, 0, tx)
                        xs.put(x_raw, factor, A, 0, _place, tx)
                        ws.put(w_raw, factor, B, 0, _place, tx)
                        T.tvm_storage_sync("shared")
                        for step in T.serial(steps - 1):
                            xs.fetch(X, x_raw, factor, n - 1, bx * TILE, step + 1, tx)
                            ws.fetch(W, w_raw, factor, out_features - 1, by * TILE, step + 1, tx)
                            multiply_stage(A, B, acc, row, out)
                            T.tvm_storage_sync("shared")
                            xs.put(x_raw, factor, A, 0, _place, tx)
                            ws.put(w_raw, factor, B, 0, _place, tx)
                            T.tvm_storage_sync("shared")
                        multiply_stage(A, B, acc, row, out)
                        store_sums(
                            R, O, C, acc, n, bx * TILE + row, by * TILE + out,
                            group * sums, tx % _SIMDGROUP,
                        )  # fmt: skip

    return multiply
