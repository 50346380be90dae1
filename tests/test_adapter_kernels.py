"""The kernels of LoRA adapters against their slow twins, for each instruction set."""

from __future__ import annotations

import kernel_twins as twins
import numpy as np
import pytest
import tvm
from conftest import compile_kernel, kernel_error
from test_quantization import (
    BITS,
    check_rounding,
    in_row_order,
    quantized,
    quantized_rows,
    quantizer,
)

from phi3c.adapters import layout as adapter_layout
from phi3c.kernels.cpu.expand import expand
from phi3c.kernels.cpu.int8_gated import int8_gated
from phi3c.kernels.cpu.int8_linear import int8_linear
from phi3c.kernels.cpu.int8_sums import ROW_BLOCK
from phi3c.kernels.cpu.parallel import SERIAL_ROWS
from phi3c.kernels.cpu.shrink import RANK_BLOCK, int8_shrink, shrink
from phi3c.kernels.layout import PANEL
from phi3c.kernels.low_rank import LowRank

tensor = tvm.runtime.tensor
ROWS = (0, 1, 2, 9, SERIAL_ROWS + 1, ROW_BLOCK + 3)
POOLS = [LowRank(1, 8, "float32"), LowRank(3, 16, "float16"), LowRank(4, 64, "float16")]


class Adapters:
    """Random adapters of some ranks for every slot, and the rows of a batch that use them.

    What is past an adapter's rank is 0, as the pools have it.
    """

    def __init__(self, low_rank: LowRank, in_features: int, out_features: int):
        rng = np.random.default_rng(low_rank.max_rank)
        s, r = low_rank.max_loras, low_rank.max_rank
        self.ranks = np.array([max(1, r >> 2 * i) for i in range(s)], np.int32)
        kept = np.arange(r) < self.ranks[:, None]  # [slots, max_rank]
        a = rng.standard_normal((s, r, in_features)) * kept[:, :, None]
        b = rng.standard_normal((s, out_features, r)) * kept[:, None]
        self.a = a.astype(low_rank.dtype)
        self.b = np.stack([adapter_layout.pack_b(one, r, low_rank.dtype) for one in b])
        assert (self.a.shape, self.b.shape) == (
            low_rank.a_shape(in_features),
            low_rank.b_shape(out_features),
        )

    def rows(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """slot (−1: base), rank (0: base) of n rows: all slots, and base rows between them."""
        slot = (np.arange(n, dtype=np.int32) + 1) % (len(self.ranks) + 1) - 1
        return slot, np.where(slot < 0, 0, self.ranks[slot]).astype(np.int32)


def random_rows(n: int, features: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, features)).astype(np.float32)


