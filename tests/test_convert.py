"""Weights converted alone and reused, and what the disk and the memory must hold."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import phi3c
from phi3c.artifact import MANIFEST, PARAMETERS, WEIGHTS_MANIFEST, ConvertedWeights
from phi3c.config import Phi3Config
from phi3c.errors import ArtifactError, CheckpointError, InputError, OutOfMemoryError, SchemeError
from phi3c.kernels.cpu import layout
from phi3c.memory import kv_bytes, memory
from phi3c.output_folder import check_space, new_folder
from phi3c.packing import packed_parameters, parameter_specs
from phi3c.quantization.group import GroupedRows, GroupQuantization
from phi3c.quantization.scheme import SCHEMES, cast, parse_scheme
from phi3c.runtime import host
from phi3c.targets import parse_target
from phi3c.verify import check_integrity
from phi3c.weights import Checkpoint, RandomWeights, Weights

TOY = Path(__file__).parent.parent / "examples" / "toy" / "checkpoint"
KERNELS = parse_target("cpu").kernels
CONFIG = replace(
    Phi3Config.from_file(Path(__file__).parent.parent / "configs" / "tiny.json"),
    vocab_size=131,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=1,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=32,
    rope_scaling=None,
)
COMPILE = dict(max_batch_size=2, context_length=64, prefill_chunk_size=16)


def converted(weights: Weights, config: Phi3Config, name: str) -> dict[str, np.ndarray]:
    """Parameter → packed array."""
    scheme = parse_scheme(name)
    specs = parameter_specs(config, scheme, KERNELS)
    arrays = packed_parameters(specs, weights, KERNELS, scheme, lambda done, total: None)
    return {spec[0]: array for spec, array in zip(specs, arrays, strict=True)}


@pytest.fixture(scope="module")
def toy_weights(tmp_path_factory) -> ConvertedWeights:
    return phi3c.convert(TOY, output=tmp_path_factory.mktemp("convert") / "weights")


@pytest.fixture
def copied(toy_weights, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(toy_weights.path, tmp_path / "weights"))


# Pack, lay out, and back


@pytest.mark.parametrize("name", [s.name for s in SCHEMES])
def test_what_is_laid_out_comes_back_exactly(name):
    """Parameters, made in blocks, hold what numpy keeps of the whole tensor."""
    scheme, weights = parse_scheme(name), RandomWeights(CONFIG, 3)
    parameters = converted(weights, CONFIG, name)
    for tensor, shape in weights.shapes.items():
        whole, kind = weights.tensor(tensor), scheme.kind(tensor)
        if len(shape) == 1:
            np.testing.assert_array_equal(parameters[tensor], whole)
        elif isinstance(kind, GroupQuantization):
            q, scale = kind.quantize(whole)
            words, scales = parameters[f"{tensor}.q"], parameters[f"{tensor}.scale"]
            np.testing.assert_array_equal(layout.unpack_groups(words, kind.bits, shape[0]), q)
            np.testing.assert_array_equal(layout.unpack_scales(scales, shape[0]), scale)
        else:
            plain = layout.unpack_panels(parameters[tensor], shape[0])
            expected = cast(whole, kind)
            np.testing.assert_array_equal(plain.view(expected.dtype), expected)


def test_large_tensors_are_made_in_blocks_and_only_a_few_ahead(monkeypatch):
    monkeypatch.setattr("phi3c.packing._BLOCK_VALUES", 2048)
    asked = []

    class Counted(RandomWeights):
        def rows(self, name, start, stop):
            asked.append((name, start, stop))
            return super().rows(name, start, stop)

    whole = converted(RandomWeights(CONFIG, 0), CONFIG, "q0f32")
    scheme = parse_scheme("q0f32")
    specs = parameter_specs(CONFIG, scheme, KERNELS)
    arrays = packed_parameters(specs, Counted(CONFIG, 0), KERNELS, scheme, lambda done, total: None)
    first = next(arrays)
    assert 9 <= len(asked) <= 9 + 4 * (os.cpu_count() or 1)  # 131 rows, 16 at a time, and ahead
    for spec, array in zip(specs, [first, *arrays], strict=True):
        np.testing.assert_array_equal(array, whole[spec[0]])


class Grouped(Weights):
    """A source that stores every matrix in groups of 32, `bits` wide."""

    def __init__(self, config: Phi3Config, bits: int, scale_dtype: str = "float16"):
        super().__init__(config)
        self._bits, self._dtype = bits, scale_dtype

    def rows(self, name, start, stop):
        shape = self.shapes[name]
        if len(shape) == 1:
            return np.ones(stop - start, np.float32)
        rng = np.random.default_rng(len(name))
        half = 2 ** (self._bits - 1)
        q = rng.integers(-half, half, shape).astype(np.int8)
        scale = rng.standard_normal((shape[0], shape[1] // 32)).astype(self._dtype)
        return GroupedRows(q[start:stop], scale[start:stop])


@pytest.mark.parametrize(
    ("bits", "name"),
    [(4, "q4f16_1"), (4, "q4f32_1"), (4, "q4f16_hq"), (4, "q8f16_1"), (8, "q8f16_1")],
)
def test_blocks_of_a_source_are_taken_over_exactly(bits, name):
    scheme, weights = parse_scheme(name), Grouped(CONFIG, bits)
    parameters = converted(weights, CONFIG, name)
    for tensor, shape in weights.shapes.items():
        if len(shape) == 2:
            kind = scheme.kind(tensor)
            q = layout.unpack_groups(parameters[f"{tensor}.q"], kind.bits, shape[0])
            scale = layout.unpack_scales(parameters[f"{tensor}.scale"], shape[0])
            np.testing.assert_array_equal(kind.dequantize(q, scale), weights.tensor(tensor))


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (8, GroupQuantization(4, 32, "float16")),  # too many levels
        (4, GroupQuantization(4, 64, "float16")),  # other groups
        (4, GroupQuantization(3, 32, "float16")),
    ],
)
def test_blocks_that_do_not_fit_are_rounded_again(rows, kind):
    source = Grouped(CONFIG, rows).rows("model.layers.0.mlp.gate_up_proj.weight", 0, 5)
    source = replace(source, q=source.q[:, :64], scale=source.scale[:, :2])
    q, scale = kind.quantize(source)
    expected = kind.quantize(source.values())
    np.testing.assert_array_equal(q, expected[0])
    np.testing.assert_array_equal(scale, expected[1])


def test_scales_that_the_scheme_would_round_are_not_taken_over():
    source = GroupedRows(np.full((1, 32), 5, np.int8), np.array([[1 / 3]], np.float32))
    q, scale = GroupQuantization(8, 32, "float16").quantize(source)
    back = GroupQuantization(8, 32, "float16").dequantize(q, scale)
    assert not np.array_equal(scale.astype(np.float32), source.scale)
    np.testing.assert_allclose(back, 5 / 3, rtol=1e-3)


def test_a_searched_scale_is_never_worse():
    rng = np.random.default_rng(0)
    rows = np.concatenate(
        [
            rng.standard_normal((500, 64)),
            rng.standard_t(3, (500, 64)),
            np.zeros((1, 64)),
            np.eye(1, 64),
            -np.eye(1, 64),
            np.full((1, 64), 1e-7),  # scales that vanish in float16 lose the group, no more
        ]
    ).astype(np.float32)
    plain, searched = (GroupQuantization(4, 32, "float16", search) for search in (False, True))
    errors = []
    for kind in (plain, searched):
        q, scale = kind.quantize(rows)
        assert q.max() < 16 and np.isfinite(scale).all()
        errors.append(((kind.dequantize(q, scale) - rows) ** 2).sum(axis=1))
    assert (errors[1] <= errors[0] * 1.02 + 1e-9).all()  # float16 scales
    assert errors[1][:500].sum() < 0.73 * errors[0][:500].sum()


def test_a_weight_beyond_float16_is_one_line(tmp_path):
    class Huge(RandomWeights):
        def rows(self, name, start, stop):
            return super().rows(name, start, stop) * np.float32(1e30)

    for name in ("q4f16_1", "q4f16_hq", "q0f16"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(SchemeError, match="beyond the float16 of"):
                converted(Huge(CONFIG, 0), CONFIG, name)


# Weights alone


def test_compiling_converted_weights_gives_the_same_artifact(toy_weights, tmp_path):
    direct = phi3c.compile(TOY, output=tmp_path / "direct", **COMPILE)
    reused = phi3c.compile(toy_weights.path, output=tmp_path / "reused", **COMPILE)
    names = sorted(p.name for p in direct.path.iterdir())
    assert names == sorted(p.name for p in reused.path.iterdir())
    for name in names:
        assert (direct.path / name).read_bytes() == (reused.path / name).read_bytes()
    assert (reused.path / PARAMETERS).samefile(toy_weights.parameters)  # one copy on the disk
    again = phi3c.compile(direct.path, output=tmp_path / "again", **COMPILE | {"max_batch_size": 3})
    assert again.manifest.parameters == direct.manifest.parameters
    assert again.manifest.limits.max_batch_size == 3


def test_converted_weights_are_copied_where_links_are_not_possible(
    toy_weights, tmp_path, monkeypatch
):
    def no_link(*_):
        raise OSError("not on this disk")

    monkeypatch.setattr(os, "link", no_link)
    reused = phi3c.convert(toy_weights.path, output=tmp_path / "reused")
    assert reused.parameters.read_bytes() == toy_weights.parameters.read_bytes()
    assert not reused.parameters.samefile(toy_weights.parameters)


def test_converted_weights_fit_one_scheme(toy_weights, tmp_path):
    with pytest.raises(SchemeError, match="found 'q8f16_1'; accepted: q4f16_1, which .*weights"):
        phi3c.compile(toy_weights.path, quantization="q8f16_1", output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_changed_weights_are_not_compiled(copied, tmp_path):
    data = bytearray((copied / PARAMETERS).read_bytes())
    data[-1000] ^= 4
    (copied / PARAMETERS).write_bytes(data)
    with pytest.raises(ArtifactError, match="params.safetensors: .*: changed: sha256"):
        phi3c.compile(copied, output=tmp_path / "x", **COMPILE)
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_converted_weights_are_no_checkpoint(toy_weights, tmp_path):
    from phi3c.sources import resolve_source

    with pytest.raises(CheckpointError, match="converted weights; accepted: a checkpoint"):
        resolve_source(toy_weights.path).weights()
    with pytest.raises(ArtifactError, match="not a compiled artifact: it has no manifest.json"):
        phi3c.load(toy_weights.path)


# Integrity


def test_every_file_is_checked(copied):
    assert check_integrity(copied).files == len(list(copied.iterdir()))
    for file in sorted(copied.iterdir()):
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for broken in (bytes(flipped), whole[:-2], whole + b"\0"):
            file.write_bytes(broken)
            with pytest.raises(ArtifactError, match=str(file)) as error:
                check_integrity(copied)
            assert "\n" not in str(error.value)
        file.write_bytes(whole)
    (copied / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="tokenizer.json: cannot be read"):
        check_integrity(copied)


def test_a_changed_parameter_is_named(copied):
    info = ConvertedWeights.open(copied).manifest.parameters[5]
    array = ConvertedWeights.open(copied).map_parameters()[info.name]
    at = (copied / PARAMETERS).read_bytes().index(array.tobytes())
    with open(copied / PARAMETERS, "r+b") as file:
        file.seek(at)
        file.write(bytes([array.tobytes()[0] ^ 128]))
    with pytest.raises(ArtifactError, match=f"{info.name}: changed"):
        check_integrity(copied)


# The disk


def test_a_disk_that_is_too_small_is_found_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(Checkpoint, "rows", None)
    for make in (phi3c.convert, phi3c.compile):
        with pytest.raises(ArtifactError, match=r"x: needs 6.* MB of disk; found 1.00 MB free"):
            make(TOY, output=tmp_path / "deep" / "x")
    assert not list(tmp_path.iterdir())
    check_space(tmp_path / "x", 10**6)


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent does with it
from phi3c.weights import Checkpoint
rows = Checkpoint.rows
def slow(self, name, start, stop):
    print("reading", flush=True)
    time.sleep(0.5)
    return rows(self, name, start, stop)
Checkpoint.rows = slow
from phi3c.cli import main
sys.exit(main(["convert", sys.argv[1], "-o", sys.argv[2]]))
"""


