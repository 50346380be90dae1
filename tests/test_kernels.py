"""Every CPU kernel against its slow twin, for each instruction set that this machine can run.

Attention on a GPU reads the same pages: its kernels go through the same cases, by Vulkan.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import aarch64
import kernel_twins as twins
import ml_dtypes
import numpy as np
import pytest
import tvm
from conftest import kernel_error
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_twins import BLOCK, PagedSequence
from vulkan_device import DeviceKernel, found_device

from phi3c.errors import TargetError
from phi3c.kernels.cpu import CpuKernels, layout
from phi3c.kernels.cpu.decode_attention import CHUNK as DECODE_CHUNK
from phi3c.kernels.cpu.decode_attention import SPLIT as DECODE_SPLIT
from phi3c.kernels.cpu.isa import NEON_I8MM, PORTABLE, Isa
from phi3c.kernels.cpu.parallel import SERIAL_LONG_ROWS, SERIAL_ROWS
from phi3c.kernels.cpu.prefill_attention import CHUNK as PREFILL_CHUNK
from phi3c.kernels.cpu.prefill_attention import QUERY_TILE
from phi3c.kernels.gpu import GpuKernels
from phi3c.runtime.host import _linux_cpu_flags
from phi3c.runtime.token_tree import token_tree
from phi3c.targets import parse_target

# float32 sums of a few hundred terms, as a share of the largest value.
TOLERANCE = 2e-6
ATTENTION_TOLERANCE = 1e-5


def registers(isa: Isa) -> tuple[int, ...]:
    """What these kernels ask of an instruction set: two that agree in it are built alike."""
    return isa.lanes, isa.linear_rows, isa.linear_panels, isa.attention_rows


def runnable() -> dict[str, tuple[Isa, tvm.target.Target | None]]:
    """Name → (instruction set, TVM target or None: emulated): the host's own, every lesser one."""
    have = _linux_cpu_flags()
    found = {}
    for name in ("cpu", "cpu:x86-64-v4", "cpu:x86-64-v3", "cpu:x86-64-v2"):
        try:
            target = parse_target(name)
        except TargetError:
            continue  # a CPU of another architecture
        if have is None or set(target.cpu_flags) <= have:
            isa = target.kernels.isa
            found.setdefault(registers(isa), (isa, target.tvm_target))
    found.setdefault(registers(PORTABLE), (PORTABLE, parse_target("cpu").tvm_target))
    if not aarch64.missing:
        found.setdefault(registers(NEON_I8MM), (NEON_I8MM, None))
    return {isa.name: (isa, target) for isa, target in found.values()}


TARGETS = runnable()


@pytest.fixture(params=list(TARGETS))
def isa(request) -> str:
    return request.param


VULKAN = ["vulkan"] if found_device() else []


@pytest.fixture(params=[*TARGETS, *VULKAN])
def place(request) -> str:
    """An instruction set, or a GPU."""
    return request.param


@cache
def compiled(isa: str, kernel: str, *args):
    """The kernel of CpuKernels, or for "vulkan" of GpuKernels, compiled alone."""
    if isa == "vulkan":
        return DeviceKernel(getattr(GpuKernels("float32"), kernel)(*args))
    instruction_set, target = TARGETS[isa]
    func = getattr(CpuKernels(instruction_set), kernel)(*args)
    if target is None:
        return aarch64.EmulatedKernel(func, instruction_set)
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=target)["main"]


def run(kernel, *inputs, out_shape: tuple[int, ...]) -> np.ndarray:
    """Calls with TVM copies of numpy inputs and an output full of NaN; returns the output."""
    out = tvm.runtime.tensor(np.full(out_shape, np.nan, np.float32))
    kernel(*[tvm.runtime.tensor(x) if isinstance(x, np.ndarray) else x for x in inputs], out)
    return out.numpy()


