"""y = x Wᵀ for many rows by CUDA's tensor cores: mma.sync m16n8k16, float16 with float32 sums.

Every warp has a part of the workgroup's tile; fragments come to registers by ldmatrix. Layouts are
those of the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix".
Needs compute capability 8.0 and warps of 32 threads, in the order of threadIdx.x.
"""

from collections.abc import Callable

from tvm.script import tirx as T

from ..weight_format import WeightFormat
from .half_tile import CHUNK, DEPTH, weight_tile, x_tile
from .limits import GpuLimits

_WARP = 32
_VECTOR = 8  # halves of a load: 16 bytes
_CHUNKS = DEPTH // CHUNK


TILE = 128  # rows of x, and output features, of a workgroup; two threads for each
_WARP_ROWS, _WARP_OUTS = 64, 32  # a warp's part of it
_BUSY = 128  # workgroups that a large GPU wants


def from_rows(out_features: int) -> int:
    """From more rows than this on, such tiles are enough to keep a large GPU busy."""
    across = -(-out_features // TILE)
    return max(TILE // 2, (_BUSY // across) * TILE)


def _place(row, chunk):
    """Of a row's chunk in shared memory, in halves.

    A row is 64 bytes, half of all banks. The 8 rows that ldmatrix reads together have, with the
    chunks of each pair of rows exchanged like this, 8 different sets of 4 banks.
    """
    return (row * _CHUNKS + T.bitwise_xor(chunk, row // 2 % _CHUNKS)) * CHUNK


def mma_gemm(
    limits: GpuLimits,
    out_features: int,
    in_features: int,
    kind: WeightFormat,
    store: Callable,
):
    """Returns the inline function `multiply(X, W, R, O, n)`, a kernel, as gemm.py has it.

    X float16, W as half_tile.has_half_tiles asks for it.
    """
    threads = 2 * TILE
    across = TILE // _WARP_OUTS  # warps along the output features
    assert threads == TILE // _WARP_ROWS * across * _WARP <= limits.threads
    stage = TILE * DEPTH  # halves
    assert 2 * 2 * stage * 2 <= limits.shared_bytes
    down, right = _WARP_ROWS // 16, _WARP_OUTS // 8  # fragments of a warp's sums
    steps = -(-in_features // DEPTH)
    blocks = -(-out_features // TILE)
    pair = 2 if out_features % 2 == 0 else 1  # neighbouring sums that are stored at once
    xs = x_tile(TILE, in_features, _VECTOR)
    ws = weight_tile(TILE, in_features, kind, _VECTOR)

    # A fragment of x, 16 × 16: matrices of rows 0–7 and 8–15, then of features 8–15.
    @T.inline
    def load_a(A, a, base, row, k, lane):
        for i in T.unroll(down):
            T.ptx_legacy.ldmatrix(
                False, 4, ".b16", a.data, i * 8, A.data,
                base + _place(row + i * 16 + lane % 16, k * 2 + lane // 16), dtype="float16",
            )  # fmt: skip

    # Two of W, each 8 output features × 16: matrices of features 0–7 and 8–15. Stored with the
    # input features along a row, they are the columns that the instruction wants.
    @T.inline
    def load_b(B, b, base, row, k, lane):
        for j in T.unroll(right // 2):
            T.ptx_legacy.ldmatrix(
                False, 4, ".b16", b.data, j * 8, B.data,
                base + _place(row + j * 16 + lane // 16 * 8 + lane % 8, k * 2 + lane // 8 % 2),
                dtype="float16",
            )  # fmt: skip

    @T.inline
    def multiply_stage(A, B, acc, base, row, out, lane):
        for k in T.unroll(DEPTH // 16):
            a = T.alloc_buffer((down * 8,), "float16", scope="local")
            b = T.alloc_buffer((right * 4,), "float16", scope="local")
            load_a(A, a, base, row, k, lane)
            load_b(B, b, base, out, k, lane)
            for i in T.unroll(down):
                for j in T.unroll(right):
                    T.ptx_legacy.mma(
                        "m16n8k16", "row", "col", "fp16", "fp16", "fp32",
                        a.data, i * 8, b.data, j * 4, acc.data, (i * right + j) * 4, False,
                        dtype="float32",
                    )  # fmt: skip

    # Of a fragment of sums a thread has two neighbours of row lane / 4, and of the 8th from there.
    @T.inline
    def store_sums(R, O, acc, n, row, out, lane):
        for i in T.unroll(down):
            for h in T.unroll(2):
                to: T.let = row + i * 16 + h * 8 + lane // 4
                if to < n:
                    for j in T.unroll(right):
                        for p in T.unroll(2 // pair):
                            o: T.let = out + j * 8 + lane % 4 * 2 + p
                            if o < out_features:
                                for v in T.vectorized(pair):
                                    store(R, O, to, o + v, acc[(i * right + j) * 4 + h * 2 + p + v])

    # Neighbouring workgroups have the same features of W, which stays in the cache between them.
    # The barriers are all here: TVM's own, which do not tell one stage from the other, are off.
    @T.inline
    def multiply(X, W, R, O, n):
        for bx in T.thread_binding((n + (TILE - 1)) // TILE, thread="blockIdx.x"):
            for by in T.thread_binding(blocks, thread="blockIdx.y"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    A = T.alloc_buffer((2 * stage,), "float16", scope="shared")
                    B = T.alloc_buffer((2 * stage,), "float16", scope="shared")
                    acc = T.alloc_buffer((down * right * 4,), "float32", scope="local")
                    x_raw = T.alloc_buffer((xs.registers,), xs.register_dtype, scope="local")
                    w_raw = T.alloc_buffer((ws.registers,), ws.register_dtype, scope="local")
                    factor = T.alloc_buffer((1,), "float32", scope="local")
                    # Where the stage begins. (With step % 2 in the addresses, NVIDIA's compiler
                    # breaks the vectors that are stored.)
                    at = T.alloc_buffer((1,), "int32", scope="local")
                    with T.attr(0, "hand_threaded", 0):
                        lane: T.let = tx % _WARP
                        row: T.let = tx // _WARP // across * _WARP_ROWS
                        out: T.let = tx // _WARP % across * _WARP_OUTS
                        for i in T.unroll(down * right * 4):
                            acc[i] = T.float32(0)
                        xs.fetch(X, x_raw, factor, n - 1, bx * TILE, 0, tx)
                        ws.fetch(W, w_raw, factor, out_features - 1, by * TILE, 0, tx)
                        xs.put(x_raw, factor, A, 0, _place, tx)
                        ws.put(w_raw, factor, B, 0, _place, tx)
                        T.tvm_storage_sync("shared")
                        at[0] = 0
                        for step in T.serial(steps - 1):
                            xs.fetch(X, x_raw, factor, n - 1, bx * TILE, step + 1, tx)
                            ws.fetch(W, w_raw, factor, out_features - 1, by * TILE, step + 1, tx)
                            multiply_stage(A, B, acc, at[0], row, out, lane)
                            # The other stage was read before the last barrier.
                            at[0] = stage - at[0]
                            xs.put(x_raw, factor, A, at[0], _place, tx)
                            ws.put(w_raw, factor, B, at[0], _place, tx)
                            T.tvm_storage_sync("shared")
                        multiply_stage(A, B, acc, at[0], row, out, lane)
                        store_sums(R, O, acc, n, bx * TILE + row, by * TILE + out, lane)

    return multiply
