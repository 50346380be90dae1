"""Linears of 5 rows and more by cp.async and tensor cores (skinny_gemm.py): their source, run by an
emulator (gpu_emulator.py), and what NVIDIA's compiler makes of it. No GPU is needed."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from pathlib import Path

import kernel_twins as twins
import numpy as np
import pytest
from conftest import kernel_error
from gpu_emulator import EmulatedKernel, kernels_of, plain_source, source_of
from test_gpu_kernels import BYTES, conditions_around_barriers, groups, normal, random_weight
from test_matrix_kernels import KINDS, TOLERANCE, needs_compiler

from phi3c.cuda import codegen, nvrtc
from phi3c.kernels.gpu.limits import CUDA
from phi3c.kernels.gpu.skinny_gemm import FEW, MORE, SkinnyTile, skinny_tile
from phi3c.kernels.gpu.staged import STEP, _place
from phi3c.kernels.weight_format import GroupFormat

MINI = [(9216, 3072), (3072, 3072), (16384, 3072), (3072, 8192), (32064, 3072)]
PLACE = {FEW: 3, MORE: 4}  # of the kernels in a linear; those for one, two and four rows are before
ADD = 5

linear_module = import_module("phi3c.kernels.gpu.linear")  # the package has a function there


def linear(out, in_, kind, residual=False, out_dtype="float16", tile: SkinnyTile | None = None):
    """tile: instead of that which is chosen."""
    with pytest.MonkeyPatch.context() as patch:
        if tile:
            patch.setattr(linear_module, "skinny_tile", lambda *shape: tile)
        args = (CUDA, "mma", out, in_, kind, residual, "float16", out_dtype)
        return linear_module.linear(*args)


@cache
def sources(*args) -> list[str]:
    return kernels_of(plain_source(linear(*args), "cuda"), "cuda")


# What is chosen, and emitted


def workgroups(out: int, tile: SkinnyTile) -> int:
    return -(-out // tile.outs) * tile.parts


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tiles_keep_a_large_gpu_busy(kind):
    tiles = {shape: skinny_tile(*shape, kind) for shape in MINI}
    assert all(128 <= workgroups(shape[0], tile) <= 512 for shape, tile in tiles.items())
    assert tiles[3072, 3072] == tiles[3072, 8192] == SkinnyTile(64, 4)
    narrow = kind in ("float16", groups(8))
    assert tiles[16384, 3072] == SkinnyTile(64 if narrow else 128, 1)


def test_no_part_is_empty():
    for steps in range(1, 300):
        for out in (1, 64, 1000, 3072, 5120):
            tile = skinny_tile(out, steps * STEP - 8, "float16")
            assert (tile.parts - 1) * -(-steps // tile.parts) < steps


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(3072, 8192), (16384, 3072), (101, 192)], ids=str)
def test_kernels_use_the_units_within_the_limits(shape, kind):
    found = kernels_of(source_of(linear(*shape, kind, True), "cuda"), "cuda")
    tile = skinny_tile(*shape, kind)
    assert len(found) == 7 if tile.parts > 1 else 6
    for rows, place in PLACE.items():
        source = found[place]
        instruction = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        assert source.count(instruction) == rows // 8 * STEP // 16
        assert int(re.search(r"__launch_bounds__\((\d+)\)", source)[1]) == 2 * tile.outs <= 256
        shared = re.findall(r"__shared__ alignas\(64\) (\w+) \w+\[(\d+)\];", source)
        assert 36 * 1024 <= sum(BYTES[t] * int(count) for t, count in shared) <= CUDA.shared_bytes
        (last,) = re.findall(r"wait_group_(\d)\(", source)
        assert int(last) >= 1  # stages that are on their way while one is multiplied
        assert not conditions_around_barriers(source)


@pytest.mark.parametrize(
    ("in_", "kind"), [(96, groups(4)), (64, GroupFormat(4, 8, "float32"))], ids=str
)
def test_others_have_none(in_, kind):
    """Where copies would not be aligned, or float16 not enough."""
    found = kernels_of(source_of(linear(40, in_, kind), "cuda"), "cuda")
    assert len(found) == 5 and not any("cp_async" in source for source in found[:-1])


def test_threads_that_read_at_once_meet_in_no_bank():
    """Vectors of x beside quantized weights: lanes 8i … 8i + 7 have two rows. (The emulator counts
    what ldmatrix meets.)"""
    for phase in range(4):
        for c in range(2):
            lanes = range(8 * phase, 8 * phase + 8)
            places = [int(_place(lane // 4, lane % 4 * 2 + c)) for lane in lanes]
            assert len({place // 4 % 8 for place in places}) == 8


# What it computes


class Emulated:
    """A linear of few rows: the kernel, and where it leaves parts, the one that adds them."""

    def __init__(self, folder: Path, rows: int, *args, change=lambda source: source):
        self.out, in_, kind, self.residual, self.dtype, tile = args
        self.tile = tile or skinny_tile(self.out, in_, kind)
        found = sources(*args)
        self.rows = rows
        self.multiply = EmulatedKernel(change(found[PLACE[rows]]), "cuda", folder)
        if self.tile.parts > 1:
            self.add = EmulatedKernel(found[ADD], "cuda", folder)

    def __call__(self, x, arrays, added=None, reversed=False) -> tuple[np.ndarray, int]:
        n, parts = len(x), self.tile.parts
        if n > self.rows:
            parts = 1
        found = np.full((n, self.out), np.nan, self.dtype)
        P = np.full((self.tile.parts, min(n, MORE), self.out), np.nan, np.float32)
        split = {"P": P} if self.tile.parts > 1 else {}
        output = {"O": found} | ({"R": added} if self.residual else {})
        names = "QS" if len(arrays) == 2 else "M"
        buffers = {"X": x, **split, **output, **dict(zip(names, arrays, strict=True))}
        grid = -(-n // self.rows), -(-self.out // self.tile.outs), parts
        met = self.multiply(buffers, {"n": n}, grid, 2 * self.tile.outs, reversed)
        if parts > 1:
            assert np.isnan(found).all()
            grid = -(-self.out // CUDA.threads), n
            self.add({"P": P, **output}, {"n": n}, grid, CUDA.threads, reversed)
        return found, met


CASES = [  # out, in, weight, residual, output, tile
    (70, 72, "float16", True, "float16", None),  # the last features are zeros
    (129, 200, "float16", False, "float32", SkinnyTile(64, 2)),
    (130, 640, groups(4), True, "float32", SkinnyTile(128, 4)),  # 3, 3, 3 and 1 stages
    (66, 256, groups(3), False, "float16", SkinnyTile(64, 1)),
    (129, 576, groups(3), True, "float16", SkinnyTile(128, 2)),
    (1, 64, groups(8), True, "float16", None),
    (65, 1024, groups(8), False, "float16", None),
    (48, 128, GroupFormat(4, 7, "float16"), False, "float32", None),
]


@needs_compiler
@pytest.mark.parametrize("rows", PLACE)
@pytest.mark.parametrize("args", CASES, ids=str)
def test_emulated(args, rows, tmp_path):
    out, in_, kind, residual, dtype, _ = args
    kernel = Emulated(tmp_path, rows, *args)
    arrays, values = random_weight(1, out, in_, kind)
    for n, reversed in {FEW: [(5, False), (17, True), (31, False), (32, True)],
                        MORE: [(33, True), (64, False), (70, True)]}[rows]:  # fmt: skip
        x = normal(n, n, in_, dtype="float16")
        added = normal(2, n, out, dtype="float16") if residual else None
        found, conflicts = kernel(x, arrays, added, reversed)
        expected = twins.row_major_linear(x, values.astype(np.float16), added)
        assert kernel_error(found, expected) <= (TOLERANCE if dtype == "float16" else 2e-6)
        assert not conflicts


@needs_compiler
@pytest.mark.parametrize("kind", [groups(3), groups(4), groups(8), GroupFormat(8, 3, "float16")])
def test_weights_are_rounded_once(kind, tmp_path):
    """To float16, whatever the scale: rows of x that are one feature bring the weights back."""
    kernel = Emulated(tmp_path, MORE, 128, 64, kind, False, "float32", None)
    rng = np.random.default_rng(0)
    scale = rng.integers(0, 0x7800, (128, 2)).astype(np.uint16).view(np.float16)
    scale[:4] = np.array([6e-8, 1e-5, 6.1e-5, 250])[:, None]
    (words, _), _ = random_weight(1, 128, 64, kind)
    found, _ = kernel(np.eye(64, dtype=np.float16), [words, scale])
    with np.errstate(over="ignore"):
        values = twins.group_weight(words, scale, kind.bits, kind.zero).astype(np.float16)
    finite = np.isfinite(values).all(axis=1)
    assert finite.sum() > 64
    np.testing.assert_array_equal(found.T[finite], values[finite])


@needs_compiler
@pytest.mark.parametrize("kind", ["float16", groups(4)], ids=str)
def test_emulated_rows_stay_apart(kind, tmp_path):
    """What memory holds beside the rows does not come in, nor a row into its neighbours."""
    kernel = Emulated(tmp_path, FEW, 70, 256, kind, False, "float16", SkinnyTile(64, 2))
    arrays, _ = random_weight(1, 70, 256, kind)
    memory = normal(3, 40, 256, dtype="float16")
    alone, _ = kernel(memory[:9], arrays)
    memory[9:] = np.nan
    memory[1] = np.nan
    beside, _ = kernel(memory[:9], arrays)
    assert np.isnan(beside[1]).all()
    np.testing.assert_array_equal(np.delete(beside, 1, 0), np.delete(alone, 1, 0))


MISTAKES = {
    "no barrier": (r"__syncthreads\(\);", ""),
    "no wait": (r"\S*wait_group_\d\(\);", ""),
    "a wait for less": (r"wait_group_(\d)\(\)", lambda found: f"wait_group_{int(found[1]) + 1}()"),
}


@needs_compiler
@pytest.mark.parametrize("name", MISTAKES)
def test_the_emulator_sees_a_mistake(name, tmp_path):
    args = 64, 1024, "float16", False, "float16", SkinnyTile(64, 1)
    wrong = Emulated(tmp_path, MORE, *args, change=lambda s: re.sub(*MISTAKES[name], s))
    x, (arrays, values) = normal(0, MORE, 1024, dtype="float16"), random_weight(1, *args[:3])
    expected = twins.row_major_linear(x, values)
    found = [wrong(x, arrays, reversed=r)[0] for r in (False, True)]
    assert not all(np.allclose(f, expected, atol=0.3) for f in found)


# What NVIDIA's compiler makes of it


@pytest.mark.parametrize(
    ("arch", "kind"),
    [*(("sm_80", k) for k in KINDS), ("sm_90", "float16"), ("sm_90", groups(4))],
    ids=str,
)
@pytest.mark.parametrize("shape", [(3072, 8192), (16384, 3072)], ids=str)
@pytest.mark.skipif(nvrtc.missing() is not None, reason="no NVRTC (phi3c[cuda])")
def test_nvrtc_compiles_without_spills(arch, kind, shape):
    with codegen.collected(arch) as made:
        source_of(linear(*shape, kind, True), {"kind": "cuda", "arch": arch, "host": "llvm"})
    (code,) = made.codes.values()
    found = {use.name: use for use in code.kernels}
    for place in PLACE.values():
        use = found[f"main_kernel_{place}"]
        assert use.spilled == 0 and use.registers <= 128  # 512 threads at once
