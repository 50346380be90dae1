"""Every GPU kernel but attention (test_kernels.py has that) against its slow twin, on a Vulkan
device; and what CUDA and Metal make of all of them, which needs no device."""

from __future__ import annotations

import re
from functools import cache

import kernel_twins as twins
import ml_dtypes
import numpy as np
import pytest
import tvm
from conftest import kernel_error
from kernel_twins import BLOCK
from vulkan_device import DeviceKernel, needs_device

from phi3c.adapters.layout import pack_b
from phi3c.kernels.gpu import GpuKernels, layout
from phi3c.kernels.gpu.gemm import DEPTH, TILE
from phi3c.kernels.gpu.limits import GpuLimits
from phi3c.kernels.gpu.linear import GEMV_ROWS
from phi3c.kernels.low_rank import LowRank
from phi3c.kernels.weight_format import GroupFormat
from phi3c.logit_blocks import logit_blocks
from phi3c.pipeline import kernel_lowering
from phi3c.runtime.logit_row import LogitRow

# As a share of the largest value: float32 sums of a few hundred terms, and one rounding.
TOLERANCE = {"float32": 2e-6, "float16": 6e-4}
FUSED_TOLERANCE = {"float32": 4e-6, "float16": 2e-3}  # roundings between the kernels of many rows
DTYPES = list(TOLERANCE)
BITS = [3, 4, 8]
ROWS = [1, 2, 3, 4, 5, 8, 9, GEMV_ROWS, GEMV_ROWS + 1, TILE, TILE + 1]  # every kernel of a linear


@cache
def compiled(dtype: str, kernel: str, *args):
    """The kernel of GpuKernels, compiled alone."""
    return DeviceKernel(getattr(GpuKernels(dtype), kernel)(*args))


def run(kernel, *inputs, out_shape: tuple[int, ...], dtype: str, fill=np.nan) -> np.ndarray:
    """Calls with TVM copies of numpy inputs and an output full of NaN; returns the output."""
    out = tvm.runtime.tensor(np.full(out_shape, fill, dtype))
    kernel(*[tvm.runtime.tensor(x) for x in inputs], out)
    return out.numpy()


