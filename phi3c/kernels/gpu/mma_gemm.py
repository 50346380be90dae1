"""y = x Wᵀ for many rows by CUDA's tensor cores: mma.sync m16n8k16, float16 with float32 sums.

Tiles of x, and of weights that are float16, come to shared memory by cp.async, two steps ahead;
quantized weights are dequantized on their way (half_tile.py). Every warp has a part of the
workgroup's tile; fragments come to registers by ldmatrix. Layouts are those of the PTX ISA, "Matrix
Fragments for mma.m16n8k16 with floating point type" and "ldmatrix". Needs compute capability 8.0
and warps of 32 threads, in the order of threadIdx.x.
"""

from collections.abc import Callable

from tvm.script import tirx as T

from ..weight_format import GroupFormat, WeightFormat
from .async_copy import half_rows
from .half_tile import CHUNK, DEPTH, weight_tile
from .limits import GpuLimits

_WARP = 32
_VECTOR = 8  # halves of a load: 16 bytes
_CHUNKS = DEPTH // CHUNK


TILE = 128  # rows of x, and output features, of a workgroup
# A warp's part of it: the more, the less is read from shared memory, which is as much of a bound as
# the tensor cores are. Two workgroups fill the registers.
_SIDE = 64
_STAGES = 3
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
    across = TILE // _SIDE  # warps
    threads = across * across * _WARP
    assert threads == TILE <= limits.threads
    stage = TILE * DEPTH  # float16
    assert 2 * _STAGES * stage * 2 <= limits.shared_bytes
    down, right = _SIDE // 16, _SIDE // 8  # fragments of a warp's sums
    steps = -(-in_features // DEPTH)
    blocks = -(-out_features // TILE)
    pair = 2 if out_features % 2 == 0 else 1  # neighbouring sums that are stored at once
    copied = not isinstance(kind, GroupFormat)
    copy_x = half_rows(TILE, threads, DEPTH, in_features, lambda X: X, _place)
    if copied:
        copy_w = half_rows(TILE, threads, DEPTH, in_features, lambda W: W[0], _place)
    else:
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

    # What comes by cp.async, and its commit, which is there even if nothing is left to come.
    @T.inline
    def copy(X, W, A, B, base, n, first_row, first_out, step, tx):
        if step < steps:
            copy_x(X, A, base, n - 1, first_row, step, tx)
            if copied:
                copy_w(W, B, base, out_features - 1, first_out, step, tx)
        T.ptx["cp.async.commit_group"]()

    @T.inline
    def multiply_copied(X, W, A, B, acc, n, first_row, first_out, row, out, lane, tx):
        slot = T.alloc_buffer((2,), "int32", scope="local")
        for s in T.unroll(_STAGES - 1):
            copy(X, W, A, B, s * stage, n, first_row, first_out, s, tx)
        # Where the stage begins that is read, and that which is written.
        slot[0] = 0
        slot[1] = (_STAGES - 1) * stage
        for step in T.serial(steps):
            T.ptx["cp.async.wait_group"](_STAGES - 2)
            T.tvm_storage_sync("shared")
            copy(X, W, A, B, slot[1], n, first_row, first_out, step + (_STAGES - 1), tx)
            multiply_stage(A, B, acc, slot[0], row, out, lane)
            slot[1] = slot[0]
            slot[0] = T.Select(slot[0] == (_STAGES - 1) * stage, 0, slot[0] + stage)

    # A thread has the halves of rows that threads of half_tile.py have, and `threads` after them.
    @T.inline
    def fetch_groups(W, raw, factor, first_out, step, tx):
        ws.fetch(W, raw[0], factor[0], out_features - 1, first_out, step, tx)
        ws.fetch(W, raw[1], factor[1], out_features - 1, first_out, step, threads + tx)

    @T.inline
    def put_groups(raw, factor, B, base, tx):
        ws.put(raw[0], factor[0], B, base, _place, tx)
        ws.put(raw[1], factor[1], B, base, _place, threads + tx)

    @T.inline
    def multiply_groups(X, W, A, B, acc, n, first_row, first_out, row, out, lane, tx):
        raw_0 = T.alloc_buffer((ws.registers,), ws.register_dtype, scope="local")
        raw_1 = T.alloc_buffer((ws.registers,), ws.register_dtype, scope="local")
        factor_0 = T.alloc_buffer((1,), "float32", scope="local")
        factor_1 = T.alloc_buffer((1,), "float32", scope="local")
        raw = T.meta_var((raw_0, raw_1))
        factor = T.meta_var((factor_0, factor_1))
        slot = T.alloc_buffer((2,), "int32", scope="local")
        for s in T.unroll(_STAGES - 1):
            copy(X, W, A, B, s * stage, n, first_row, first_out, s, tx)
        fetch_groups(W, raw, factor, first_out, 0, tx)
        put_groups(raw, factor, B, 0, tx)
        slot[0] = 0
        slot[1] = (_STAGES - 1) * stage
        for step in T.serial(steps):
            T.ptx["cp.async.wait_group"](_STAGES - 2)
            T.tvm_storage_sync("shared")
            copy(X, W, A, B, slot[1], n, first_row, first_out, step + (_STAGES - 1), tx)
            # Past the last step that one again, which nothing reads.
            fetch_groups(W, raw, factor, first_out, T.min(step + 1, steps - 1), tx)
            multiply_stage(A, B, acc, slot[0], row, out, lane)
            slot[1] = slot[0]
            slot[0] = T.Select(slot[0] == (_STAGES - 1) * stage, 0, slot[0] + stage)
            put_groups(raw, factor, B, slot[0], tx)

    multiply_all = multiply_copied if copied else multiply_groups

    # Neighbouring workgroups have the same features of W, which stays in the cache between them.
    # The barriers are all here: TVM's own, which do not tell one stage from the other, are off.
    @T.inline
    def multiply(X, W, R, O, n):
        for bx in T.thread_binding((n + (TILE - 1)) // TILE, thread="blockIdx.x"):
            for by in T.thread_binding(blocks, thread="blockIdx.y"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    A = T.alloc_buffer((_STAGES * stage,), "float16", scope="shared")
                    B = T.alloc_buffer((_STAGES * stage,), "float16", scope="shared")
                    acc = T.alloc_buffer((down * right * 4,), "float32", scope="local")
                    with T.attr(0, "hand_threaded", 0):
                        lane: T.let = tx % _WARP
                        row: T.let = tx // _WARP // across * _SIDE
                        out: T.let = tx // _WARP % across * _SIDE
                        for i in T.unroll(down * right * 4):
                            acc[i] = T.float32(0)
                        multiply_all(X, W, A, B, acc, n, bx * TILE, by * TILE, row, out, lane, tx)
                        store_sums(R, O, acc, n, bx * TILE + row, by * TILE + out, lane)

    return multiply
