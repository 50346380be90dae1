"""Decode attention on GPUs: parts, steps and the asynchronous copies of CUDA. Its source, run by an
emulator (gpu_emulator.py), and on a Vulkan device, against the slow twin. test_kernels.py has the
cases that it shares with the CPU's."""

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
from test_gpu_kernels import BYTES, DTYPES, conditions_around_barriers, int32, normal
from test_kernels import Shape, filled_pages, indptr, sequences_of
from test_matrix_kernels import needs_compiler
from tvm.script import tirx as T
from vulkan_device import DeviceKernel, needs_device

from phi3c.cuda import codegen, nvrtc
from phi3c.kernels.gpu import GpuKernels
from phi3c.kernels.gpu.kv_step import BLOCKS, KEYS
from phi3c.kernels.gpu.limits import CUDA, GpuLimits
from phi3c.kernels.gpu.parts import most_parts, part_shift, places
from phi3c.targets import parse_target

TOLERANCE = {"float32": 1e-5, "float16": 1e-3}
THREADS = 128
EDGES = [1, 15, 16, 17, KEYS - 1, KEYS, KEYS + 1, 2 * KEYS, 3 * KEYS + 21]  # tokens of a context


def attention(shape: Shape, dtype: str = "float16", limits: GpuLimits = CUDA, matrix: str = "mma"):
    return GpuKernels(dtype, limits, matrix).decode_attention(*shape.key)


def padded_ids(sequences, kv_heads: int, steps: int) -> np.ndarray:
    """block_ids, with so many unused ones that a part takes this many steps, a power of two."""
    ids = int32(*(b for s in sequences for b in s.blocks))
    if steps == 1:
        return ids
    more = BLOCKS * most_parts(kv_heads) * steps // 2 + 1 - len(ids)
    return np.concatenate([ids, np.full(more, 2**31 - 1, np.int32)])


def inputs(shape: Shape, contexts, drops: bool, dtype: str, seed: int = 0):
    """Pages that are NaN in every slot that no sequence has."""
    parts = [(n - 1, [-1], drops) for n in contexts]
    sequences, num_blocks = sequences_of(parts, shape.window, seed)
    pages = filled_pages(shape, sequences, num_blocks, seed)
    q = normal(seed + 1, len(contexts), shape.heads * shape.head_dim)
    q = (q * (np.log2(np.e) / np.sqrt(shape.head_dim))).astype(dtype)
    return q, pages, sequences


def described(sequences, kv_heads: int, steps: int) -> dict[str, np.ndarray]:
    return {
        "BI": indptr([len(s.blocks) for s in sequences]),
        "B": padded_ids(sequences, kv_heads, steps),
        "START": int32(*(s.start for s in sequences)),
        "POS": int32(*(s.length for s in sequences)),
    }


def error(found, q, pages, sequences, shape: Shape) -> float:
    return kernel_error(found, twins.attention(q, pages, sequences, shape.window, shape.head_dim))


# On a Vulkan device


@cache
def compiled(shape: Shape, dtype: str) -> DeviceKernel:
    return DeviceKernel(attention(shape, dtype, GpuLimits(), "none"))


def check_on_device(shape: Shape, dtype: str, contexts, drops=False, steps=1, seed=0):
    q, pages, sequences = inputs(shape, contexts, drops, dtype, seed)
    ids = described(sequences, shape.kv_heads, steps)
    out = tvm.runtime.tensor(np.full(q.shape, np.nan, dtype))
    args = (q, pages, ids["BI"], ids["B"], ids["START"], ids["POS"])
    compiled(shape, dtype)(*map(tvm.runtime.tensor, args), out)
    assert error(out.numpy(), q, pages, sequences, shape) <= TOLERANCE[dtype]


SHAPES = {
    "mha-96": Shape(2, 2, 96, "float16", None),
    "gqa-96-window-70": Shape(3, 1, 96, "float16", 70),
    "gqa-20": Shape(10, 2, 20, "float32", None),
    "mqa-128-window-100": Shape(8, 1, 128, "float16", 100),
    "gqa-18": Shape(4, 2, 18, "float32", 65),
    "mha-160": Shape(1, 1, 160, "float16", None),
}


@needs_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_contexts_at_the_edges_of_parts(name, dtype):
    check_on_device(SHAPES[name], dtype, EDGES)
    check_on_device(SHAPES[name], dtype, EDGES[::-1], drops=True, seed=1)
    check_on_device(SHAPES[name], dtype, [5 * KEYS], seed=2)


@needs_device
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("steps", [2, 8])
def test_parts_of_several_steps(name, steps):
    part = steps * KEYS
    contexts = [1, part - KEYS, part - 1, part, part + 1, part + KEYS + 9]
    check_on_device(SHAPES[name], "float32", contexts, steps=steps, seed=3)