def check(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Every value written, and within `tolerance` of the largest expected one."""
    assert found.shape == expected.shape
    assert kernel_error(found, expected) <= tolerance


def normal(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def int32(*values) -> np.ndarray:
    return np.array(values, np.int32)


# Instruction sets and layouts


def test_the_host_and_the_portable_instruction_set_are_tested():
    assert {parse_target("cpu").kernels.isa.name, PORTABLE.name} <= set(TARGETS)


@pytest.mark.parametrize("out_features", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("in_features", [1, 7, 20])
def test_panels_are_what_the_twins_read_and_unpack_again(out_features, in_features):
    weight = normal(0, out_features, in_features, dtype="float16")
    panels = layout.pack_panels(weight)
    assert panels.shape == layout.panel_shape(out_features, in_features)
    assert panels.flags.c_contiguous and panels.dtype == weight.dtype
    np.testing.assert_array_equal(twins.unpacked(panels, out_features), weight)
    np.testing.assert_array_equal(layout.unpack_panels(panels, out_features), weight)
    padding = twins.unpacked(panels, panels.shape[0] * BLOCK)[out_features:]
    assert not padding.any()


# Weights


LINEARS = [  # out, in, weight dtype, residual
    (1, 20, "float32", False),
    (15, 33, "float16", True),
    (16, 1, "float32", True),
    (17, 64, "float16", False),
    (32, 7, "float32", False),
    (64, 48, "float16", True),
    (100, 3, "float32", True),
    (100, 36, "float16", False),
    (17, 33, "uint16", True),
    (64, 48, "uint16", False),
]


def weight_panels(seed: int, out: int, in_: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """A random weight's panels as a kernel of `dtype` reads them, and as values."""
    weight = normal(seed, out, in_)
    if dtype != "uint16":
        panels = layout.pack_panels(weight.astype(dtype))
        return panels, panels
    rounded = weight.astype(ml_dtypes.bfloat16)
    values = layout.pack_panels(rounded.astype(np.float32))
    return layout.pack_panels(rounded.view(np.uint16)), values


@pytest.mark.parametrize(("out", "in_", "dtype", "residual"), LINEARS)
def test_linear(isa, out, in_, dtype, residual):
    kernel = compiled(isa, "linear", out, in_, dtype, residual)
    panels, values = weight_panels(1, out, in_, dtype)
    tile = TARGETS[isa][0].linear_rows
    for rows in (1, 2, tile - 1, tile, tile + 1, 3 * tile + 2):
        x = normal(rows, rows, in_)
        extra = [normal(2, rows, out)] if residual else []
        found = run(kernel, x, panels, *extra, out_shape=(rows, out))
        check(found, twins.linear(x, values, out, *extra))


def test_linear_of_no_rows_writes_nothing(isa):
    kernel = compiled(isa, "linear", 17, 64, "float16", False)
    panels = layout.pack_panels(normal(1, 17, 64, dtype="float16"))
    x = np.zeros((0, 64), np.float32)
    assert run(kernel, x, panels, out_shape=(0, 17)).shape == (0, 17)


def test_linear_keeps_a_row_apart_from_its_neighbours(isa):
    kernel = compiled(isa, "linear", 17, 64, "float16", False)
    panels = layout.pack_panels(normal(1, 17, 64, dtype="float16"))
    rows = TARGETS[isa][0].linear_rows * 2 + 1
    x = normal(3, rows, 64)
    alone = run(kernel, x, panels, out_shape=(rows, 17))
    x[1] = np.nan
    beside = run(kernel, x, panels, out_shape=(rows, 17))
    assert np.isnan(beside[1]).all()
    np.testing.assert_array_equal(np.delete(beside, 1, 0), np.delete(alone, 1, 0))


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint16"])
@pytest.mark.parametrize("vocab", [15, 16, 100])
@pytest.mark.parametrize("hidden", [4, 36])
def test_embedding(isa, vocab, hidden, dtype):
    panels, values = weight_panels(4, vocab, hidden, dtype)
    for n in (1, 5):
        ids = np.random.default_rng(n).integers(0, vocab, n).astype(np.int32)
        ids[0] = vocab - 1
        found = run(
            compiled(isa, "embedding", vocab, hidden, dtype), ids, panels, out_shape=(n, hidden)
        )
        np.testing.assert_array_equal(found, twins.embedding(ids, values))


# Rows


@pytest.mark.parametrize("hidden", [4, 36])
def test_take_rows_and_last_row(isa, hidden):
    x = normal(5, 7, hidden)
    for positions in (int32(6), int32(0, 6, 3, 3)):
        shape = (len(positions), hidden)
        found = run(compiled(isa, "take_rows", hidden), x, positions, out_shape=shape)
        np.testing.assert_array_equal(found, twins.take_rows(x, positions))
    for rows in (x, x[:1]):
        found = run(compiled(isa, "last_row", hidden), rows, out_shape=(1, hidden))
        np.testing.assert_array_equal(found, twins.last_row(rows))


@pytest.mark.parametrize("hidden", [4, 20, 36, 64, 96])
def test_rms_norm(isa, hidden):
    weight = normal(6, hidden)
    for rows in (1, 2, SERIAL_ROWS, SERIAL_ROWS + 1):
        x = normal(rows, rows, hidden) * 10.0 ** np.arange(-3, rows - 3).clip(-3, 4)[:, None]
        x = x.astype(np.float32)
        found = run(compiled(isa, "rms_norm", hidden, 1e-5), x, weight, out_shape=(rows, hidden))
        check(found, twins.rms_norm(x, weight, 1e-5))


def test_rms_norm_of_zeros_is_zero(isa):
    kernel = compiled(isa, "rms_norm", 36, 1e-5)
    found = run(kernel, np.zeros((2, 36), np.float32), normal(6, 36), out_shape=(2, 36))
    assert not found.any()


# 2064 and 4100 take more than one task a row, at lanes of 16 and of 4.
@pytest.mark.parametrize("size", [1, 4, 20, 36, 96, 2064, 4100])
def test_silu_mul(isa, size):
    for rows in (1, 2, 9):
        x = normal(rows, rows, 2 * size) * 4
        found = run(compiled(isa, "silu_mul", size), x, out_shape=(rows, size))
        check(found, twins.silu_mul(x))


def test_silu_mul_far_from_zero(isa):
    gate = [0.0, -0.0, 1e-30, -80.0, -87.0, -88.0, -200.0, -1e4, 80.0, 88.0, 200.0, 1e4, 1e30]
    gate_up = np.array([gate + [1.0, -2.0, 0.5, 1.0, 1.0] * 2 + [1.0, 1.0, 1.0]], np.float32)
    found = run(compiled(isa, "silu_mul", 13), gate_up, out_shape=(1, 13))
    np.testing.assert_allclose(found, twins.silu_mul(gate_up), rtol=1e-6, atol=1e-30)


# Rotary embedding

ROPES = [  # heads, kv heads, head_dim, rotary_dim, page dtype
    (2, 2, 16, 16, "float32"),
    (4, 2, 20, 20, "float16"),
    (3, 1, 64, 48, "float32"),
    (2, 1, 96, 96, "float16"),
    (4, 1, 128, 96, "float16"),
    (1, 1, 20, 6, "float32"),
]


def inverse_frequencies(rotary_dim: int) -> np.ndarray:
    """Two sets, `[2, rotary_dim/2]`, clearly different."""
    short = 10000.0 ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.stack([short, short / np.linspace(1, 9, rotary_dim // 2)]).astype(np.float32)


@pytest.mark.parametrize("rotary_dim", [6, 16, 96])
def test_rope_table(isa, rotary_dim):
    frequencies = inverse_frequencies(rotary_dim)
    positions = int32(0, 1, 2, 1000, 4095, 4096, 131071, 5)
    factor_set = int32(0, 1, 0, 1, 0, 1, 1, 1)
    for n in (1, 8):
        found = run(
            compiled(isa, "rope_table", rotary_dim, 1.19),
            positions[:n],
            factor_set[:n],
            frequencies,
            out_shape=(n, rotary_dim),
        )
        check(found, twins.rope_table(positions[:n], factor_set[:n], frequencies, 1.19))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "rotary_dim", "dtype"), ROPES)
def test_rope_append(isa, heads, kv_heads, head_dim, rotary_dim, dtype):
    kernel = compiled(isa, "rope_append", heads, kv_heads, head_dim, rotary_dim, dtype)
    frequencies = inverse_frequencies(rotary_dim)
    for n in (1, 2, SERIAL_LONG_ROWS, SERIAL_LONG_ROWS + 1, 18):
        rng = np.random.default_rng(n)
        qkv = normal(n, n, (heads + 2 * kv_heads) * head_dim)
        positions, sets = rng.integers(0, 500, n), rng.integers(0, 2, n)
        table = twins.rope_table(positions, sets, frequencies, 1.2).astype(np.float32)
        slots = rng.permutation(5 * BLOCK)[:n].astype(np.int32)
        before = np.full((5, 2, kv_heads, head_dim * BLOCK), np.nan, dtype)
        pages = tvm.runtime.tensor(before)
        q = run(kernel, qkv, table, slots, pages, out_shape=(n, heads * head_dim))
        expected_q, expected_pages = twins.rope_append(
            qkv, table, slots, before, heads, kv_heads, head_dim
        )
        check(q, expected_q)
        found = pages.numpy()
        # Only the named slots are written: NaN stays where it was.
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected_pages))
        rounding = 1e-3 if dtype == "float16" else 1e-6
        np.testing.assert_allclose(found, expected_pages, rtol=rounding, atol=rounding)


