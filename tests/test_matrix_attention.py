"""Prefill attention on tensor cores (CUDA): its source, run by an emulator (gpu_emulator.py),
against the slow twin, and what NVIDIA's compiler makes of it. No GPU is needed."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import kernel_twins as twins
import numpy as np
import pytest
import tvm
from conftest import kernel_error
from gpu_emulator import EmulatedKernel, kernels_of, plain_source, source_of
from test_gpu_kernels import BYTES, conditions_around_barriers, int32, normal
from test_kernels import EDGES, Shape, chain, filled_pages, indptr, random_tree, sequences_of
from test_matrix_kernels import needs_compiler

from phi3c.cuda import codegen, nvrtc
from phi3c.kernels.gpu import GpuKernels
from phi3c.kernels.gpu.limits import CUDA, GpuLimits
from phi3c.kernels.gpu.mma_attention import KEYS, LARGE, SMALL, THREADS, rows_of_large, shared_bytes
from phi3c.runtime.token_tree import token_tree
from phi3c.targets import parse_target

# Weights are rounded to float16 before they multiply values, and so is what comes of it.
TOLERANCE = 1e-3
PLACES = {SMALL: 0, LARGE: 1}  # of the kernels in the source


def attention(shape: Shape, limits: GpuLimits = CUDA, dtype: str = "float16"):
    return GpuKernels(dtype, limits, "mma").prefill_attention(*shape.key)


def shape_of(head_dim: int, window: int | None = None, heads: int = 1, kv_heads: int = 1) -> Shape:
    return Shape(heads, kv_heads, head_dim, "float16", window)


@cache
def kernel_source(shape: Shape, rows: int) -> str:
    return kernels_of(plain_source(attention(shape), "cuda"), "cuda")[PLACES[rows]]


@cache
def emulated(shape: Shape, rows: int, folder: Path) -> EmulatedKernel:
    return EmulatedKernel(kernel_source(shape, rows), "cuda", folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def run(kernel, shape: Shape, rows: int, q, pages, sequences, reversed=False):
    """The output, and how many conflicts of banks there were."""
    trees = [token_tree(s.parents) for s in sequences]
    positions = [s.length + t.depth for s, t in zip(sequences, trees, strict=True)]
    out = np.full(q.shape, np.nan, "float16")
    buffers = {
        "Q": q,
        "P": pages,
        "QI": indptr([t.size for t in trees]),
        "BI": indptr([len(s.blocks) for s in sequences]),
        "B": int32(*(b for s in sequences for b in s.blocks)),
        "START": int32(*(s.start for s in sequences)),
        "LENGTH": int32(*(s.length for s in sequences)),
        "POS": np.concatenate(positions).astype(np.int32),
        "ENTER": np.concatenate([t.enter for t in trees]).astype(np.int32),
        "LEAVE": np.concatenate([t.leave for t in trees]).astype(np.int32),
        "OUT": out,
    }
    n, batch = len(q), len(sequences)
    grid = n // rows + batch, shape.heads
    return out, kernel(buffers, {"n": n, "batch": batch}, grid, THREADS, reversed)


def inputs(shape: Shape, parts, seed: int = 0):
    sequences, num_blocks = sequences_of(parts, shape.window, seed)
    pages = filled_pages(shape, sequences, num_blocks, seed)
    q = normal(seed + 1, sum(len(s.parents) for s in sequences), shape.heads * shape.head_dim)
    q = (q * (np.log2(np.e) / np.sqrt(shape.head_dim))).astype(np.float16)
    return q, pages, sequences


def check(folder: Path, case: tuple[Shape, int], parts, seed: int = 0, reversed: bool = False):
    shape, rows = case
    q, pages, sequences = inputs(shape, parts, seed)
    kernel = emulated(shape, rows, folder)
    found, conflicts = run(kernel, shape, rows, q, pages, sequences, reversed)
    expected = twins.attention(q, pages, sequences, shape.window, shape.head_dim)
    assert kernel_error(found, expected) <= TOLERANCE
    assert not conflicts


# What is emitted


@pytest.mark.parametrize("head_dim", [16, 96, 128])
def test_kernels_use_the_units_within_the_limits(head_dim):
    shape = shape_of(head_dim, window=100, heads=4, kv_heads=2)
    found = kernels_of(source_of(attention(shape), "cuda"), "cuda")
    tiles = [SMALL, LARGE] if head_dim <= 96 else [SMALL]
    for source, rows in zip(found, tiles, strict=True):
        mma = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        of_warp = rows // 4
        assert source.count(mma) == of_warp * KEYS * head_dim * 2 // (16 * 8 * 16)
        fragments = of_warp * head_dim // 256 + 2 * KEYS * head_dim // 256
        assert len(re.findall(r'"ldmatrix[\w.]*x4', source)) == fragments
        assert f"__launch_bounds__({THREADS})" in source
        shared = re.findall(
            r"^ +__shared__ alignas\(64\) (\w+) \w+\[(\d+)\];", source, re.MULTILINE
        )
        used = sum(BYTES[kind] * int(count) for kind, count in shared)
        assert used == shared_bytes(rows, head_dim) <= CUDA.shared_bytes
        assert not conditions_around_barriers(source)


def test_large_tiles_are_for_what_fills_a_gpu():
    assert rows_of_large(32, 96) == 8 * LARGE
    assert rows_of_large(40, 128) is None


OTHERS = [  # head_dim, pages, activations, limits
    (96, "float32", "float16", CUDA),
    (96, "float16", "float32", CUDA),
    (20, "float16", "float16", CUDA),
    (160, "float16", "float16", CUDA),
    (96, "float16", "float16", GpuLimits()),  # lacks the shared memory
]


@pytest.mark.parametrize(("head_dim", "kv_dtype", "dtype", "limits"), OTHERS, ids=str)
def test_others_stay_portable(head_dim, kv_dtype, dtype, limits):
    shape = Shape(2, 1, head_dim, kv_dtype, None)
    portable = GpuKernels(dtype).prefill_attention(*shape.key)
    found = source_of(attention(shape, limits, dtype), "cuda")
    assert found == source_of(portable, "cuda") and "mma.sync" not in found


# What it computes

CASES = {
    "mha-16": (shape_of(16, heads=2, kv_heads=2), LARGE),
    "gqa-48-window-7": (shape_of(48, 7, heads=4, kv_heads=2), SMALL),
    "mqa-64-window-70": (shape_of(64, 70, heads=2), LARGE),
    "mha-96": (shape_of(96), LARGE),
    "mha-96-small": (shape_of(96), SMALL),
    "gqa-128-window-17": (shape_of(128, 17, heads=2), SMALL),
}


@pytest.fixture(params=list(CASES))
def case(request) -> tuple[Shape, int]:
    return CASES[request.param]


@needs_compiler
def test_emulated_from_nothing(case, folder):
    rows = case[1]
    lengths = [1, 15, 17, KEYS - 1, KEYS, KEYS + 1, rows - 1, rows + 1]
    check(folder, case, [(0, chain(n), False) for n in lengths])
    check(folder, case, [(0, chain(2 * rows + 3), False)], seed=1, reversed=True)


@needs_compiler
def test_emulated_at_the_edges_of_pages_and_steps(case, folder):
    old = [*EDGES, KEYS - 2, KEYS - 1, KEYS, KEYS + 1, 2 * KEYS - 1, 2 * KEYS + 40]
    check(folder, case, [(n, chain(1 + i % 3), i % 2) for i, n in enumerate(old)], seed=2)


@needs_compiler
def test_emulated_chunks_beside_decoding(case, folder):
    parts = [
        (3 * KEYS + 5, chain(1), True),
        (KEYS, chain(case[1] + 5), True),
        (2 * KEYS - 1, chain(1), False),
        (KEYS + 9, chain(50), True),
    ]
    check(folder, case, parts, seed=3, reversed=True)


@needs_compiler
def test_emulated_trees_beside_chains(case, folder):
    rng = np.random.default_rng(3)
    parts = [
        (0, [-1, -1, 0, 0, 1, 4, 2], False),
        (20, chain(9), True),
        (37, random_tree(rng, case[1] + 9), True),
        (15, [-1] * 5, False),
        (90, random_tree(rng, 18), True),
    ]
    check(folder, case, parts, seed=4)


@needs_compiler
@pytest.mark.parametrize("scale", [1e-6, 30.0, 3000.0])
def test_emulated_with_tiny_and_huge_scores(scale, folder):
    """Scores of many thousands, of both signs: one key takes all, nothing overflows."""
    shape, rows = CASES["mha-16"]
    q, pages, sequences = inputs(shape, [(200, [-1, 0], False), (3, [-1], False)], seed=5)
    pages = np.round(pages * 4).astype(np.float16)
    q = (np.round(normal(6, *q.shape) * 4) * scale).astype(np.float16)
    found, _ = run(emulated(shape, rows, folder), shape, rows, q, pages, sequences)
    expected = twins.attention(q, pages, sequences, None, shape.head_dim)
    assert kernel_error(found, expected) <= TOLERANCE


@needs_compiler
def test_emulated_sequences_stay_apart(folder):
    """A sequence's NaN stays with it."""
    shape, rows = CASES["mha-16"]
    q, pages, sequences = inputs(shape, [(40, chain(3), False) for _ in range(3)])
    alone, _ = run(emulated(shape, rows, folder), shape, rows, q, pages, sequences)
    for block in sequences[1].blocks:
        pages[block] = np.nan
    beside, _ = run(emulated(shape, rows, folder), shape, rows, q, pages, sequences)
    assert np.isnan(beside[3:6]).all()
    np.testing.assert_array_equal(beside[[0, 1, 2, 6, 7, 8]], alone[[0, 1, 2, 6, 7, 8]])