def check(found: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert found.shape == expected.shape and found.dtype == dtype
    assert kernel_error(found, expected) <= TOLERANCE[dtype]


def normal(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def rows_of_sizes(rows: int, features: int, dtype: str) -> np.ndarray:
    """Random rows of different sizes, from 1e-3 to 1e3."""
    sizes = 10.0 ** np.arange(-3, rows - 3).clip(-3, 3)[:, None]
    return (normal(rows, rows, features) * sizes).astype(dtype)


def int32(*values) -> np.ndarray:
    return np.array(values, np.int32)


# Weights


def random_weight(seed: int, out: int, in_: int, kind) -> tuple[list[np.ndarray], np.ndarray]:
    """The arrays that a kernel reads, and the values `[out, in]` that they stand for."""
    if isinstance(kind, GroupFormat):
        rng = np.random.default_rng(seed)
        q = rng.integers(0, 2**kind.bits, (out, in_), np.uint8)
        scale = rng.uniform(0.01, 0.1, (out, in_ // 32)).astype(kind.scale_dtype)
        arrays = GpuKernels("float32").pack_groups(q, scale, kind.bits)
        return list(arrays), twins.group_weight(*arrays, kind.bits, kind.zero)
    weight = normal(seed, out, in_)
    if kind == "uint16":
        rounded = weight.astype(ml_dtypes.bfloat16)
        return [rounded.view(np.uint16)], rounded.astype(np.float32)
    return [weight.astype(kind)], weight.astype(kind)


def groups(bits: int) -> GroupFormat:
    return GroupFormat(bits, 2 ** (bits - 1), "float16")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("out", "in_"), [(1, 32), (7, 96)])
def test_groups_are_what_the_twins_read_and_unpack_again(bits, out, in_):
    q = np.random.default_rng(out).integers(0, 2**bits, (out, in_), np.uint8)
    scale = np.ones((out, in_ // 32), np.float16)
    kernels = GpuKernels("float32")
    words, packed_scale = kernels.pack_groups(q, scale, bits)
    assert (words.shape, packed_scale.shape) == kernels.group_shapes(out, in_, bits)
    assert words.dtype == np.uint32 and words.flags.c_contiguous
    np.testing.assert_array_equal(twins.group_weight(words, scale, bits, 0), q)
    np.testing.assert_array_equal(layout.unpack_groups(words, bits), q)
    np.testing.assert_array_equal(packed_scale, scale)


def test_plain_weights_stay_as_they_are():
    weight = normal(0, 5, 7, dtype="float16")
    packed = GpuKernels("float32").pack_weight(weight[::-1])
    assert packed.flags.c_contiguous and packed.shape == GpuKernels("float32").weight_shape(5, 7)
    np.testing.assert_array_equal(packed, weight[::-1])


LINEARS = [  # out, in, weight, residual, activations, output
    (16, 1, "float32", True, "float32", None),
    (17, 64, "float16", False, "float16", "float32"),
    (100, 3, "float32", True, "float16", None),
    (130, 260, "float16", True, "float16", None),
    (17, 33, "uint16", True, "float32", None),
    (64, 48, "uint16", False, "float16", None),
    (40, DEPTH * 32, "float16", False, "float32", None),  # 128 threads an output row
    (33, DEPTH * 33, groups(4), False, "float32", None),  # 64
    (1, 32, groups(4), True, "float16", None),
    (130, 288, groups(4), True, "float32", None),
    (33, 96, groups(3), False, "float32", None),
    (64, 288, groups(3), True, "float16", "float32"),
    (33, 96, groups(8), True, "float32", None),
    (64, 160, groups(8), False, "float16", None),
    (48, 256, GroupFormat(4, 7, "float32"), False, "float32", None),
]


@needs_device
@pytest.mark.parametrize(("out", "in_", "kind", "residual", "dtype", "out_dtype"), LINEARS)
def test_linear(out, in_, kind, residual, dtype, out_dtype):
    kernel = compiled(dtype, "linear", out, in_, kind, residual, out_dtype)
    arrays, values = random_weight(1, out, in_, kind)
    written = out_dtype or dtype
    for rows in ROWS:
        x = normal(rows, rows, in_, dtype=dtype)
        extra = [normal(2, rows, out, dtype=dtype)] if residual else []
        found = run(kernel, x, *arrays, *extra, out_shape=(rows, out), dtype=written)
        check(found, twins.row_major_linear(x, values, *extra), written)


FUSED = [  # out, in, weight, activations
    (17, 1, "float32", "float32"),
    (33, 60, "float16", "float16"),
    (100, 3, "float32", "float16"),
    (130, 3072, "float16", "float16"),
    (64, 48, "uint16", "float16"),
    (1, 32, groups(4), "float32"),
    (2200, 96, groups(4), "float16"),  # eight rows of W a thread
    (70, DEPTH * 96, groups(4), "float32"),
    (33, 288, groups(3), "float16"),
    (65, 160, groups(8), "float32"),
    (40, 8192, groups(8), "float16"),  # no room for x in shared memory
    (48, 256, GroupFormat(4, 7, "float32"), "float16"),
]
FEW_AND_MANY = [1, 2, 3, 5, GEMV_ROWS, GEMV_ROWS + 1]


@needs_device
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(("out", "in_", "kind", "dtype"), FUSED, ids=str)
def test_gated_linear(out, in_, kind, dtype, normed):
    kernel = compiled(dtype, "gated_linear", out, in_, kind, 1e-5 if normed else None)
    arrays, values = random_weight(1, 2 * out, in_, kind)
    norm = normal(6, in_) * np.float32(in_**-0.5)  # products of size 1, for the gate
    for rows in FEW_AND_MANY:
        x = rows_of_sizes(rows, in_, dtype) if normed else normal(rows, rows, in_) * in_**-0.5
        x = x.astype(dtype)
        read = twins.rms_norm(x, norm, 1e-5) if normed else x
        args = [x, norm] if normed else [x]
        found = run(kernel, *args, *arrays, out_shape=(rows, out), dtype=dtype)
        expected = twins.silu_mul(twins.row_major_linear(read, values))
        assert found.dtype == dtype
        assert kernel_error(found, expected) <= FUSED_TOLERANCE[dtype]


@needs_device
@pytest.mark.parametrize("out_dtype", [None, "float32"])
@pytest.mark.parametrize(("out", "in_", "kind", "dtype"), FUSED, ids=str)
def test_linear_of_normalised_rows(out, in_, kind, dtype, out_dtype):
    kernel = compiled(dtype, "linear", out, in_, kind, False, out_dtype, 1e-5)
    arrays, values = random_weight(1, out, in_, kind)
    norm = normal(6, in_)
    for rows in FEW_AND_MANY:
        x = rows_of_sizes(rows, in_, dtype)
        written = out_dtype or dtype
        found = run(kernel, x, norm, *arrays, out_shape=(rows, out), dtype=written)
        expected = twins.row_major_linear(twins.rms_norm(x, norm, 1e-5), values)
        assert found.dtype == written
        assert kernel_error(found, expected) <= FUSED_TOLERANCE[dtype]


@needs_device
def test_normalised_zeros_give_zeros():
    (weight,), _ = random_weight(1, 17, 64, "float16")
    kernel = compiled("float16", "linear", 17, 64, "float16", False, None, 1e-5)
    for rows in (1, 2):
        x = np.zeros((rows, 64), np.float16)
        found = run(kernel, x, normal(6, 64), weight, out_shape=(rows, 17), dtype="float16")
        assert not found.any()


@needs_device
@pytest.mark.parametrize("rows", [4, 2 * TILE + 1])
def test_linear_keeps_a_row_apart_from_its_neighbours(rows):
    kernel = compiled("float32", "linear", 17, 64, "float16", False)
    (weight,), _ = random_weight(1, 17, 64, "float16")
    x = normal(3, rows, 64)
    alone = run(kernel, x, weight, out_shape=(rows, 17), dtype="float32")
    x[1] = np.nan
    beside = run(kernel, x, weight, out_shape=(rows, 17), dtype="float32")
    assert np.isnan(beside[1]).all()
    np.testing.assert_array_equal(np.delete(beside, 1, 0), np.delete(alone, 1, 0))


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["float16", "float32", "uint16", *map(groups, BITS)], ids=str)
@pytest.mark.parametrize(("vocab", "hidden"), [(15, 32), (100, 288)])
def test_embedding(vocab, hidden, kind, dtype):
    arrays, values = random_weight(4, vocab, hidden, kind)
    for n in (1, 5):
        ids = np.random.default_rng(n).integers(0, vocab, n).astype(np.int32)
        ids[0] = vocab - 1
        kernel = compiled(dtype, "embedding", vocab, hidden, kind)
        found = run(kernel, ids, *arrays, out_shape=(n, hidden), dtype=dtype)
        expected = values[ids].astype(np.float32).astype(dtype)
        np.testing.assert_array_equal(found, expected)


# Rows


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [4, 36, 300])
def test_take_rows_and_last_row(features, dtype):
    x = normal(5, 7, features, dtype=dtype)
    for positions in (int32(6), int32(0, 6, 3, 3)):
        shape = (len(positions), features)
        kernel = compiled(dtype, "take_rows", features)
        found = run(kernel, x, positions, out_shape=shape, dtype=dtype)
        np.testing.assert_array_equal(found, twins.take_rows(x, positions))
    for rows in (x, x[:1]):
        kernel = compiled("float32", "last_row", features, dtype)
        found = run(kernel, rows, out_shape=(1, features), dtype=dtype)
        np.testing.assert_array_equal(found, twins.last_row(rows))


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [4, 36, 256, 300, 3072])
def test_rms_norm(hidden, dtype):
    weight = normal(6, hidden)
    for rows in (1, 2, 9):
        x = rows_of_sizes(rows, hidden, dtype)
        kernel = compiled(dtype, "rms_norm", hidden, 1e-5)
        found = run(kernel, x, weight, out_shape=(rows, hidden), dtype=dtype)
        check(found, twins.rms_norm(x, weight, 1e-5), dtype)


@needs_device
def test_rms_norm_of_zeros_is_zero():
    kernel = compiled("float16", "rms_norm", 36, 1e-5)
    x = np.zeros((2, 36), np.float16)
    assert not run(kernel, x, normal(6, 36), out_shape=(2, 36), dtype="float16").any()


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 36, 256, 2064])
def test_silu_mul(size, dtype):
    for rows in (1, 2, 9):
        x = (normal(rows, rows, 2 * size) * 4).astype(dtype)
        found = run(compiled(dtype, "silu_mul", size), x, out_shape=(rows, size), dtype=dtype)
        check(found, twins.silu_mul(x), dtype)