# The paged cache


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 16), (2, 20), (3, 96)])
def test_copy_slots_copies_in_order(place, kv_heads, head_dim, dtype):
    kernel = compiled(place, "copy_slots", kv_heads, head_dim, dtype)
    before = normal(7, 4, 2, kv_heads, head_dim * BLOCK, dtype=dtype)
    rng = np.random.default_rng(8)
    for source, target in [
        ([5], [5]),
        ([17, 18, 19], [16, 17, 18]),  # compaction: a target that was a source
        ([0, 1, 2], [1, 2, 3]),  # slot 0 goes all the way
        (rng.integers(0, 64, 40), rng.integers(0, 64, 40)),
    ]:
        pages = tvm.runtime.tensor(before)
        kernel(pages, tvm.runtime.tensor(int32(*source)), tvm.runtime.tensor(int32(*target)))
        np.testing.assert_array_equal(pages.numpy(), twins.copy_slots(before, source, target))


@dataclass(frozen=True)
class Shape:
    """What an attention kernel is compiled for; `window` None: none."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    window: int | None

    @property
    def key(self) -> tuple:
        return (self.heads, self.kv_heads, self.head_dim, self.dtype, self.window)


SHAPES = {
    "mha-16": Shape(4, 4, 16, "float32", None),
    "gqa-20-window-7": Shape(6, 2, 20, "float16", 7),
    "mqa-64-window-16": Shape(8, 1, 64, "float32", 16),
    "mha-96": Shape(2, 2, 96, "float16", None),
    "gqa-128-window-17": Shape(4, 2, 128, "float32", 17),
    "window-1": Shape(2, 1, 16, "float16", 1),
    "window-past-the-context": Shape(2, 1, 16, "float32", 1000),
}


@pytest.fixture(params=list(SHAPES))
def shape(request) -> Shape:
    return SHAPES[request.param]


def sequences_of(parts, window: int | None, seed: int) -> tuple[list[PagedSequence], int]:
    """(length, parents, may blocks be dropped) → sequences on permuted blocks, and their number.

    Dropped are all the blocks that no new token's window reaches; every third block is unused.
    """
    starts, counts = [], []
    for length, parents, drops in parts:
        unseen = length - window + 1 if drops and window else 0
        starts.append(max(0, unseen) // BLOCK * BLOCK)
        counts.append(-(-(length + len(parents) - starts[-1]) // BLOCK))
    num_blocks = sum(counts) * 3 // 2 + 1
    blocks = iter(np.random.default_rng(seed).permutation(num_blocks).tolist())
    sequences = [
        PagedSequence(length, tuple(parents), start, tuple(next(blocks) for _ in range(count)))
        for (length, parents, _), start, count in zip(parts, starts, counts, strict=True)
    ]
    return sequences, num_blocks


def filled_pages(shape: Shape, sequences: list[PagedSequence], num_blocks: int, seed: int):
    """Random keys and values in the sequences' slots, NaN everywhere else."""
    pages = np.full((num_blocks, 2, shape.kv_heads, shape.head_dim * BLOCK), np.nan, shape.dtype)
    rng = np.random.default_rng(seed)
    for sequence in sequences:
        for index in range(sequence.start, sequence.length + len(sequence.parents)):
            for view in twins.keys_and_values(pages, sequence.slot(index)):
                view[:] = rng.standard_normal(view.shape)
    return pages


