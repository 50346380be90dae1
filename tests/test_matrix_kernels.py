"""Linears of many rows on tensor cores (CUDA) and simdgroup matrices (Metal): their source, run by
an emulator (gpu_emulator.py), and what NVIDIA's compiler makes of it; no GPU is needed. Those of
fewer rows: test_skinny_kernels.py."""

from __future__ import annotations

import re
from functools import cache

import gpu_emulator
import kernel_twins as twins
import numpy as np
import pytest
from conftest import kernel_error
from gpu_emulator import EmulatedKernel, kernels_of, plain_source, source_of
from test_gpu_kernels import BYTES, conditions_around_barriers, groups, normal, random_weight

from phi3c.cuda import codegen, nvrtc
from phi3c.kernels.gpu import GpuKernels
from phi3c.kernels.gpu.gemv import gemv_shape
from phi3c.kernels.gpu.limits import CUDA, GpuLimits
from phi3c.kernels.gpu.mma_gemm import TILE as MMA_TILE
from phi3c.kernels.gpu.mma_gemm import from_rows
from phi3c.kernels.gpu.simdgroup_gemm import TILE as SIMDGROUP_TILE
from phi3c.kernels.gpu.weight import weight_reader
from phi3c.kernels.weight_format import GroupFormat

UNITS = {"cuda": "mma", "metal": "simdgroup"}
LIMITS = {"cuda": CUDA, "metal": GpuLimits()}
TILES = {"cuda": MMA_TILE, "metal": SIMDGROUP_TILE}  # sides; the kernel is a linear's last one
THREADS = 128
TOLERANCE = 6e-4  # as a share of the largest value: one rounding to float16
KINDS = ["float16", groups(3), groups(4), groups(8)]
LOWERED = [(9216, 3072, k) for k in KINDS] + [(101, 96, k) for k in KINDS] + [(33, 40, "float16")]

needs_compiler = pytest.mark.skipif(not gpu_emulator.COMPILER, reason="no C++ compiler")


def linear(target: str, *args, dtype: str = "float16"):
    return GpuKernels(dtype, LIMITS[target], UNITS[target]).linear(*args)


# What is emitted


@pytest.mark.parametrize("target", UNITS)
@pytest.mark.parametrize(("out", "in_", "kind"), LOWERED, ids=str)
def test_kernels_use_the_units_within_the_limits(target, out, in_, kind):
    source = kernels_of(source_of(linear(target, out, in_, kind, True), target), target)[-1]
    if target == "cuda":
        instruction = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        assert source.count(instruction) == 64  # of a step of 32 features
        assert "ldmatrix.sync.aligned.m8n8.x4.shared.b16" in source
        assert int(re.search(r"__launch_bounds__\((\d+)\)", source)[1]) == THREADS
    else:
        steps = 2 if in_ > 32 else 1  # multiplications of a step, in the loop and after it
        assert source.count("simdgroup_multiply_accumulate(") == steps * 64
        assert re.search(r"simdgroup_float8x8 acc\w*\[16\]", source)
    shared = re.findall(
        r"^ +(?:__shared__ alignas\(64\)|threadgroup) (\w+) \w+\[(\d+)\];", source, re.MULTILINE
    )
    used = sum(BYTES[t] * int(count) for t, count in shared)
    assert 0 < used <= LIMITS[target].shared_bytes
    assert not conditions_around_barriers(source)


@pytest.mark.parametrize("target", UNITS)
@pytest.mark.parametrize(
    ("in_", "kind", "dtype"),
    [
        (64, "float16", "float32"),
        (64, groups(4), "float32"),
        (64, "uint16", "float16"),
        (64, "float32", "float16"),
        (36, "float16", "float16"),
    ],
    ids=str,
)
def test_other_linears_stay_portable(target, in_, kind, dtype):
    args = (40, in_, kind, False)
    portable = GpuKernels(dtype, LIMITS[target]).linear(*args)
    found, expected = (source_of(f, target) for f in (linear(target, *args, dtype=dtype), portable))
    assert found == expected
    assert "mma.sync" not in found and "simdgroup_" not in found


def test_large_tiles_are_for_what_fills_a_gpu():
    assert from_rows(32064) == 64
    assert from_rows(16384) == MMA_TILE
    assert from_rows(3072) == 5 * MMA_TILE


# What it computes


