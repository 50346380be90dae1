"""Schemes: numpy packing, the kernels' layout, and whole models against their dequantized twins."""

from __future__ import annotations

from functools import cache

import kernel_twins as twins
import numpy as np
import pytest
import tvm
from conftest import compile_kernel, kernel_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity import new_cache, prefill, tokens

from phi3c.errors import SchemeError
from phi3c.kernels.cpu import layout
from phi3c.kernels.cpu.group_linear import ROW_BLOCK, group_embedding, group_linear
from phi3c.kernels.cpu.int8_gated import int8_gated
from phi3c.kernels.cpu.int8_linear import int8_linear
from phi3c.kernels.cpu.norm import rms_norm_quantize
from phi3c.kernels.cpu.quantize import quantize_rows
from phi3c.quantization.group import (
    GroupQuantization,
    pack_bits,
    rounded_activations,
    unpack_bits,
)
from phi3c.quantization.scheme import SCHEMES, parse_scheme
from phi3c.reference import reference_logits

BITS = (3, 4, 8)
tensor = tvm.runtime.tensor


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=30, deadline=None)
@given(out_features=st.integers(1, 50), groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_packing_is_exact(bits, out_features, groups, seed):
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 2**bits, (out_features, 32 * groups), dtype=np.uint8)
    scale = rng.random((out_features, groups)).astype(np.float16)
    assert (unpack_bits(pack_bits(q, bits), bits, q.shape[1]) == q).all()
    words, scales = layout.pack_groups(q, bits), layout.pack_scales(scale)
    shapes = layout.group_shapes(out_features, q.shape[1], bits)
    assert (words.shape, scales.shape) == shapes and words.dtype == np.uint32
    assert (layout.unpack_groups(words, bits, out_features) == q).all()
    assert (layout.unpack_scales(scales, out_features) == scale).all()


@pytest.mark.parametrize("bits", BITS)
def test_quantization_error_is_half_a_step(bits):
    weight = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)
    weight[3, :32] = 0  # a group without a scale
    spec = GroupQuantization(bits, 32, "float32")
    q, scale = spec.quantize(weight)
    error = np.abs(spec.dequantize(q, scale) - weight).reshape(40, 3, 32).max(axis=-1)
    assert (error <= 0.5001 * scale).all()
    assert q.max() <= 2 * spec.zero and (q[3, :32] == spec.zero).all()


def test_group_size_must_divide():
    with pytest.raises(SchemeError, match="found 36 input features; accepted: a multiple of .* 32"):
        parse_scheme("q4f16_1").linear.check("x", 36)
    with pytest.raises(SchemeError, match="found 'q5'; accepted: q0f32"):
        parse_scheme("q5")


def quantized(bits: int, out_features: int, in_features: int):
    """Random weight as the kernels take it, and its dequantized twin."""
    spec = GroupQuantization(bits, 32, "float16")
    weight = np.random.default_rng(bits).standard_normal((out_features, in_features))
    q, scale = spec.quantize(weight)
    arrays = tensor(layout.pack_groups(q, bits)), tensor(layout.pack_scales(scale))
    return spec, arrays, spec.dequantize(q, scale).astype(np.float64)


ROWS = (1, 2, 5, 9, 17, ROW_BLOCK, ROW_BLOCK + 1, 2 * ROW_BLOCK + 3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("shape", "residual"),
    [
        ((1, 32), False),
        ((17, 96), True),
        ((100, 64), False),
        ((64, 160), True),
        ((48, 128), False),
    ],
)
def test_group_linear(isa, bits, shape, residual):
    out_features, in_features = shape
    spec, arrays, weight = quantized(bits, *shape)
    kernel = group_linear(isa, *shape, bits, spec.zero, "float16", residual)
    run = compile_kernel(kernel, isa)
    for m in ROWS:
        rng = np.random.default_rng(m)
        x = rng.standard_normal((m, in_features)).astype(np.float32)
        added = rng.standard_normal((m, out_features)).astype(np.float32)
        out = tensor(np.full((m, out_features), np.nan, np.float32))
        run(tensor(x), *arrays, *([tensor(added)] if residual else []), out)
        expected = x @ weight.T + (added if residual else 0)
        assert kernel_error(out.numpy(), expected) <= 1e-5


