"""Models compiled for Macs, here: no part of them can run. What the same kernels compute is tested
on Vulkan (test_vulkan.py); here is what TVM makes of them for Metal, and the files for a Mac."""

from __future__ import annotations

import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import macho
import metal_source
import pytest
import tvm
from conftest import make_checkpoint
from tvm.script import tirx as T

import phi3c
from phi3c import cli, linker, metal
from phi3c.artifact import Artifact
from phi3c.compiler import compile_library
from phi3c.config import Phi3Config
from phi3c.device_code import device_code
from phi3c.errors import ArtifactError, TargetError
from phi3c.kernels.root import hand_scheduled
from phi3c.link import link
from phi3c.manifest import Limits
from phi3c.metal import MetalKernel, checked, collected, kernels_of
from phi3c.pipeline import kernel_lowering
from phi3c.quantization.scheme import parse_scheme
from phi3c.readiness import readiness
from phi3c.targets import parse_target

ROOT = Path(__file__).parent.parent
TOY = ROOT / "examples" / "toy" / "checkpoint"
CPU = "cpu:apple-m1:arm64-apple-macos"
CASES = [("toy", "q4f16_1"), ("tiny", "q0f16"), ("tiny", "q0f32")]

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="a Mac links")
needs_linker = pytest.mark.skipif(
    linker._zig("arm64-apple-macos") is None and linker._clang("arm64-apple-macos") is None,
    reason="neither ziglang nor clang with ld64.lld is installed",
)


@pytest.fixture(scope="module")
def unlinked(tmp_path_factory):
    """unlinked(model, quantization, target) → its artifact with objects, made once."""
    made: dict[tuple, Artifact] = {}
    tiny = tmp_path_factory.mktemp("tiny")
    make_checkpoint(tiny)

    def get(model: str, quantization: str, target: str = "metal") -> Artifact:
        key = (model, quantization, target)
        if key not in made:
            with pytest.MonkeyPatch.context() as patch:
                no_linker(patch)
                source = TOY if model == "toy" else tiny
                folder = tmp_path_factory.mktemp("metal") / "artifact"
                phi3c.compile(source, target, quantization, folder, max_loras=2)
                made[key] = Artifact.open(folder)
        return made[key]

    return get


def no_linker(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(linker, "_zig", lambda triple: None)
    patch.setattr(linker, "_clang", lambda triple: None)


def copied(artifact: Artifact, folder: Path) -> Artifact:
    folder.mkdir()
    for file in artifact.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return Artifact.open(folder)


# The kernels


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_kernel_is_there_and_within_the_limits(unlinked, case):
    artifact = unlinked(*case)
    sources, needs = metal_source.sources_of(artifact), artifact.manifest.target.needs
    assert metal_source.launched_by(artifact.library) == set(sources)
    assert len(sources) == needs.kernels > 30
    assert needs.threads <= 256
    assert needs.shared_bytes == max(s.shared_bytes for s in sources.values()) <= 32768
    for source in sources.values():
        assert source.buffers == list(range(len(source.buffers))) and len(source.buffers) <= 31
        assert "blockIdx" in source.text and "threadIdx" in source.text


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_sources_are_what_metal_takes(unlinked, case):
    """Metal 2.3, which has no bfloat; threadgroup memory in the scope of the kernel; barriers that
    all threads reach; no index of 64 bits, no lane of another simdgroup, no number without end."""
    for source in metal_source.sources_of(unlinked(*case)).values():
        assert not [n for n in source.nested("threadgroup ") if n.startswith("threadgroup ")]
        assert not [
            n for n in source.nested("barrier(") if not n.rpartition(" in ")[2][:3] == "for"
        ]
        for word in ("bfloat", "long", "simd_", "INFINITY", "NAN", "double"):
            assert word not in source.text, (source.name, word)


@pytest.mark.parametrize("quantization", ["q4f16_1", "q0f16"])
def test_all_of_phi3_mini(quantization, tmp_path):
    config = Phi3Config.from_file(ROOT / "configs" / "phi-3-mini-4k.json")
    scheme, library = parse_scheme(quantization), tmp_path / "model.tar"
    limits = Limits(8, 4096, 512)
    needs = compile_library(config, scheme, parse_target("metal"), limits, library).needs
    sources = metal_source.parse_blob(metal_source.code_of(library))
    assert metal_source.launched_by(library) == set(sources)
    assert len(sources) == needs.kernels > 30
    assert needs.threads <= 256 and needs.shared_bytes <= 32768
    assert any("simdgroup_multiply_accumulate(" in source.text for source in sources.values())


@pytest.mark.skipif(metal_source.COMPILER is None, reason="no C++ compiler is installed")
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_sources_are_cpp(unlinked, case, tmp_path):
    """Against a stub of Metal's library: a variable named `new` got as far as here once."""
    assert metal_source.compiler_errors(metal_source.sources_of(unlinked(*case)), tmp_path) == ""


def test_the_check_of_sources_sees_what_is_wrong(unlinked, tmp_path):
    sources = metal_source.sources_of(unlinked("toy", "q4f16_1"))
    one = sources["rms_norm_kernel"]
    wrong = {
        "reserved": one.text.replace("inverse", "new"),
        "unknown": one.text.replace("sqrt", "rsqrt_of"),
        "barrier": one.text.replace(
            "  threadgroup_barrier", "  if (blockIdx) {\nthreadgroup_barrier"
        ),
    }
    for text in list(wrong.values())[: 2 if metal_source.COMPILER else 0]:
        source = metal_source.MetalSource(one.name, text)
        assert "error" in metal_source.compiler_errors({one.name: source}, tmp_path)
    assert metal_source.MetalSource(one.name, wrong["barrier"]).nested("barrier(")
    assert metal_source.MetalSource(one.name, one.text).shared_bytes == 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"threads": 1025},
            "the kernel k: found 1025 threads in a threadgroup; accepted: up to 1024",
        ),
        ({"shared_bytes": 32772}, "found 32772 bytes of threadgroup memory; accepted: up to 32768"),
        ({"buffers": 31}, "found 32 buffers; accepted: up to 31"),
        ({"buffers": 32, "plain": 0}, "found 32 buffers; accepted: up to 31"),
    ],
)
def test_a_kernel_beyond_the_limits_is_refused(change, message):
    most = dict(buffers=30, plain=3, threads=1024, shared_bytes=32768)
    assert checked(MetalKernel("k", **most))
    assert checked(MetalKernel("k", **most | {"buffers": 31, "plain": 0}))
    with pytest.raises(TargetError, match=message):
        checked(MetalKernel("k", **most | change))