@needs_device
def test_many_parts_are_joined_in_turns():
    """More than the threads of a dimension ask for at once."""
    check_on_device(Shape(1, 1, 32, "float32", None), "float32", [70 * KEYS, 3, 200 * KEYS])


def shift_and_places(kv_heads: int):
    """As a function of how many blocks are listed, for one sequence."""

    @T.prim_func(s_tir=True)
    def main(listed: T.handle, found: T.handle):
        N = T.match_buffer(listed, (1,), "int64")
        FOUND = T.match_buffer(found, (2,), "int64")
        FOUND[0] = T.Cast("int64", part_shift(N[0], kv_heads))
        FOUND[1] = places(N[0], T.int64(1), kv_heads)

    compiled = tvm.compile(tvm.IRModule({"main": main}), target="llvm")

    def evaluate(listed: int) -> list[int]:
        found = tvm.runtime.tensor(np.zeros(2, np.int64))
        compiled["main"](tvm.runtime.tensor(np.array([listed])), found)
        return found.numpy().tolist()

    return evaluate


@pytest.mark.parametrize("kv_heads", [1, 8, 10, 32])
def test_parts_are_few_and_their_blocks_double(kv_heads):
    evaluate = shift_and_places(kv_heads)
    most = most_parts(kv_heads)
    assert most & (most - 1) == 0 and most * kv_heads <= 4096 < 2 * most * kv_heads
    edges = [BLOCKS * most * n + more for n in (1, 2, 3, 4, 16) for more in (-1, 0, 1)]
    for listed in (1, 3, 4, 5, 511, 512, 513, *edges, 2**27):
        shift, count = evaluate(listed)
        assert 2**shift >= BLOCKS and listed <= most * 2**shift
        assert 2**shift == BLOCKS or listed > most * 2**shift // 2
        assert count == (listed >> shift) + 1


# By the emulator


@cache
def kernel_source(shape: Shape) -> list[str]:
    return kernels_of(plain_source(attention(shape), "cuda"), "cuda")