def start_slow(output: Path) -> subprocess.Popen:
    """`phi3c convert` of the toy, in the middle of its work."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(TOY), str(output)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("reading")
    return process


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_conversion_that_is_asked_to_stop_leaves_nothing(tmp_path, sent):
    process = start_slow(tmp_path / "out")
    process.send_signal(sent)
    assert process.wait(120) == 128 + sent
    assert not list(tmp_path.iterdir())


def test_a_killed_conversion_leaves_nothing_for_long(tmp_path):
    output = tmp_path / "out"
    process = start_slow(output)
    process.kill()
    process.wait(120)
    assert not output.exists() and len(list(tmp_path.iterdir())) == 1  # half-written, hidden
    phi3c.convert(TOY, output=output)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    check_integrity(output)


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    output = tmp_path / "out"
    process = start_slow(output)
    with new_folder(output) as folder:
        (folder / "a").touch()
        assert len(list(tmp_path.iterdir())) == 2
    process.terminate()
    process.wait(120)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_working_folder_is_no_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="output is or holds the working folder"):
        phi3c.convert(TOY, output=".")
    with pytest.raises(ArtifactError, match="working folder"):
        phi3c.convert(TOY, output="..")


# The memory


@pytest.fixture(scope="module")
def toy_artifact(toy_weights, tmp_path_factory):
    return phi3c.compile(toy_weights.path, output=tmp_path_factory.mktemp("a") / "toy", **COMPILE)


def test_memory_is_what_is_mapped_and_allocated(toy_artifact):
    need = memory(toy_artifact.manifest, 100)
    assert need.weights == sum(a.nbytes for a in toy_artifact.map_parameters().values())
    cache = phi3c.load(toy_artifact.path).create_paged_kv_cache(max_total_seq_len=100, page_size=32)
    pages = sum(page.numpy().nbytes for page in cache.pages)
    assert pages == kv_bytes(toy_artifact.manifest.kv_layout, 100, 32)
    assert need.kv_cache == pages * 112 // 128
    assert need.total == need.weights + need.kv_cache + need.workspace + need.adapters
    assert need.workspace >= 16 * 2 * 512 * 4  # gate_up of a chunk


def test_what_the_machine_cannot_hold_is_not_loaded(toy_artifact, monkeypatch):
    need = memory(toy_artifact.manifest, 0)
    monkeypatch.setattr(host, "available_memory", lambda: need.total - 1)
    with pytest.raises(
        OutOfMemoryError, match=r"needs .* of memory \(weights .*, workspace .*\); found .* MB"
    ):
        phi3c.load(toy_artifact.path)
    monkeypatch.setattr(host, "available_memory", lambda: need.total)
    model = phi3c.load(toy_artifact.path)
    with pytest.raises(
        OutOfMemoryError,
        match=r"KV cache for 10000000 tokens: needs 7.68 GB of memory \(pages 7.68",
    ):
        model.create_paged_kv_cache(max_total_seq_len=10_000_000)
    with pytest.raises(OutOfMemoryError, match="weights"):  # together they do not fit
        model.create_paged_kv_cache(max_total_seq_len=100)
    with pytest.raises(InputError):
        model.create_paged_kv_cache(max_total_seq_len=0)


def test_available_memory_is_the_least_of_machine_and_container(tmp_path, monkeypatch):
    assert host._cgroup_available(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert host._cgroup_available(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 100\ninactive_file 150\n")
    assert host._cgroup_available(tmp_path) == 550
    for machine, group, least in ((5, None, 5), (5, 3, 3), (5, 9, 5), (None, 4, 4)):
        monkeypatch.setattr(host, "_linux_available", lambda m=machine: m)
        monkeypatch.setattr(host, "_cgroup_available", lambda g=group: g)
        assert host.available_memory() == least


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_the_parameters_stay_in_the_file(toy_artifact):
    """Mapped, not read: the pages belong to the file, and every process shares them."""
    model = phi3c.load(toy_artifact.path)
    maps = Path("/proc/self/maps").read_text()
    assert str(toy_artifact.parameters) in maps
    first = next(iter(model._mapped.values()))
    assert isinstance(first.base, np.memmap) or isinstance(first, np.memmap)


# The command line


def phi3c_command(*argv: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "phi3c", *map(str, argv)], capture_output=True, text=True
    )


def test_commands(tmp_path):
    start = time.time()
    done = phi3c_command("convert", TOY, "-o", tmp_path / "w", "--quantization", "q4f16_hq")
    assert done.returncode == 0 and "q4f16_hq" in done.stdout, done.stderr
    assert (tmp_path / "w" / WEIGHTS_MANIFEST).stat().st_mtime >= start - 1
    done = phi3c_command("compile", tmp_path / "w", "-o", tmp_path / "a")
    assert done.returncode == 0 and "q4f16_hq" in done.stdout, done.stderr
    done = phi3c_command("verify", "--integrity", tmp_path / "w")
    assert done.returncode == 0 and "every file is what was written" in done.stdout
    done = phi3c_command("verify", tmp_path / "w")
    assert done.returncode == 2 and "--integrity" in done.stderr
    with open(tmp_path / "w" / PARAMETERS, "ab") as file:
        file.write(b"x")
    done = phi3c_command("verify", "--integrity", tmp_path / "w")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert not (tmp_path / "w" / MANIFEST).exists()