@needs_device
def test_silu_mul_far_from_zero():
    gate = [0.0, -0.0, 1e-30, -80.0, -87.0, -88.0, -200.0, -1e4, 80.0, 88.0, 200.0, 1e4, 1e30]
    gate_up = np.array([gate + [1.0] * len(gate)], np.float32)
    kernel = compiled("float32", "silu_mul", len(gate))
    found = run(kernel, gate_up, out_shape=(1, len(gate)), dtype="float32")
    np.testing.assert_allclose(found, twins.silu_mul(gate_up), rtol=1e-5, atol=1e-30)


# Logits


def rows_of_logits(seed: int, vocab: int, rows: int) -> np.ndarray:
    """Random ones with ties, beside rows at the ends of what a sampler meets."""
    rng = np.random.default_rng(seed)
    special = np.full((6, vocab), -np.inf, np.float32)  # the first: nothing else
    special[1:5] = rng.integers(-3, 3, (4, vocab))
    special[1, ::2] = -np.inf
    special[2, rng.integers(vocab)] = np.inf
    special[3] = -0.0  # equal to 0
    special[3, vocab // 2 :] = 0
    special[4] = -np.abs(special[4]) - 1e-45
    special[5] = rng.standard_normal(vocab) * 1e30
    ties = rng.integers(-3, 3, (rows, vocab)).astype(np.float32)
    return np.concatenate([special, ties]) if rows > 1 else ties


@needs_device
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 200, 2051, 32064])
def test_block_maxima(vocab):
    blocks = logit_blocks(vocab)
    kernel = compiled("float16", "block_maxima", vocab, blocks)
    for rows in (1, 3, 8):
        logits = rows_of_logits(rows, vocab, rows)
        shape = (len(logits), 2, blocks)
        found = run(kernel, logits[None], out_shape=shape, dtype="int32", fill=-1)
        tops, ids = twins.block_maxima(logits, blocks)
        np.testing.assert_array_equal(found[:, 0].view(np.float32), tops)
        np.testing.assert_array_equal(found[:, 1], ids)
        host = [LogitRow(row) for row in logits]
        np.testing.assert_array_equal([row.tops for row in host], tops)