@cache
def emulated(shape: Shape, folder: Path) -> list[EmulatedKernel]:
    return [EmulatedKernel(source, "cuda", folder) for source in kernel_source(shape)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def run(kernels, case, q, pages, sequences, steps=1, reversed=False):
    """By both kernels, with NaN in all that they write."""
    shape, turns = case
    batch = len(sequences)
    inputs = described(sequences, shape.kv_heads, steps)
    listed = len(inputs["B"])
    places = listed // (BLOCKS * steps) + batch
    parts = {
        "PO": np.full((places, shape.heads, shape.head_dim), np.nan, np.float32),
        "PM": np.full((places, shape.heads), np.nan, np.float32),
        "PL": np.full((places, shape.heads), np.nan, np.float32),
    }
    out = np.full(q.shape, np.nan, "float16")
    slices = shape.head_dim // max(d for d in range(4, 33, 4) if shape.head_dim % d == 0)
    first, second = kernels
    numbers = {"batch": batch, "listed": listed}
    grid = places, shape.kv_heads * turns
    first({"Q": q, "P": pages, **inputs, **parts}, numbers, grid, THREADS, reversed)
    inputs.pop("B")
    grid = batch, shape.heads * slices
    second({**inputs, **parts, "OUT": out}, numbers, grid, THREADS, reversed)
    return out


def check(folder: Path, case, contexts, drops=False, seed=0, **options):
    shape, _ = case
    q, pages, sequences = inputs(shape, contexts, drops, "float16", seed)
    found = run(emulated(shape, folder), case, q, pages, sequences, **options)
    assert error(found, q, pages, sequences, shape) <= TOLERANCE["float16"]


def shape_of(heads, kv_heads, head_dim, window=None) -> Shape:
    return Shape(heads, kv_heads, head_dim, "float16", window)


CASES = {  # and how many turns the heads of a key head take
    "mha-32": (shape_of(2, 2, 32), 1),
    "gqa-96-window-70": (shape_of(3, 1, 96, 70), 1),
    "gqa-64-window-7": (shape_of(4, 2, 64, 7), 1),
    "mqa-128": (shape_of(8, 1, 128), 2),
    "gqa-80": (shape_of(5, 1, 80), 1),
}


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


@needs_compiler
def test_emulated_contexts_at_the_edges_of_parts(case, folder):
    check(folder, case, EDGES)
    check(folder, case, EDGES[::-1], drops=True, seed=1, reversed=True)
    for n in (1, KEYS + 1):
        check(folder, case, [n], seed=2)


@needs_compiler
@pytest.mark.parametrize("steps", [2, 8])
def test_emulated_parts_of_several_steps(case, steps, folder):
    part = steps * KEYS
    contexts = [1, part - KEYS, part - 1, part, part + 1, part + KEYS + 9]
    check(folder, case, contexts, steps=steps, seed=3)
    check(folder, case, contexts[::-1], drops=True, steps=steps, seed=4, reversed=True)


@needs_compiler
def test_emulated_sequences_stay_apart(folder):
    """A sequence's NaN stays with it."""
    case = CASES["gqa-64-window-7"]
    q, pages, sequences = inputs(case[0], [40, KEYS + 3, 90], False, "float16")
    alone = run(emulated(case[0], folder), case, q, pages, sequences)
    for block in sequences[1].blocks:
        pages[block] = np.nan
    beside = run(emulated(case[0], folder), case, q, pages, sequences)
    assert np.isnan(beside[1]).all()
    np.testing.assert_array_equal(beside[[0, 2]], alone[[0, 2]])


WAIT = r"tvm_builtin_ptx_cp_async_wait_group_async_wait_group_0\(\);\s+"
SYNC = r"__syncthreads\(\);"
MISTAKES = {  # what is replaced, by what, which of the places
    "before-the-copies": (SYNC, "", 0),
    "no-wait": (WAIT, "", 0),
    "after-the-copies": (SYNC, "", 1),
    "after-parts-of-scores": (SYNC, "", 2),
    "after-scores": (SYNC, "", 3),
    "after-the-largest": (SYNC, "", 4),
    "after-weights": (SYNC, "", 5),
    "after-the-loop": (SYNC, "", 6),
    "values-past-the-last-key": (r"\(uint\)0\b", "(uint)16", -1),
}


@needs_compiler
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, folder):
    """In one order of the warps or the other. Scores are large, as smaller ones give the same
    weights whatever score is taken for the largest."""
    case = CASES["gqa-96-window-70"]
    first, _ = kernel_source(case[0])
    pattern, replacement, place = MISTAKES[name]
    match = list(re.finditer(pattern, first))[place]
    wrong = first[: match.start()] + match.expand(replacement) + first[match.end() :]
    q, pages, sequences = inputs(case[0], [3 * KEYS + 5, 2 * KEYS], False, "float16", seed=6)
    q *= np.float16(100)
    kernels = [EmulatedKernel(wrong, "cuda", folder), emulated(case[0], folder)[1]]
    found = [run(kernels, case, q, pages, sequences, 4, order) for order in (False, True)]
    expected = twins.attention(q, pages, sequences, case[0].window, case[0].head_dim)
    assert not all(np.allclose(f, expected, atol=TOLERANCE["float16"]) for f in found)


# What is emitted


@pytest.mark.parametrize(
    ("shape", "dtype", "limits", "copied"),
    [
        (shape_of(32, 32, 96), "float16", CUDA, True),
        (shape_of(40, 10, 128), "float32", CUDA, True),
        (shape_of(2, 2, 24), "float16", CUDA, False),
        (shape_of(2, 2, 160), "float16", CUDA, False),
        (Shape(2, 2, 96, "float32", None), "float16", CUDA, False),
        (shape_of(2, 2, 128), "float16", GpuLimits(), False),
    ],
    ids=str,
)
def test_copies_are_for_what_fits(shape, dtype, limits, copied):
    first, _ = kernels_of(source_of(attention(shape, dtype, limits), "cuda"), "cuda")
    assert ("cp_async" in first) == copied
    shared = re.findall(r"^ +__shared__ alignas\(64\) (\w+) \w+\[(\d+)\];", first, re.MULTILINE)
    assert sum(BYTES[kind] * int(count) for kind, count in shared) <= limits.shared_bytes
    assert not conditions_around_barriers(first)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("heads", [(32, 32, 96), (24, 8, 128), (40, 10, 128)], ids=str)
def test_nvrtc_compiles_without_spills(heads, arch):
    """Four workgroups at once, each with 64 keys and values on their way."""
    if what := nvrtc.missing():
        pytest.skip(what)
    function = attention(shape_of(*heads)).with_attr("global_symbol", "main")
    with codegen.collected(arch) as collected:
        tvm.compile(
            tvm.IRModule({"main": function}), target=parse_target(f"cuda:{arch}").tvm_target
        )
    kernels = [kernel for code in collected.codes.values() for kernel in code.kernels]
    assert {kernel.name for kernel in kernels} == {"main_kernel", "main_kernel_1"}
    for kernel in kernels:
        assert not kernel.spilled
        assert 4 * THREADS * kernel.registers <= 65536
