"""y = x Wᵀ for few rows by CUDA's tensor cores: bound by the reading of W, which comes to shared
memory by cp.async several stages ahead (staged.py), so that enough of it is on its way.

Where few output features would leave a large GPU idle, a workgroup has only a part of the input
features, and its sums go to `P`, a workspace; add_parts adds them up.

Layouts are those of the PTX ISA (mma_gemm.py). Needs compute capability 8.0 and warps of 32.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T

from ..weight_format import GroupFormat, WeightFormat
from .limits import GpuLimits
from .rows import for_each
from .staged import KEPT, MULTIPLICATIONS, STEP, staged_weight, staged_x

FEW, MORE = 32, 64  # rows of x of a workgroup
_WARP = 32
_WARP_OUTS = 16  # a warp has these of all rows
_MOST_STAGES = 7
_BUSY = 128  # workgroups that a large GPU wants
_PARTED = 192  # and where parts make them, to even out what the kernel after them costs


@dataclass(frozen=True)
class SkinnyTile:
    """outs: output features of a workgroup; parts: of the input features."""

    outs: int
    parts: int


def skinny_tile(out_features: int, in_features: int, kind: WeightFormat) -> SkinnyTile:
    """x is read once for each `outs`, from the cache: beside 3 or 4 bits a weight that is most of
    what is read. (Whether outputs are past the last costs a register, which wide tiles have not.)
    """
    wide = isinstance(kind, GroupFormat) and kind.bits <= 4 and out_features >= 128 * _BUSY
    wide = wide and out_features % 128 == 0
    outs = 128 if wide else 64
    blocks = -(-out_features // outs)
    if blocks >= _BUSY:
        return SkinnyTile(outs, 1)
    steps = -(-in_features // STEP)
    wanted = min(-(-_PARTED // blocks), max(1, steps // 4))
    return SkinnyTile(outs, -(-steps // -(-steps // wanted)))  # none is empty


def workspace_shape(tile: SkinnyTile, n, out_features: int):
    """Of P, float32."""
    return tile.parts, T.min(n, MORE), out_features


def skinny_gemm(
    limits: GpuLimits,
    rows: int,
    tile: SkinnyTile,
    out_features: int,
    in_features: int,
    kind: WeightFormat,
    store: Callable,
):
    """Returns the inline function `multiply(X, W, R, O, P, n)`, a kernel, as gemm.py has it.

    rows: FEW or MORE. Up to so many rows of x, sums go to P if the tile has parts. More of them
    are several workgroups', each with all input features.
    X float16, W as staged.has_stages asks for it.
    """
    outs, parts = tile.outs, tile.parts
    threads = outs // _WARP_OUTS * _WARP
    assert threads <= limits.threads
    wide = rows // 8  # fragments of a warp's sums
    xs = staged_x(rows, threads, in_features, kind)
    ws = staged_weight(outs, threads, in_features, kind)
    stages = min(_MOST_STAGES, limits.shared_bytes // (4 * (xs.words + ws.words)))
    assert stages >= 3
    steps = -(-in_features // STEP)
    per_part = -(-steps // parts)
    blocks = -(-out_features // outs)

    @T.inline
    def multiply_stage(A, B, acc, slot, out, lane, k):
        w = T.alloc_buffer((4 * MULTIPLICATIONS,), "uint32", scope="local")
        ws.read(B, slot * ws.words, out, lane, k, w)
        for j in T.unroll(wide):
            x = T.alloc_buffer((2 * MULTIPLICATIONS,), "uint32", scope="local")
            xs.read(A, slot * xs.words, j * 8, lane, k, x)
            for m in T.unroll(MULTIPLICATIONS):
                T.ptx_legacy.mma(
                    "m16n8k16", "row", "col", "fp16", "fp16", "fp32",
                    w.data, m * 4, x.data, m * 2, acc.data, j * 4, False, dtype="float32",
                )  # fmt: skip

    # Of a fragment of sums a thread has output feature lane / 4 of two neighbouring rows of x, and
    # the 8th feature from there.
    def for_sums(put):
        @T.inline
        def run(args, acc, n, first, out, lane):
            for j in T.unroll(wide):
                for p in T.unroll(2):
                    row: T.let = first + j * 8 + lane % 4 * 2 + p
                    if row < n:
                        for h in T.unroll(2):
                            o: T.let = out + h * 8 + lane // 4
                            if o < out_features:
                                put(args, row, o, acc[j * 4 + h * 2 + p])

        return run

    @T.inline
    def put_result(args, row, o, value):
        R, O = T.meta_var(args)
        store(R, O, row, o, value)

    @T.inline
    def put_part(args, row, o, value):
        P, part = T.meta_var(args)
        P[part, row, o] = value

    results, partial = for_sums(put_result), for_sums(put_part)

    # The barriers are all here, and TVM's own are off: it does not know what the copies write.
    @T.inline
    def multiply(X, W, R, O, P, n):
        for bx in T.thread_binding((n + (rows - 1)) // rows, thread="blockIdx.x"):
            for by in T.thread_binding(blocks, thread="blockIdx.y"):
                for bz in T.thread_binding(
                    T.Select(n <= rows, T.int64(parts), T.int64(1)), thread="blockIdx.z"
                ):
                    for tx in T.thread_binding(threads, thread="threadIdx.x"):
                        A = T.alloc_buffer((stages * xs.words,), "uint32", scope="shared")
                        B = T.alloc_buffer((stages * ws.words,), "uint32", scope="shared")
                        acc = T.alloc_buffer((wide * 4,), "float32", scope="local")
                        # Stages in shared memory: that which is read, and that which is written.
                        slot = T.alloc_buffer((2,), "int32", scope="local")
                        count = T.alloc_buffer((1,), "int32", scope="local")
                        k = T.alloc_buffer((KEPT,), "uint32", scope="local")
                        with T.attr(0, "hand_threaded", 0):
                            lane: T.let = tx % _WARP
                            out: T.let = tx // _WARP * _WARP_OUTS
                            first: T.let = T.Cast("int32", bz) * per_part
                            if parts > 1:
                                count[0] = T.Select(
                                    n <= rows, T.min(steps - first, per_part), steps
                                )
                            else:
                                count[0] = steps
                            ws.keep(lane, k)
                            for i in T.unroll(wide * 4):
                                acc[i] = T.float32(0)
                            for s in T.unroll(stages - 1):
                                if s < count[0]:
                                    xs.fetch(X, A, s * xs.words, n - 1, bx * rows, first + s, tx)
                                    ws.fetch(
                                        W, B, s * ws.words, out_features - 1, by * outs,
                                        first + s, tx,
                                    )  # fmt: skip
                                T.ptx["cp.async.commit_group"]()
                            slot[0] = 0
                            slot[1] = stages - 1
                            for s in T.serial(count[0]):
                                T.ptx["cp.async.wait_group"](stages - 2)
                                T.tvm_storage_sync("shared")
                                if s + (stages - 1) < count[0]:
                                    ahead: T.let = first + s + (stages - 1)
                                    xs.fetch(X, A, slot[1] * xs.words, n - 1, bx * rows, ahead, tx)
                                    ws.fetch(
                                        W, B, slot[1] * ws.words, out_features - 1, by * outs,
                                        ahead, tx,
                                    )  # fmt: skip
                                T.ptx["cp.async.commit_group"]()
                                multiply_stage(A, B, acc, slot[0], out, lane, k)
                                slot[1] = slot[0]
                                slot[0] = T.Select(slot[0] == stages - 1, 0, slot[0] + 1)
                            top: T.let = bx * rows
                            left: T.let = by * outs + out
                            if parts > 1:
                                if n <= rows:
                                    partial((P, bz), acc, n, top, left, lane)
                                else:
                                    results((R, O), acc, n, top, left, lane)
                            else:
                                results((R, O), acc, n, top, left, lane)

    return multiply


def add_parts(limits: GpuLimits, tile: SkinnyTile, out_features: int, store: Callable):
    """Returns the inline function `run(n, (P, R, O))`, a kernel: sums of up to MORE rows."""

    @T.inline
    def put(args, row, o):
        P, R, O = T.meta_var(args)
        total = T.alloc_buffer((1,), "float32", scope="local")
        total[0] = P[0, row, o]
        for part in T.unroll(tile.parts - 1):
            total[0] += P[part + 1, row, o]
        store(R, O, row, o, total[0])

    return for_each(limits, out_features, put)
