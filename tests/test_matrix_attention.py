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
from phi3c.kernels.gpu.mma_attention import tile_rows
from phi3c.runtime.token_tree import token_tree
from phi3c.targets import parse_target

# Weights are rounded to float16 before they multiply values, and so is what comes of it.
TOLERANCE = 1e-3
THREADS = 128
KEYS = 64  # of a step


def attention(shape: Shape, limits: GpuLimits = CUDA, dtype: str = "float16"):
    return GpuKernels(dtype, limits, "mma").prefill_attention(*shape.key)


def shape_of(head_dim: int, window: int | None = None, heads: int = 1, kv_heads: int = 1) -> Shape:
    return Shape(heads, kv_heads, head_dim, "float16", window)


@cache
def emulated(shape: Shape, folder: Path) -> EmulatedKernel:
    (source,) = kernels_of(plain_source(attention(shape), "cuda"), "cuda")
    return EmulatedKernel(source, "cuda", folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def run(kernel, shape: Shape, q, pages, sequences, reversed=False) -> tuple[np.ndarray, int]:
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
    grid = n // tile_rows(shape.head_dim) + batch, shape.heads
    return out, kernel(buffers, {"n": n, "batch": batch}, grid, THREADS, reversed)


def inputs(shape: Shape, parts, seed: int = 0):
    sequences, num_blocks = sequences_of(parts, shape.window, seed)
    pages = filled_pages(shape, sequences, num_blocks, seed)
    q = normal(seed + 1, sum(len(s.parents) for s in sequences), shape.heads * shape.head_dim)
    q = (q * (np.log2(np.e) / np.sqrt(shape.head_dim))).astype(np.float16)
    return q, pages, sequences


def check(folder: Path, shape: Shape, parts, seed: int = 0, reversed: bool = False):
    q, pages, sequences = inputs(shape, parts, seed)
    found, conflicts = run(emulated(shape, folder), shape, q, pages, sequences, reversed)
    expected = twins.attention(q, pages, sequences, shape.window, shape.head_dim)
    assert kernel_error(found, expected) <= TOLERANCE
    assert not conflicts


# What is emitted


@pytest.mark.parametrize("head_dim", [16, 96, 128])
def test_kernels_use_the_units_within_the_limits(head_dim):
    shape = shape_of(head_dim, window=100, heads=4, kv_heads=2)
    (source,) = kernels_of(source_of(attention(shape), "cuda"), "cuda")
    rows = tile_rows(head_dim) // 4  # of a warp
    products = rows * KEYS * head_dim * 2
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    assert source.count(mma) == products // (16 * 8 * 16)
    fragments = rows // 16 * head_dim // 16 + 2 * KEYS * head_dim // 256
    assert len(re.findall(r'"ldmatrix[\w.]*x4', source)) == fragments
    assert f"__launch_bounds__({THREADS})" in source
    shared = re.findall(r"^ +__shared__ alignas\(64\) (\w+) \w+\[(\d+)\];", source, re.MULTILINE)
    used = sum(BYTES[kind] * int(count) for kind, count in shared)
    assert used == (tile_rows(head_dim) + 2 * KEYS) * head_dim * 2 <= CUDA.shared_bytes
    assert not conditions_around_barriers(source)


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

SHAPES = {
    "mha-16": shape_of(16, heads=2, kv_heads=2),
    "gqa-48-window-7": shape_of(48, 7, heads=4, kv_heads=2),
    "mqa-64-window-70": shape_of(64, 70, heads=2),
    "mha-96": shape_of(96),
    "gqa-128-window-17": shape_of(128, 17, heads=2),
}


@pytest.fixture(params=list(SHAPES))
def shape(request) -> Shape:
    return SHAPES[request.param]


@needs_compiler
def test_emulated_from_nothing(shape, folder):
    rows = tile_rows(shape.head_dim)
    lengths = [1, 15, 16, 17, 33, KEYS - 1, KEYS, KEYS + 1, rows - 1, rows, rows + 1]
    check(folder, shape, [(0, chain(n), False) for n in lengths])
    check(folder, shape, [(0, chain(2 * rows + 3), False)], seed=1, reversed=True)


@needs_compiler
def test_emulated_at_the_edges_of_pages_and_steps(shape, folder):
    old = [*EDGES, KEYS - 2, KEYS - 1, KEYS, KEYS + 1, 2 * KEYS - 1, 2 * KEYS + 40]
    check(folder, shape, [(n, chain(1 + i % 3), i % 2) for i, n in enumerate(old)], seed=2)


@needs_compiler
def test_emulated_chunks_beside_decoding(shape, folder):
    parts = [
        (3 * KEYS + 5, chain(1), True),
        (KEYS, chain(tile_rows(shape.head_dim) + 5), True),
        (2 * KEYS - 1, chain(1), False),
        (KEYS + 9, chain(50), True),
    ]
    check(folder, shape, parts, seed=3, reversed=True)


@needs_compiler
def test_emulated_trees_beside_chains(shape, folder):
    rng = np.random.default_rng(3)
    parts = [
        (0, [-1, -1, 0, 0, 1, 4, 2], False),
        (20, chain(9), True),
        (37, random_tree(rng, tile_rows(shape.head_dim) + 9), True),
        (15, [-1] * 5, False),
        (90, random_tree(rng, 18), True),
    ]
    check(folder, shape, parts, seed=4)


@needs_compiler
@pytest.mark.parametrize("scale", [1e-6, 30.0, 3000.0])
def test_emulated_with_tiny_and_huge_scores(scale, folder):
    """Scores of many thousands, of both signs: one key takes all, nothing overflows."""
    shape = SHAPES["mha-16"]
    q, pages, sequences = inputs(shape, [(200, [-1, 0], False), (3, [-1], False)], seed=5)
    pages = np.round(pages * 4).astype(np.float16)
    q = (np.round(normal(6, *q.shape) * 4) * scale).astype(np.float16)
    found, _ = run(emulated(shape, folder), shape, q, pages, sequences)
    expected = twins.attention(q, pages, sequences, None, shape.head_dim)
    assert kernel_error(found, expected) <= TOLERANCE


@needs_compiler
def test_emulated_sequences_stay_apart(folder):
    """A sequence's NaN stays with it."""
    shape = SHAPES["mha-16"]
    q, pages, sequences = inputs(shape, [(40, chain(3), False) for _ in range(3)])
    alone, _ = run(emulated(shape, folder), shape, q, pages, sequences)
    for block in sequences[1].blocks:
        pages[block] = np.nan
    beside, _ = run(emulated(shape, folder), shape, q, pages, sequences)
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
    shape = SHAPES["mha-16"]
    (source,) = kernels_of(plain_source(attention(shape), "cuda"), "cuda")
    pattern, replacement, place = MISTAKES[name]
    match = list(re.finditer(pattern, source))[place]
    wrong = source[: match.start()] + match.expand(replacement) + source[match.end() :]
    q, pages, sequences = inputs(shape, [(KEYS + 30, chain(150), False), (9, [-1, 0, 0], False)])
    expected = twins.attention(q, pages, sequences, None, shape.head_dim)
    kernel = EmulatedKernel(wrong, "cuda", tmp_path)
    found = [run(kernel, shape, q, pages, sequences, order)[0] for order in (False, True)]
    assert not all(np.allclose(f, expected, atol=TOLERANCE) for f in found)


# What NVIDIA's compiler makes of it


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvrtc_compiles_without_spills(head_dim, arch):
    if what := nvrtc.missing():
        pytest.skip(what)
    target = parse_target(f"cuda:{arch}")
    function = attention(shape_of(head_dim, 2047, 32, 32)).with_attr("global_symbol", "main")
    with codegen.collected(arch) as collected:
        tvm.compile(tvm.IRModule({"main": function}), target=target.tvm_target)
    (kernel,) = [kernel for code in collected.codes.values() for kernel in code.kernels]
    assert not kernel.spilled
    workgroups = 2 if head_dim <= 96 else 3  # at once
    assert workgroups * THREADS * kernel.registers <= 65536