def kernel(threads: int, shared: int):
    """x `[n]`, in each workgroup the other way round, by way of shared memory."""

    @T.prim_func(private=True, s_tir=True)
    def func(x: T.handle, out: T.handle):
        n = T.int64()
        X = T.match_buffer(x, (n,), "float16")
        Y = T.match_buffer(out, (n,), "float16")
        for i in T.thread_binding(n // threads, thread="blockIdx.x"):
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                S = T.alloc_buffer((shared,), "float32", scope="shared")
                for j in T.serial(shared // threads):
                    S[j * threads + tx] = T.Cast("float32", X[i * threads + tx])
                Y[i * threads + tx] = T.Cast("float16", S[threads - 1 - tx])

    return hand_scheduled(func).with_attr("global_symbol", "mirrored")


def built(function) -> str:
    with kernel_lowering("metal"):
        module = tvm.IRModule({"mirrored": function})
        (device,) = tvm.compile(module, target=parse_target("metal").tvm_target).mod.imports
    return device.inspect_source()


def test_what_a_kernel_asks_for_is_read_off_its_code():
    with collected() as functions:
        assert "long" not in built(kernel(64, 128))
    assert kernels_of(functions) == [MetalKernel("mirrored_kernel", 2, 1, 64, 512)]
    assert "long" in built(kernel(64, 128)), "TVM's own way, outside"
    assert len(functions) == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (kernel(2048, 2048), "mirrored_kernel: found 2048 threads"),
        (kernel(64, 9024), "mirrored_kernel: found 36096 bytes of threadgroup memory"),
    ],
)
def test_such_a_kernel_is_refused(function, message):
    with device_code(parse_target("metal")) as made:
        built(function)
    with pytest.raises(TargetError, match=message):
        made.needs()


def test_such_a_kernel_is_refused_by_compile(monkeypatch, tmp_path):
    monkeypatch.setattr(metal, "SHARED_BYTES", 64)
    with pytest.raises(TargetError, match="metal: the kernel .*bytes of threadgroup memory"):
        phi3c.compile(TOY, "metal", "q0f16", tmp_path / "made")
    assert not (tmp_path / "made").exists()


# The files


def check_objects(artifact: Artifact) -> None:
    with tarfile.open(artifact.library) as archive:
        objects = [macho.parse(archive.extractfile(entry).read()) for entry in archive]
    assert {(o.cpu, o.kind) for o in objects} == {(macho.ARM64, macho.OBJECT)}
    defined = frozenset().union(*(o.defined for o in objects))
    assert "__tvm_ffi__library_bin" in defined
    assert {"__tvm_ffi_rms_norm", "__tvm_ffi_decode_attention"} <= defined


@pytest.mark.parametrize("target", ["metal", CPU])
def test_without_a_linker_there_are_objects(unlinked, target, capsys):
    artifact = unlinked("tiny", "q0f32", target)
    assert artifact.library.name == "model.tar" and not artifact.linked
    assert artifact.manifest.target.mtriple == "arm64-apple-macos"
    assert (artifact.manifest.target.needs is None) == (target == CPU)
    check_objects(artifact)
    artifact.check_integrity()
    with pytest.raises(ArtifactError, match=r"model.tar: objects .* run `phi3c link .*` on a Mac"):
        phi3c.load(artifact.path)