WAIT = r"tvm_builtin_ptx_cp_async_wait_group_async_wait_group_0\(\);\s+"
LANES = r"__shfl\w*_sync\(\(uint\)4294967295, "
MISTAKES = {  # what is replaced, by what, which of the places
    "first-barrier": (r"__syncthreads\(\);", "", 0),
    "second-barrier": (r"__syncthreads\(\);", "", 1),
    "first-wait": (WAIT, "", 0),
    "second-wait": (WAIT, "", 1),
    "values-not-transposed": (r"x4\.trans\.", "x4.", -1),
    "another-row's-maximum": (rf"({LANES}top_ptr\[0\], )1", r"\g<1>4", 0),
    "half-of-a-row's-sum": (rf"({LANES}sum_ptr\[0\], )2", r"\g<1>0", 0),
    "another-key's-mask": (rf"({LANES}key_ptr\[1\], )", r"\g<1>1 ^ ", 0),
}


@needs_compiler
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, tmp_path):
    """In one order of the warps or the other, and by the case above."""
    shape, rows = CASES["mha-16"]
    source = kernel_source(shape, rows)
    pattern, replacement, place = MISTAKES[name]
    match = list(re.finditer(pattern, source))[place]
    wrong = source[: match.start()] + match.expand(replacement) + source[match.end() :]
    q, pages, sequences = inputs(shape, [(KEYS + 30, chain(150), False), (9, [-1, 0, 0], False)])
    expected = twins.attention(q, pages, sequences, None, shape.head_dim)
    kernel = EmulatedKernel(wrong, "cuda", tmp_path)
    found = [run(kernel, shape, rows, q, pages, sequences, order)[0] for order in (False, True)]
    assert not all(np.allclose(f, expected, atol=TOLERANCE) for f in found)


# What NVIDIA's compiler makes of it


@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvrtc_compiles_without_spills(head_dim, arch):
    if what := nvrtc.missing():
        pytest.skip(what)
    target = parse_target(f"cuda:{arch}")
    function = attention(shape_of(head_dim, 2047, 32, 32)).with_attr("global_symbol", "main")
    with codegen.collected(arch) as collected:
        tvm.compile(tvm.IRModule({"main": function}), target=target.tvm_target)
    kernels = [kernel for code in collected.codes.values() for kernel in code.kernels]
    at_once = {"main_kernel": 3, "main_kernel_1": 2} if head_dim <= 96 else {"main_kernel": 3}
    assert {kernel.name for kernel in kernels} == set(at_once)
    for kernel in kernels:
        assert not kernel.spilled
        assert at_once[kernel.name] * THREADS * kernel.registers <= 65536