def indptr(counts) -> np.ndarray:
    return int32(0, *np.cumsum(counts))


def run_decode(place: str, shape: Shape, q, pages, sequences) -> np.ndarray:
    """Calls the kernel with the tensors that describe `sequences`."""
    return run(
        compiled(place, "decode_attention", *shape.key),
        q,
        pages,
        indptr([len(s.blocks) for s in sequences]),
        int32(*(b for s in sequences for b in s.blocks)),
        int32(*(s.start for s in sequences)),
        int32(*(s.length for s in sequences)),
        out_shape=q.shape,
    )


def run_prefill(place: str, shape: Shape, q, pages, sequences) -> np.ndarray:
    """Calls the kernel with the tensors that describe `sequences`."""
    trees = [token_tree(s.parents) for s in sequences]
    positions = [s.length + t.depth for s, t in zip(sequences, trees, strict=True)]
    return run(
        compiled(place, "prefill_attention", *shape.key),
        q,
        pages,
        indptr([t.size for t in trees]),
        indptr([len(s.blocks) for s in sequences]),
        int32(*(b for s in sequences for b in s.blocks)),
        int32(*(s.start for s in sequences)),
        int32(*(s.length for s in sequences)),
        np.concatenate(positions).astype(np.int32),
        np.concatenate([t.enter for t in trees]),
        np.concatenate([t.leave for t in trees]),
        out_shape=q.shape,
    )