def test_the_same_objects_again(unlinked, tmp_path, monkeypatch, capsys):
    no_linker(monkeypatch)
    out = tmp_path / "out"
    options = ["--quantization", "q4f16_1", "--max-loras", "2"]
    assert cli.main(["compile", str(TOY), "--target", "metal", "-o", str(out), *options]) == 0
    assert f"model.tar: not linked yet: run `phi3c link {out}` on a Mac" in capsys.readouterr().out
    again, before = Artifact.open(out), unlinked("toy", "q4f16_1")
    assert again.manifest == before.manifest
    assert again.library.read_bytes() == before.library.read_bytes()
    command = ["compile", str(TOY), "--target", "metal", "-o", str(out), *options, "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["linked"] is False
    assert cli.main(["link", str(out)]) == 2
    assert "found no clang with ld64.lld" in capsys.readouterr().err


def test_changed_objects_are_not_linked(unlinked, tmp_path, monkeypatch):
    artifact = copied(unlinked("tiny", "q0f32"), tmp_path / "copy")
    data = bytearray(artifact.library.read_bytes())
    data[600] ^= 1
    artifact.library.write_bytes(data)
    monkeypatch.setattr(linker, "_zig", lambda triple: pytest.fail)
    with pytest.raises(ArtifactError, match="model.tar: changed"):
        link(artifact.path)


def test_link_puts_the_library_in_place(unlinked, tmp_path, monkeypatch, capsys):
    """By a linker that notes what it is given."""
    artifact = copied(unlinked("tiny", "q0f32"), tmp_path / "copy")

    def note(output, objects):
        Path(output).write_text("\n".join(Path(o).name for o in objects))
        assert all(macho.parse(Path(o).read_bytes()).kind == macho.OBJECT for o in objects)

    monkeypatch.setattr(linker, "_clang", lambda triple: None)
    monkeypatch.setattr(linker, "_zig", lambda triple: note)
    assert cli.main(["link", str(artifact.path), "--json"]) == 0
    library = Path(json.loads(capsys.readouterr().out)["library"])
    assert library.name == "model.so" and library.read_text().splitlines() == ["lib0.o", "devc.o"]
    linked = Artifact.open(artifact.path)
    linked.check_integrity()
    assert linked.linked and not (artifact.path / "model.tar").exists()
    with pytest.raises(ArtifactError, match="linked already; accepted: an artifact with a model"):
        link(artifact.path)
    with pytest.raises(ArtifactError, match="compiled for arm64-apple-macos; this machine is"):
        phi3c.load(artifact.path)


def test_a_link_that_fails_leaves_the_objects(unlinked, tmp_path, monkeypatch):
    artifact = copied(unlinked("tiny", "q0f32"), tmp_path / "copy")

    def fail(output, objects):
        raise RuntimeError("no")

    monkeypatch.setattr(linker, "_clang", lambda triple: fail)
    with pytest.raises(RuntimeError):
        link(artifact.path)
    Artifact.open(artifact.path).check_integrity()
    assert not Artifact.open(artifact.path).linked


@needs_linker
@pytest.mark.parametrize("target", ["metal", CPU])
def test_the_library(unlinked, tmp_path, target):
    artifact = link(copied(unlinked("tiny", "q0f32", target), tmp_path / "copy").path)
    found = macho.parse(artifact.library.read_bytes())
    assert (found.cpu, found.kind, found.platform) == (macho.ARM64, macho.DYLIB, 1)
    pool = {"phi3c_parallel_launch", "phi3c_set_threads", "phi3c_end_workers"}
    assert {"__tvm_ffi__library_bin", "__tvm_ffi_rms_norm", *pool} <= found.defined
    # Of TVM's runtime and of the system.
    assert {"pthread_create", "__ulock_wait"} <= found.undefined
    if target == "metal":
        before = metal_source.sources_of(unlinked("tiny", "q0f32"))
        assert metal_source.sources_of(artifact) == before
    again = link(copied(unlinked("tiny", "q0f32", target), tmp_path / "again").path)
    assert again.library.read_bytes() == artifact.library.read_bytes()


# Targets


def test_the_target():
    place = parse_target("metal")
    assert (place.device, place.mtriple) == ("metal", "arm64-apple-macos")
    assert place.tvm_target.kind.name == "metal"
    # Of the kernels that Vulkan has, all but those of simdgroup matrices.
    assert replace(place.kernels, matrix="none") == parse_target("vulkan").kernels
    for name in ("metal:0", "Metal", "metal:apple-m1"):
        with pytest.raises(TargetError, match=f"found '{name}'; accepted: cpu, .*metal"):
            parse_target(name)


def test_readiness_says_what_links_for_a_mac(monkeypatch):
    no_linker(monkeypatch)
    (found,) = (one for one in readiness() if one.target == "metal")
    assert (found.lowers, found.links, found.devices) == (True, False, ())
    assert "pip install ziglang" in found.missing[0] and "only a Mac has one" in found.missing[1]
    monkeypatch.setattr(linker, "_zig", lambda triple: lambda output, objects: None)
    (found,) = (one for one in readiness() if one.target == "metal")
    assert found.links and len(found.missing) == 1