@needs_device
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF])
def test_block_maxima_keep_any_nan(bits):
    logits = normal(1, 2, 200)
    logits[0, [3, 150]] = np.inf
    logits.view(np.uint32)[0, [5, 150]] = bits
    found = run(
        compiled("float16", "block_maxima", 200, 4),
        logits[None],
        out_shape=(2, 2, 4),
        dtype="int32",
        fill=-1,
    )
    tops, ids = twins.block_maxima(logits, 4)
    np.testing.assert_array_equal(found[:, 0].view(np.float32), tops)
    np.testing.assert_array_equal(found[:, 1], ids)
    assert np.isnan(tops[0]).tolist() == [False, True, True, False]


# Adapters


def adapters(low_rank: LowRank, in_features: int, out_features: int):
    """Pools a, b of random adapters, zeros past their ranks, and those ranks, one per slot."""
    rng = np.random.default_rng(low_rank.max_rank)
    slots, most = low_rank.max_loras, low_rank.max_rank
    ranks = np.array([max(1, most >> 2 * i) for i in range(slots)], np.int32)
    kept = np.arange(most) < ranks[:, None]
    a = rng.standard_normal((slots, most, in_features)) * kept[:, :, None]
    b = rng.standard_normal((slots, out_features, most)) * kept[:, None]
    packed = np.stack([pack_b(one, most, low_rank.dtype) for one in b])
    return a.astype(low_rank.dtype), packed, ranks


def slots_and_ranks(ranks: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """slot (−1: base), rank (0: base) of n rows: all slots, and base rows between them."""
    slot = (np.arange(n, dtype=np.int32) + 1) % (len(ranks) + 1) - 1
    return slot, np.where(slot < 0, 0, ranks[slot]).astype(np.int32)


POOLS = [LowRank(1, 8, "float32"), LowRank(3, 16, "float16"), LowRank(4, 64, "float16")]


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("in_features", "low_rank"), [(1, POOLS[0]), (36, POOLS[1]), (160, POOLS[2])]
)
def test_shrink(in_features, low_rank, dtype):
    kernel = compiled(dtype, "shrink", in_features, low_rank)
    a, _, ranks = adapters(low_rank, in_features, 1)
    for n in (1, 2, 9, 40):
        x = normal(n, n, in_features, dtype=dtype)
        slot, rank = slots_and_ranks(ranks, n)
        shape = (n, low_rank.max_rank)
        h = run(kernel, x, a, slot, rank, out_shape=shape, dtype="float32")
        written = np.arange(low_rank.max_rank) < rank[:, None]
        assert np.isnan(h[~written]).all()
        if written.any():
            check(h[written], twins.shrink(x, a, slot, rank)[written], "float32")


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("out_features", "low_rank"),
    [(1, POOLS[0]), (17, POOLS[1]), (64, POOLS[0]), (300, POOLS[2])],
)
def test_expand(out_features, low_rank, dtype):
    kernel = compiled(dtype, "expand", out_features, low_rank)
    _, b, ranks = adapters(low_rank, 1, out_features)
    for n in (1, 2, 9, 40):
        y, h = normal(n, n, out_features, dtype=dtype), normal(n + 1, n, low_rank.max_rank)
        slot, rank = slots_and_ranks(ranks, n)
        h[np.arange(low_rank.max_rank) >= rank[:, None]] = np.nan  # as shrink leaves them
        added = twins.expand(h, b, slot, rank, out_features)
        out = tvm.runtime.tensor(y)
        kernel(*map(tvm.runtime.tensor, (h, b, slot, rank)), out)
        np.testing.assert_array_equal(out.numpy()[rank == 0], y[rank == 0])
        check(out.numpy(), y + added, dtype)