def run(kernel, side, x, arrays, residual, out, written, reversed=False) -> tuple[np.ndarray, int]:
    n = len(x)
    found = np.full((n, out), np.nan, written)
    names = "QS" if len(arrays) == 2 else "M"
    buffers = {"X": x, "O": found, **dict(zip(names, arrays, strict=True))}
    if residual is not None:
        buffers["R"] = residual
    grid = -(-n // side), -(-out // side)
    return found, kernel(buffers, {"n": n}, grid, THREADS, reversed)


@cache
def sources(target: str, *args) -> list[str]:
    return kernels_of(plain_source(linear(target, *args), target), target)


CASES = [  # out, in, weight, residual, output
    (70, 72, "float16", True, None),  # the last features are zeros
    (129, 128, "float16", False, "float32"),
    (137, 96, groups(4), True, "float32"),
    (66, 64, groups(3), False, None),
    (1, 96, groups(8), True, None),
    (48, 32, GroupFormat(4, 7, "float32"), False, None),
]


@needs_compiler
@pytest.mark.parametrize(("target", "side"), TILES.items())
@pytest.mark.parametrize(("out", "in_", "kind", "residual", "out_dtype"), CASES, ids=str)
def test_emulated(out, in_, kind, residual, out_dtype, target, side, tmp_path):
    source = sources(target, out, in_, kind, residual, out_dtype)[-1]
    kernel = EmulatedKernel(source, target, tmp_path)
    arrays, values = random_weight(1, out, in_, kind)
    written = out_dtype or "float16"
    for rows, reversed in [(17, False), (side + 9, True)]:
        x = normal(rows, rows, in_, dtype="float16")
        added = normal(2, rows, out, dtype="float16") if residual else None
        found, conflicts = run(kernel, side, x, arrays, added, out, written, reversed)
        expected = twins.row_major_linear(x, values.astype(np.float16), added)
        assert kernel_error(found, expected) <= (TOLERANCE if written == "float16" else 2e-6)
        assert not conflicts


@needs_compiler
@pytest.mark.parametrize(("target", "side"), TILES.items())
def test_emulated_rows_stay_apart(target, side, tmp_path):
    """What memory holds beside the rows does not come in, nor a row into its neighbours."""
    kernel = EmulatedKernel(sources(target, 40, 40, "float16", False)[-1], target, tmp_path)
    arrays, _ = random_weight(1, 40, 40, "float16")
    x = normal(3, side + 1, 40, dtype="float16")
    alone, _ = run(kernel, side, x, arrays, None, 40, "float16")
    x[1] = np.nan
    beside, _ = run(kernel, side, x, arrays, None, 40, "float16")
    assert np.isnan(beside[1]).all()
    np.testing.assert_array_equal(np.delete(beside, 1, 0), np.delete(alone, 1, 0))


ONE_ROW = [  # out, in, weight; the last shapes have lanes past the last unit and rows past the last
    (8, 3072, groups(4)),
    (17, 96, groups(3)),
    (9, 160, groups(8)),
    (6, 264, "float16"),
]


@needs_compiler
@pytest.mark.parametrize("target", UNITS)
@pytest.mark.parametrize(("out", "in_", "kind"), ONE_ROW, ids=str)
def test_emulated_norm_product_and_gate_of_one_row(out, in_, kind, target, tmp_path):
    limits = CUDA if target == "cuda" else GpuLimits()
    function = GpuKernels("float16", limits).gated_linear(out, in_, kind, 1e-5)
    kernel = EmulatedKernel(kernels_of(plain_source(function, target), target)[1], target, tmp_path)
    arrays, values = random_weight(1, 2 * out, in_, kind)
    x, norm = normal(3, 1, in_, dtype="float16"), normal(4, in_) * np.float32(in_**-0.5)
    expected = twins.silu_mul(twins.row_major_linear(twins.rms_norm(x, norm, 1e-5), values))
    shape = gemv_shape(limits, 1, 2 * out, in_, weight_reader(limits, in_, kind), True)
    assert shape.room
    grid = -(-2 * out // (shape.outs * shape.teams)), 1
    names = "QS" if len(arrays) == 2 else "M"
    for reversed in (False, True):
        found = np.full((1, out), np.nan, "float16")
        buffers = {"X": x, "G": norm, "O": found, **dict(zip(names, arrays, strict=True))}
        kernel(buffers, {"n": 1}, grid, shape.threads, reversed)
        assert kernel_error(found, expected) <= TOLERANCE


# Of a kernel's barriers, those without which the emulator's results are wrong in one order of the
# warps. (It does not tell on a simdgroup's barrier before it writes again, as every matrix function
# waits for the simdgroup there.)
BARRIERS = {
    "cuda": r"__syncthreads\(\);",
    "metal": r"threadgroup_barrier\(.*\);|simdgroup_barrier\(.*\);(?=\n +long)",
}


@needs_compiler
@pytest.mark.parametrize(("target", "side"), TILES.items())
def test_the_emulator_sees_a_missing_barrier(target, side, tmp_path):
    source = sources(target, side, 96, "float16", False, None)[-1]
    x, (arrays, values) = (
        normal(0, side, 96, dtype="float16"),
        random_weight(1, side, 96, "float16"),
    )
    expected = twins.row_major_linear(x, values)
    for i, barrier in enumerate(list(re.finditer(BARRIERS[target], source))[:3]):
        kernel = EmulatedKernel(
            source[: barrier.start()] + source[barrier.end() :], target, tmp_path
        )
        found = [run(kernel, side, x, arrays, None, side, "float16", r)[0] for r in (False, True)]
        assert not all(np.allclose(f, expected, atol=0.1) for f in found), i


# What NVIDIA's compiler makes of it


@pytest.mark.parametrize(
    ("arch", "kind"), [*(("sm_80", kind) for kind in KINDS), ("sm_90", groups(4))], ids=str
)
@pytest.mark.skipif(nvrtc.missing() is not None, reason="no NVRTC (phi3c[cuda])")
def test_nvrtc_compiles_without_spills(arch, kind):
    with codegen.collected(arch) as made:
        source_of(
            linear("cuda", 3072, 3072, kind, True), {"kind": "cuda", "arch": arch, "host": "llvm"}
        )
    (code,) = made.codes.values()
    found = {use.name: use for use in code.kernels}
    assert found["main_kernel_6"].spilled == 0
    assert found["main_kernel_6"].registers * THREADS * 2 <= 65536  # two workgroups at once