def check_shrunk(h: np.ndarray, expected: np.ndarray, rank: np.ndarray) -> None:
    """h was full of NaN: rows have their rank's values, zeros to the block, and nothing more."""
    blocks = -(-rank // RANK_BLOCK) * RANK_BLOCK
    written = np.arange(h.shape[1]) < blocks[:, None]
    assert np.isnan(h[~written]).all()
    if written.any():
        assert kernel_error(h[written], expected[written]) <= 2e-6


@pytest.mark.parametrize(
    ("in_features", "low_rank"), [(1, POOLS[0]), (36, POOLS[1]), (160, POOLS[2])]
)
def test_shrink(isa, in_features, low_rank):
    run = compile_kernel(shrink(isa, in_features, low_rank), isa)
    adapters = Adapters(low_rank, in_features, 1)
    for n in ROWS:
        x = random_rows(n, in_features)
        slot, rank = adapters.rows(n)
        h = tensor(np.full((n, low_rank.max_rank), np.nan, np.float32))
        run(tensor(x), tensor(adapters.a), tensor(slot), tensor(rank), h)
        check_shrunk(h.numpy(), twins.shrink(x, adapters.a, slot, rank), rank)


@pytest.mark.parametrize(
    ("in_features", "low_rank"), [(32, POOLS[0]), (64, POOLS[1]), (160, POOLS[2])]
)
def test_int8_shrink(isa, in_features, low_rank):
    run = compile_kernel(int8_shrink(isa, in_features, low_rank), isa)
    quantize = quantizer(isa, in_features, 8)
    adapters = Adapters(low_rank, in_features, 1)
    for n in ROWS[1:]:
        words, *_, x = quantized_rows(isa, quantize, in_features, random_rows(n, in_features))
        slot, rank = adapters.rows(n)
        h = tensor(np.full((n, low_rank.max_rank), np.nan, np.float32))
        run(words, tensor(adapters.a), tensor(slot), tensor(rank), h)
        check_shrunk(h.numpy(), twins.shrink(x, adapters.a, slot, rank), rank)


@pytest.mark.parametrize(
    ("out_features", "low_rank"),
    [(1, POOLS[0]), (17, POOLS[1]), (64, POOLS[0]), (100, POOLS[2])],
)
def test_expand(isa, out_features, low_rank):
    run = compile_kernel(expand(out_features, low_rank), isa)
    adapters = Adapters(low_rank, 1, out_features)
    for n in ROWS:
        y, h = random_rows(n, out_features), random_rows(n, low_rank.max_rank)
        slot, rank = adapters.rows(n)
        added = twins.expand(h, adapters.b, slot, rank, out_features)
        out = tensor(y)
        run(tensor(h), tensor(adapters.b), tensor(slot), tensor(rank), out)
        np.testing.assert_array_equal(out.numpy()[rank == 0], y[rank == 0])
        if n:
            assert kernel_error(out.numpy(), y + added) <= 2e-6


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("shape", "residual", "low_rank"),
    [((17, 96), True, POOLS[0]), ((100, 64), False, POOLS[1]), ((64, 160), True, POOLS[2])],
)
def test_int8_linear_with_adapters(isa, bits, shape, residual, low_rank):
    """Base rows have the bits of the linear without adapters."""
    out_features, in_features = shape
    spec, arrays, weight = quantized(bits, *shape)
    form = (isa.dot.for_bits(bits), isa.int8_rows, *shape, bits, "float16", residual)
    plain = compile_kernel(int8_linear(*form), isa)
    run = compile_kernel(int8_linear(*form, low_rank), isa)
    quantize = quantizer(isa, in_features, spec.zero)
    adapters = Adapters(low_rank, in_features, out_features)
    for n in ROWS[1:]:
        words, *_, x = quantized_rows(isa, quantize, in_features, random_rows(n, in_features))
        slot, rank = adapters.rows(n)
        h = random_rows(n, low_rank.max_rank)
        added = random_rows(n, out_features)
        operands = [words, *arrays, *([tensor(added)] if residual else [])]
        base, out = (tensor(np.full((n, out_features), np.nan, np.float32)) for _ in range(2))
        plain(*operands, base)
        run(*operands, tensor(h), tensor(adapters.b), tensor(slot), tensor(rank), out)
        np.testing.assert_array_equal(out.numpy()[rank == 0], base.numpy()[rank == 0])
        expected = x @ weight.T + twins.expand(h, adapters.b, slot, rank, out_features)
        assert kernel_error(out.numpy(), expected + (added if residual else 0)) <= 1e-5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("shape", "low_rank"), [((32, 32), POOLS[0]), ((96, 160), POOLS[2])])
def test_int8_gated_with_adapters(isa, bits, shape, low_rank):
    intermediate, in_features = shape
    spec, arrays, weight = quantized(bits, 2 * intermediate, in_features)
    plain = compile_kernel(int8_gated(isa, *shape, bits, "float16", 4), isa)
    run = compile_kernel(int8_gated(isa, *shape, bits, "float16", 4, low_rank), isa)
    quantize = quantizer(isa, in_features, spec.zero)
    adapters = Adapters(low_rank, in_features, 2 * intermediate)
    for n in ROWS[1:]:
        words, *_, x = quantized_rows(isa, quantize, in_features, random_rows(n, in_features))
        slot, rank = adapters.rows(n)
        h = random_rows(n, low_rank.max_rank)
        base, out = (tensor(np.full((n, intermediate // 32, 10), -1, np.int32)) for _ in range(2))
        plain(words, *arrays, base)
        run(words, *arrays, tensor(h), tensor(adapters.b), tensor(slot), tensor(rank), out)
        rows, alone = in_row_order(isa, out.numpy()), in_row_order(isa, base.numpy())
        for found, expected in zip(rows, alone, strict=True):
            np.testing.assert_array_equal(found[rank == 0], expected[rank == 0])
        gate_up = x @ weight.T + twins.expand(h, adapters.b, slot, rank, 2 * intermediate)
        check_rounding(twins.silu_mul(gate_up).astype(np.float32), *rows, zero=4)


def test_panels_are_those_of_linears():
    assert adapter_layout.PANEL == PANEL
    assert all(rank % RANK_BLOCK == 0 for rank in adapter_layout.RANKS)
    b = np.random.default_rng(0).standard_normal((21, 5))
    packed = adapter_layout.pack_b(b, 8, "float32")
    assert packed.shape == LowRank(1, 8, "float32").b_shape(21)[1:]
    for col in range(21):
        np.testing.assert_array_equal(packed[col // PANEL, :5, col % PANEL], b[col].astype("f"))
    assert not packed[:, 5:].any() and not packed[1, :, 5:].any()