# Rotary embedding, the paged cache


def inverse_frequencies(rotary_dim: int) -> np.ndarray:
    """Two sets, `[2, rotary_dim/2]`, clearly different."""
    short = 10000.0 ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.stack([short, short / np.linspace(1, 9, rotary_dim // 2)]).astype(np.float32)


@needs_device
@pytest.mark.parametrize("rotary_dim", [6, 96, 600])
def test_rope_table(rotary_dim):
    frequencies = inverse_frequencies(rotary_dim)
    edges = int32(0, 1, 2, 1000, 4095, 4096, 131071, 5)
    others = np.random.default_rng(0).integers(0, 131072, 400 if rotary_dim == 96 else 1)
    positions = np.concatenate([edges, others.astype(np.int32)])
    factor_set = np.random.default_rng(1).integers(0, 2, len(positions)).astype(np.int32)
    kernel = compiled("float16", "rope_table", rotary_dim, 1.19)
    for n in (1, len(positions)):
        args = positions[:n], factor_set[:n], frequencies
        found = run(kernel, *args, out_shape=(n, rotary_dim), dtype="float32")
        expected = twins.rope_table(*args[:2], frequencies, 1.19)
        assert kernel_error(found, expected) <= 2e-7


ROPES = [  # heads, kv heads, head_dim, rotary_dim, page dtype
    (2, 2, 16, 16, "float32"),
    (4, 2, 20, 20, "float16"),
    (3, 1, 64, 48, "float32"),
    (2, 1, 96, 96, "float16"),
    (4, 1, 128, 96, "float16"),
    (1, 1, 20, 6, "float32"),
]


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "rotary_dim", "kv_dtype"), ROPES)
def test_rope_append(heads, kv_heads, head_dim, rotary_dim, kv_dtype, dtype):
    kernel = compiled(dtype, "rope_append", heads, kv_heads, head_dim, rotary_dim, kv_dtype)
    frequencies = inverse_frequencies(rotary_dim)
    for n in (1, 2, 18):
        rng = np.random.default_rng(n)
        qkv = normal(n, n, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        positions, sets = rng.integers(0, 500, n), rng.integers(0, 2, n)
        table = twins.rope_table(positions, sets, frequencies, 1.2).astype(np.float32)
        slots = rng.permutation(5 * BLOCK)[:n].astype(np.int32)
        before = np.full((5, 2, kv_heads, head_dim * BLOCK), np.nan, kv_dtype)
        pages = tvm.runtime.tensor(before)
        q = tvm.runtime.tensor(np.full((n, heads * head_dim), np.nan, dtype))
        kernel(*map(tvm.runtime.tensor, (qkv, table, slots)), pages, q)
        expected_q, expected_pages = twins.rope_append(
            qkv, table, slots, before, heads, kv_heads, head_dim
        )
        check(q.numpy(), expected_q, dtype)
        found = pages.numpy()
        # Only the named slots are written: NaN stays where it was.
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected_pages))
        rounding = 1e-3 if kv_dtype == "float16" else 1e-6
        np.testing.assert_allclose(found, expected_pages, rtol=rounding, atol=rounding)


# What CUDA and Metal make of them. That TVM compiles a kernel says that all of it is bound to
# threads: a loop that is not would read device memory from the host, which TVM refuses.