def in_row_order(isa, words: np.ndarray):
    """int8 activations as a kernel left them → a `[m, groups, 32]`, scale, offset, a · scale."""
    m, groups, tile = *words.shape[:2], isa.int8_rows
    flat = words.reshape(m * groups, -1)
    tiles = [
        flat[first * groups : min(first + tile, m) * groups].reshape(groups, -1, flat.shape[1])
        for first in range(0, m, tile)
    ]
    rows = np.concatenate([t.swapaxes(0, 1) for t in tiles])  # [m, groups, 10]
    a = np.ascontiguousarray(rows[..., :8]).view(np.int8)
    scale = np.ascontiguousarray(rows[..., 8]).view(np.float32)
    with np.errstate(invalid="ignore"):
        back = a * scale.astype(np.float64)[..., None]
    return a, scale, rows[..., 9], back.reshape(m, -1)


def quantized_rows(isa, run, features: int, *inputs: np.ndarray):
    """Runs a compiled kernel that ends in int8 activations `[m, features]`, m as in inputs[0]."""
    out = tensor(np.full((inputs[0].shape[0], features // 32, 10), -1, np.int32))
    run(*map(tensor, inputs), out)
    return out, *in_row_order(isa, out.numpy())


@cache
def quantizer(isa, features: int, zero: int):
    """quantize_rows, compiled."""
    return compile_kernel(quantize_rows(isa, features, zero), isa)


def check_rounding(x: np.ndarray, a, scale, offset, back, zero: int) -> None:
    """That a, scale and offset are x `[m, features]` rounded."""
    groups = x.reshape(scale.shape + (32,))
    assert np.allclose(scale, np.abs(groups).max(-1) / 127, rtol=1e-5, atol=1e-30)
    assert (offset == -zero * a.sum(-1, dtype=np.int32)).all()
    assert (np.abs(back.reshape(groups.shape) - groups).max(-1) <= 0.502 * scale).all()
    same = np.isclose(back, rounded_activations(x), rtol=1e-5, atol=1e-30)
    assert same.mean() > 0.99  # but for ties that float32 breaks either way


def some_rows(isa, features: int):
    """Inputs of odd heights, with a row of zeros and a large group."""
    for m in (1, 2, isa.int8_rows, 3 * isa.int8_rows + 1, 70):
        x = np.random.default_rng(m).standard_normal((m, features)).astype(np.float32)
        x[m // 2] = 0
        x[m // 3, :32] *= 1e3
        yield x


def test_what_is_not_a_number_stays_so(isa):
    x = np.ones((3, 64), np.float32)
    x[0, 5], x[1, 40] = np.nan, np.inf
    _, _, scale, _, back = quantized_rows(isa, quantizer(isa, 64, 8), 64, x)
    assert np.isfinite(scale).tolist() == [[False, True], [True, False], [True, True]]
    assert np.abs(back[2] - 1).max() <= 1e-6


def test_quantize_rows(isa):
    run = quantizer(isa, 96, 7)
    for x in some_rows(isa, 96):
        check_rounding(x, *quantized_rows(isa, run, 96, x)[1:], zero=7)


@pytest.mark.parametrize("hidden", [32, 160])
def test_rms_norm_quantize(isa, hidden):
    weight = np.random.default_rng(0).standard_normal(hidden).astype(np.float32)
    run = compile_kernel(rms_norm_quantize(isa, hidden, 1e-5, 8), isa)
    for x in some_rows(isa, hidden):
        expected = twins.rms_norm(x, weight, 1e-5).astype(np.float32)
        check_rounding(expected, *quantized_rows(isa, run, hidden, x, weight)[1:], zero=8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("shape", "residual"),
    [
        ((1, 32), False),
        ((17, 96), True),
        ((100, 64), False),
        ((64, 160), True),
        ((48, 128), False),
    ],
)
def test_int8_linear(isa, bits, shape, residual):
    """Exact but for float32 rounding, once the activations are rounded."""
    out_features, in_features = shape
    spec, arrays, weight = quantized(bits, *shape)
    dot = isa.dot.for_bits(bits)
    kernel = int8_linear(dot, isa.int8_rows, *shape, bits, "float16", residual)
    run = compile_kernel(kernel, isa)
    quantize = quantizer(isa, in_features, spec.zero)
    for m in ROWS:
        rng = np.random.default_rng(m)
        x = (100 * rng.standard_normal((m, in_features))).astype(np.float32)
        x[:, ::5] = 127 * np.sign(x[:, ::5])  # many of the largest magnitude: no overflow
        added = rng.standard_normal((m, out_features)).astype(np.float32)
        inputs, *_, rounded = quantized_rows(isa, quantize, in_features, x)
        out = tensor(np.full((m, out_features), np.nan, np.float32))
        run(inputs, *arrays, *([tensor(added)] if residual else []), out)
        expected = rounded @ weight.T + (added if residual else 0)
        assert kernel_error(out.numpy(), expected) <= 1e-5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(32, 32), (96, 160), (160, 64)])
def test_int8_gated(isa, bits, shape):
    """Against the linear of rounded activations, silu·mul and rounding, one after another."""
    intermediate, in_features = shape
    spec, arrays, weight = quantized(bits, 2 * intermediate, in_features)
    run = compile_kernel(int8_gated(isa, *shape, bits, "float16", 4), isa)
    quantize = quantizer(isa, in_features, spec.zero)
    for m in ROWS:
        x = np.random.default_rng(m).standard_normal((m, in_features)).astype(np.float32)
        inputs, *_, rounded = quantized_rows(isa, quantize, in_features, x)
        out = tensor(np.full((m, intermediate // 32, 10), -1, np.int32))
        run(inputs, *arrays, out)
        expected = twins.silu_mul(rounded @ weight.T).astype(np.float32)
        check_rounding(expected, *in_row_order(isa, out.numpy()), zero=4)


@pytest.mark.parametrize("bits", BITS)
def test_int8_linear_at_the_ends_of_the_range(isa, bits):
    """Only the lowest and highest stored values and activations: nothing overflows."""
    rng = np.random.default_rng(bits)
    q = rng.choice(np.array([0, 2**bits - 1], np.uint8), (17, 64))
    x = rng.choice(np.array([-127, 127], np.float32), (isa.int8_rows + 1, 64))
    q[0], q[1], x[0], x[1] = 0, 2**bits - 1, 127, -127
    zero = GroupQuantization(bits, 32, "float32").zero
    linear = int8_linear(isa.dot.for_bits(bits), isa.int8_rows, 17, 64, bits, "float32", False)
    run = compile_kernel(linear, isa)
    quantize = quantizer(isa, 64, zero)
    words, scale = layout.pack_groups(q, bits), layout.pack_scales(np.ones((17, 2), np.float32))
    for m in (1, 2, isa.int8_rows, len(x)):
        inputs, *_ = quantized_rows(isa, quantize, 64, x[:m])
        out = tensor(np.full((m, 17), np.nan, np.float32))
        run(inputs, tensor(words), tensor(scale), out)
        expected = x[:m].astype(np.float64) @ (q.astype(np.float64) - zero).T
        assert np.abs(out.numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("bits", BITS)
def test_group_embedding(isa, bits):
    spec, arrays, weight = quantized(bits, 50, 96)
    ids = np.array([0, 15, 16, 49, 7, 7], np.int32)
    out = tensor(np.zeros((6, 96), np.float32))
    compile_kernel(group_embedding(50, 96, bits, spec.zero, "float16"), isa)(
        tensor(ids), *arrays, out
    )
    assert kernel_error(out.numpy(), weight[ids]) <= 1e-6


ROUNDED = [s.name for s in SCHEMES if s.name != "q0f32"]


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("tied", [False, True])
def test_model_against_its_dequantized_twin(build_model, name, tied):
    scheme = parse_scheme(name)
    size = dict(hidden_size=128, intermediate_size=192, head_dim=32)
    model = build_model(f"{name}-{tied}", quantization=name, tie_word_embeddings=tied, **size)

    def weights(tensor_name: str) -> np.ndarray:
        return scheme.rounded(tensor_name, model.weights(tensor_name))

    ids = tokens(model, 40)
    cache = new_cache(model)
    cache.add_sequence(0)
    logits = prefill(model, cache, 0, ids)
    expected = reference_logits(model.config, weights, ids)[-1]
    error = np.abs(logits.reshape(-1) - expected).max() / np.abs(expected).max()
    assert error <= (5e-2 if scheme.int8_activations else scheme.tolerance)


@pytest.mark.parametrize("name", ["q8f32_1", "q4f32_1", "q3f32_1"])
def test_int8_activations_in_a_model(build_model, name):
    """Near the float product of the same scheme, and not equal to it: the int8 kernels did run."""
    size = dict(hidden_size=128, intermediate_size=192, head_dim=32)
    int8 = build_model(name, quantization=name, **size)
    plain = build_model(f"{name}-float", quantization=f"{name}:float", **size)
    rows = []
    for model in (int8, plain):
        cache = new_cache(model)
        cache.add_sequence(0)
        rows.append(prefill(model, cache, 0, tokens(model, 40)).reshape(-1))
    error = np.abs(rows[0] - rows[1]).max() / np.abs(rows[1]).max()
    assert 1e-4 < error < 0.1