def check_attention(run_kernel, place, shape: Shape, parts, seed: int = 0, scale: float = 1.0):
    """A kernel against the twin, on random queries `scale` times as large as usual."""
    sequences, num_blocks = sequences_of(parts, shape.window, seed)
    pages = filled_pages(shape, sequences, num_blocks, seed)
    n = sum(len(s.parents) for s in sequences)
    q = normal(seed + 1, n, shape.heads * shape.head_dim)
    q *= np.float32(scale * np.log2(np.e) / np.sqrt(shape.head_dim))
    found = run_kernel(place, shape, q, pages, sequences)
    expected = twins.attention(q, pages, sequences, shape.window, shape.head_dim)
    check(found, expected, ATTENTION_TOLERANCE * max(1.0, scale))


def chain(n: int) -> list[int]:
    return list(range(-1, n - 1))


def random_tree(rng: np.random.Generator, n: int) -> list[int]:
    return [int(rng.integers(-1, i)) for i in range(n)]


EDGES = [0, 1, 14, 15, 16, 17, 30, 31, 32, 33]


def test_decode_attention_at_block_edges(place, shape):
    check_attention(run_decode, place, shape, [(n, [-1], n % 2) for n in EDGES])


@pytest.mark.parametrize("drops", [False, True])
def test_decode_attention_over_many_blocks(place, shape, drops):
    keys = DECODE_CHUNK * BLOCK
    lengths = [keys - 2, keys - 1, keys, 3, 2 * keys + 5]
    check_attention(run_decode, place, shape, [(n, [-1], drops) for n in lengths], seed=1)


def test_decode_attention_of_contexts_in_parts(place, shape):
    part = DECODE_SPLIT * BLOCK
    lengths = [part - 1, part, 3, 2 * part - 1, 2 * part + BLOCK + 5]
    check_attention(run_decode, place, shape, [(n, [-1], n % 2) for n in lengths], seed=4)
    check_attention(run_decode, place, shape, [(lengths[-1], [-1], False)], seed=5)


def test_decode_attention_of_one_sequence(place, shape):
    for length in (0, 5, 40):
        check_attention(run_decode, place, shape, [(length, [-1], True)], seed=length)


def test_prefill_attention_from_nothing(place, shape):
    lengths = [1, 15, 16, 17, QUERY_TILE - 1, QUERY_TILE, QUERY_TILE + 1, 2 * QUERY_TILE + 3]
    check_attention(run_prefill, place, shape, [(0, chain(n), False) for n in lengths])


def test_prefill_attention_at_block_edges(place, shape):
    parts = [(old, chain(new), old % 2) for old in EDGES for new in (1, 2)]
    check_attention(run_prefill, place, shape, parts, seed=1)