LORA = LowRank(4, 64, "float16")
LOWERED = [  # kernel, arguments; the shapes of Phi-3-mini, and odd ones
    ("embedding", 32064, 3072, "uint16"),
    ("embedding", 32064, 3072, groups(4)),
    ("take_rows", 3072),
    ("last_row", 3072),
    ("linear", 9216, 3072, "float16", False),
    ("linear", 32064, 3072, "uint16", False, "float32"),
    ("linear", 101, 33, "float32", True),
    ("linear", 3072, 8192, groups(4), True),
    ("linear", 3072, 8192, groups(3), True),
    ("linear", 101, 96, groups(4), False),
    ("linear", 9216, 3072, groups(4), False, None, 1e-5),
    ("linear", 32064, 3072, "uint16", False, "float32", 1e-5),
    ("gated_linear", 8192, 3072, "float16"),
    ("gated_linear", 8192, 3072, groups(4), 1e-5),
    ("gated_linear", 17920, 5120, groups(4), 1e-5),
    ("gated_linear", 101, 33, "float32", 1e-5),
    ("shrink", 3072, LORA),
    ("expand", 16384, LORA),
    ("rms_norm", 3072, 1e-5),
    ("silu_mul", 8192),
    ("rope_table", 96, 1.19),
    ("rope_append", 32, 32, 96, 96, "float16"),
    ("decode_attention", 32, 32, 96, "float16", None),
    ("decode_attention", 40, 10, 128, "float16", 2047),
    ("decode_attention", 8, 1, 128, "float32", None),
    ("copy_slots", 32, 96, "float16"),
    ("block_maxima", 32064, 501),
    ("block_maxima", 101, 2),
]
# One for each range of rows, and what stands before many rows and behind them.
KERNELS_OF = {"linear": 5, "gated_linear": 6, "decode_attention": 2}
TARGETS = {
    "cuda": {"kind": "cuda", "arch": "sm_90", "host": "llvm"},
    "metal": {"kind": "metal", "host": "llvm"},
}
BYTES = {"float4": 16, "float": 4, "uint": 4, "int": 4, "half": 2}


@cache
def sources(target: str, kernel: str, *args) -> list[str]:
    """The kernels' sources, one string each."""
    function = getattr(GpuKernels("float16"), kernel)(*args).with_attr("global_symbol", "main")
    module = tvm.IRModule({"main": function})
    with kernel_lowering(target):
        built = tvm.compile(module, target=tvm.target.Target(TARGETS[target]))
    (device,) = built.mod.imports
    start = r'(?=^extern "C" __global__.*\{$)' if target == "cuda" else r"(?=^kernel void )"
    return re.split(start, device.inspect_source(), flags=re.MULTILINE)[1:]


def conditions_around_barriers(source: str) -> list[str]:
    """Lines that open an `if` or `else` with a barrier inside."""
    found, opened = [], []
    for line in source.splitlines():
        if line.strip().startswith("}"):
            opened.pop()
        if line.rstrip().endswith("{"):
            opened.append(line.strip())
        if "__syncthreads" in line or "threadgroup_barrier" in line:
            found += [o for o in opened if o.startswith(("if", "else", "} else"))]
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", LOWERED, ids=lambda case: "-".join(map(str, case)))
def test_kernels_are_within_the_limits(case, target):
    limits = GpuLimits()
    found = sources(target, *case)
    assert len(found) == KERNELS_OF.get(case[0], 1) + (case[0] in KERNELS_OF and case[-1] == 1e-5)
    for source in found:
        assert "blockIdx" in source and "threadIdx" in source
        shared = re.findall(
            r"^ +(?:__shared__ alignas\(64\)|threadgroup) (\w+) \w+\[(\d+)\];", source, re.MULTILINE
        )
        assert sum(BYTES[kind] * int(count) for kind, count in shared) <= limits.shared_bytes
        assert bool(shared) == ("barrier" in source or "__syncthreads" in source)
        assert not conditions_around_barriers(source)
        if target == "cuda":
            assert int(re.search(r"__launch_bounds__\((\d+)\)", source)[1]) <= limits.threads


def test_limits_are_honoured():
    kernels = GpuKernels("float16", GpuLimits(threads=128))
    silu_mul = kernels.silu_mul(8192).with_attr("global_symbol", "main")
    built = tvm.compile(tvm.IRModule({"main": silu_mul}), target=tvm.target.Target(TARGETS["cuda"]))
    assert "__launch_bounds__(128)" in built.mod.imports[0].inspect_source()