@pytest.mark.parametrize("drops", [False, True])
def test_prefill_attention_over_many_blocks(place, shape, drops):
    keys = PREFILL_CHUNK * BLOCK
    parts = [
        (keys, chain(QUERY_TILE + 5), drops),
        (0, chain(3), drops),
        (2 * keys - 1, chain(1), drops),
        (keys + 9, chain(2 * QUERY_TILE), drops),
    ]
    check_attention(run_prefill, place, shape, parts, seed=2)


def test_prefill_attention_of_trees_beside_chains(place, shape):
    rng = np.random.default_rng(3)
    parts = [
        (0, [-1, -1, 0, 0, 1, 4, 2], False),
        (20, chain(9), True),
        (37, random_tree(rng, QUERY_TILE + 9), True),
        (15, [-1] * 5, False),
        (90, random_tree(rng, 18), True),
    ]
    check_attention(run_prefill, place, shape, parts, seed=4)


@pytest.mark.parametrize("run_kernel", [run_decode, run_prefill])
@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4, 1e8])
def test_attention_with_tiny_and_huge_scores(place, run_kernel, scale):
    """Scores of many thousands, of both signs: one key takes all, nothing overflows."""
    shape = SHAPES["mha-16"]
    sequences, num_blocks = sequences_of([(200, [-1], False), (3, [-1], False)], None, 5)
    pages = filled_pages(shape, sequences, num_blocks, 5)
    # Whole numbers: float32 scores are exact, so that kernel and twin agree on the largest.
    pages = np.round(pages * 4)
    q = np.round(normal(6, 2, shape.heads * shape.head_dim) * 4) * np.float32(scale)
    found = run_kernel(place, shape, q, pages, sequences)
    expected = twins.attention(q, pages, sequences, None, shape.head_dim)
    check(found, expected, ATTENTION_TOLERANCE * max(1.0, min(scale, 100.0)))


@pytest.mark.parametrize("run_kernel", [run_decode, run_prefill])
def test_attention_where_every_score_is_very_negative(place, run_kernel):
    """Far below what a score can be, yet not taken for the −1e30 of masked keys."""
    shape = SHAPES["mha-16"]
    sequences, num_blocks = sequences_of([(70, [-1], False)], None, 7)
    pages = filled_pages(shape, sequences, num_blocks, 7)
    pages[:, 0] = np.where(np.isnan(pages[:, 0]), np.nan, 1)
    q = np.full((1, shape.heads * shape.head_dim), -1e20, np.float32)
    found = run_kernel(place, shape, q, pages, sequences)
    expected = twins.attention(q, pages, sequences, None, shape.head_dim)
    check(found, expected, ATTENTION_TOLERANCE)  # equal scores: the mean of the values


def test_decode_and_prefill_attention_agree_on_one_token(place, shape):
    parts = [(n, [-1], True) for n in EDGES + [150]]
    sequences, num_blocks = sequences_of(parts, shape.window, 8)
    pages = filled_pages(shape, sequences, num_blocks, 8)
    q = normal(9, len(parts), shape.heads * shape.head_dim)
    decode = run_decode(place, shape, q, pages, sequences)
    check(run_prefill(place, shape, q, pages, sequences), decode, ATTENTION_TOLERANCE)


def parts_of_trees():
    """Lists of (length, parents, drops) with a few dozen new tokens in all."""
    tree = st.lists(st.integers(0, 2**20), min_size=1, max_size=12).map(
        lambda numbers: [number % (i + 1) - 1 for i, number in enumerate(numbers)]
    )
    new = st.one_of(tree, st.integers(1, 40).map(chain))
    return st.lists(st.tuples(st.integers(0, 70), new, st.booleans()), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(parts=parts_of_trees(), seed=st.integers(0, 2**16), name=st.sampled_from(list(SHAPES)))
@pytest.mark.parametrize("place_name", [*TARGETS, *VULKAN])
def test_prefill_attention_of_any_sequences(place_name, parts, seed, name):
    check_attention(run_prefill, place_name, SHAPES[name], parts, seed)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
    name=st.sampled_from(list(SHAPES)),
)
@pytest.mark.parametrize("place_name", [*TARGETS, *VULKAN])
def test_decode_attention_of_any_sequences(place_name, lengths, seed, name):
    parts = [(n, [-1], bool((seed >> i) % 2)) for i, n in enumerate(lengths)]
    check_attention(run_decode, place_name, SHAPES[name], parts, seed)
