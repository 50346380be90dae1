"""The CUDA target, without a GPU: the machine code of a library, and models that run by TVM's CUDA
runtime on a stub of the driver, their kernels emulated from the source (cuda_emulation.py)."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cuda_workout
import numpy as np
import pytest
import tvm
from cuda_device import found_gpu
from cuda_emulation import emulated, environment, stub_driver
from gpu_emulator import COMPILER
from tvm.script import tirx as T

import phi3c
from phi3c.compiler import compile_library
from phi3c.config import Phi3Config
from phi3c.cuda import codegen, graph, nvrtc, packing
from phi3c.errors import ArtifactError, DeviceError, TargetError
from phi3c.manifest import Limits
from phi3c.quantization.scheme import parse_scheme
from phi3c.targets import parse_target

ROOT = Path(__file__).parent.parent
TOY = ROOT / "examples" / "toy" / "checkpoint"
ADAPTERS = [ROOT / "examples" / "toy" / "adapters" / name for name in ("rotate", "down")]
OPTIONS = dict(max_batch_size=4, context_length=128, prefill_chunk_size=32)
CASES = {
    "sm_80": ("cuda", "q0f32", {}),
    "sm_90": ("cuda:sm_90", "q4f16_1", {"max_loras": 2, "max_rank": 32}),
}

pytestmark = [
    pytest.mark.skipif(nvrtc.missing() is not None, reason="NVIDIA's compiler is not installed"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


@dataclass(frozen=True)
class Compiled:
    arch: str
    artifact: phi3c.Artifact
    source: str  # CUDA's, of all kernels
    code: nvrtc.DeviceCode
    options: dict


@pytest.fixture(scope="module", params=CASES)
def toy(request, tmp_path_factory) -> Compiled:
    """The toy model; its folder has kernels.so beside the artifact."""
    target, quantization, more = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    seen: list[tuple[str, nvrtc.DeviceCode]] = []

    def keep(source: str, arch: str) -> nvrtc.DeviceCode:
        seen.append((source, nvrtc.compile_source(source, arch)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codegen, "compile_source", keep)
        made = phi3c.compile(TOY, target, quantization, folder / "artifact", **OPTIONS, **more)
    ((source, code),) = seen
    emulated(source, folder, last_first=request.param == "sm_90")
    return Compiled(request.param, made, source, code, more)


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    return stub_driver(tmp_path_factory.mktemp("driver"))


def run(program: str, *arguments: object, env: dict[str, str]) -> str:
    command = [sys.executable, str(Path(__file__).with_name(program)), *map(str, arguments)]
    env = env | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# What a library holds


def fat_binary(library: Path) -> tuple[bytes, bytes]:
    """What the library carries, and the rest of the library; read without our own code."""
    data = library.read_bytes()
    magic = struct.pack("<IH", 0xBA55ED50, 1)
    assert data.count(magic) == 1
    start = data.index(magic)
    header, size = struct.unpack_from("<HQ", data, start + 6)
    end = start + header + size
    return data[start:end], data[:start] + data[end:]


def kernels_of(code: bytes) -> set[str]:
    """By the sections of the ELF file in it."""
    cubin = code[code.index(b"\x7fELF") :]
    table, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 40)
    sections = [struct.unpack_from("<II16xQQ", cubin, table + size * i) for i in range(count)]
    strings = sections[names][2]
    found = [cubin[strings + s[0] :].split(b"\0", 1)[0].decode() for s in sections]
    return {name.removeprefix(".text.") for name in found if name.startswith(".text.")}


def test_a_library_holds_machine_code_of_the_kernels_that_are_launched(toy):
    code, rest = fat_binary(toy.artifact.library)
    needs = toy.artifact.manifest.target.needs
    assert needs.arch == toy.arch
    cubin = code[code.index(b"\x7fELF") :]
    machine, flags = struct.unpack_from("<H28xI", cubin, 18)
    assert machine == 190 and f"sm_{flags >> 8 & 0xFF}" == toy.arch
    launched = {name.decode() for name in re.findall(rb"\b\w+_kernel(?:_\d+)?\b", rest)}
    assert kernels_of(cubin) == launched and len(launched) == needs.kernels
    assert b"__global__" not in rest and b"fatbin" in rest


def test_every_kernel_has_threads_and_fits(toy):
    """None is a loop of the host's, or of one thread."""
    bounds = re.findall(r"__launch_bounds__\((\d+)\) (\w+)\(", toy.source)
    needs = toy.artifact.manifest.target.needs
    assert len(set(bounds)) == toy.source.count('extern "C" __global__') // 2 == needs.kernels
    assert min(int(threads) for threads, _ in bounds) >= 32
    bodies = re.split(r'^extern "C" __global__.*\{$', toy.source, flags=re.MULTILINE)[1:]
    assert all("threadIdx" in body for body in bodies)
    assert needs.threads <= 256 and needs.shared_bytes <= 48 * 1024
    assert max(kernel.spilled for kernel in toy.code.kernels) <= 16  # bytes of a thread
    threads = {name: int(count) for count, name in bounds}
    assert all(k.registers * threads[k.name] <= 65536 for k in toy.code.kernels)


def test_shuffles_are_of_whole_warps(toy):
    """Of all 32 threads, which then wait for each other; not of those that happen to be active."""
    assert "__activemask" not in toy.source and "0xffffffffu" in toy.source


def test_indices_are_of_32_bits(toy):
    kernels = toy.source[toy.source.index('extern "C"') :]
    assert "int64_t" not in kernels and "long" not in kernels


@pytest.mark.parametrize("quantization", ["q4f16_1", "q0f16"])
@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_90"])
def test_all_of_phi3_mini(tmp_path, target, quantization):
    config = Phi3Config.from_file(ROOT / "configs" / "phi-3-mini-4k.json")
    place = parse_target(target)
    scheme = parse_scheme(quantization)
    with codegen.collected(place.arch) as collected:
        made = compile_library(config, scheme, place, Limits(8, 4096, 512), tmp_path / "model.so")
    kernels = [kernel for code in collected.codes.values() for kernel in code.kernels]
    assert kernels_of(fat_binary(tmp_path / "model.so")[0]) == {kernel.name for kernel in kernels}
    assert made.needs.kernels == len(kernels)
    assert not [kernel for kernel in kernels if kernel.spilled]
    assert made.needs.threads <= 256 and made.needs.shared_bytes <= 48 * 1024


def test_outside_a_compilation_tvm_builds_as_ever(toy):
    """The function of TVM that was wrapped is one of other programs too."""

    @T.prim_func(s_tir=True)
    def add_one(a: T.handle):
        A = T.match_buffer(a, (64,), "float32")
        for t in T.thread_binding(64, thread="threadIdx.x"):
            A[t] = A[t] + T.float32(1)

    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90", "host": "llvm"})
    built = tvm.compile(tvm.IRModule({"main": add_one}), target=target)
    assert "__global__" in built.mod.imports[0].inspect_source("cuda")


def test_a_blob_that_we_did_not_compile_is_refused():
    module = struct.pack("<Q4sQQ3s", 4, b"cuda", 0, 3, b"abc")
    body = struct.pack("<3QQ", 2, 0, 0, 0)
    body += struct.pack("<Q4sQ", 4, b"cuda", len(module)) + module
    blob = struct.pack("<Q", len(body)) + body
    assert b"fatbin" in packing.compiled_blob(blob, {"abc": b"code"})
    with pytest.raises(KeyError, match="source was not compiled"):
        packing.compiled_blob(blob, {"ab": b"code"})


def test_a_source_that_does_not_compile_is_refused():
    with pytest.raises(TargetError, match="cuda:sm_90: NVRTC does not compile the kernels: .*nope"):
        nvrtc.compile_source("__global__ void f() { nope(); }", "sm_90")


def test_what_a_kernel_takes_is_told():
    source = 'extern "C" __global__ void f(float* a) {\n'
    source += "  __shared__ float s[64]; s[threadIdx.x] = a[threadIdx.x]; __syncthreads();\n"
    source += "  a[threadIdx.x] = s[63 - threadIdx.x]; }"
    code = nvrtc.compile_source(source, "sm_80")
    (kernel,) = code.kernels
    assert (kernel.name, kernel.shared_bytes, kernel.spilled) == ("f", 256, 0)
    assert kernel.registers > 0


# How it runs


def test_a_model_runs_as_on_the_cpu(toy, driver, tmp_path):
    """By TVM's runtime alone, without its compiler."""
    adapters = ADAPTERS if toy.options else []
    kernels = toy.artifact.path.parent / "kernels.so"
    env = environment(driver, "9.0 80", kernels) | {"TVM_USE_RUNTIME_LIB": "1"}
    run("cuda_workout.py", toy.artifact.path, tmp_path / "found.npy", *adapters, env=env)
    quantization = toy.artifact.manifest.quantization
    scheme = quantization if quantization.startswith("q0") else f"{quantization}:float"
    phi3c.compile(TOY, "cpu", scheme, tmp_path / "cpu", **OPTIONS, **toy.options)
    expected = cuda_workout.logits(tmp_path / "cpu", adapters)
    found = np.load(tmp_path / "found.npy")
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= (1e-5 if "f32" in quantization else 5e-3), error


def test_decode_steps_are_graphs(toy, driver):
    """With the results of launching kernel by kernel, to the bit."""
    assert graph._obstacle(toy.artifact.library) is None
    env = environment(driver, "9.0 80", toy.artifact.path.parent / "kernels.so")
    adapters = ADAPTERS[:1] if toy.options else []
    print(run("cuda_graphs.py", toy.artifact.path, *adapters, env=env))


def test_a_library_whose_kernels_allocate_is_not_captured(tmp_path):
    source, library = tmp_path / "old.cc", tmp_path / "old.so"
    source.write_text('extern "C" { void* __TVMBackendAllocWorkspace = 0; }')
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", library], check=True)
    assert "an older phi3c" in graph._obstacle(library)


@pytest.mark.parametrize("toy", ["sm_90"], indirect=True)
def test_devices_that_do_not_suffice_are_refused(toy, driver):
    """In a process that has a stub of a driver."""
    run("cuda_program.py", "devices", toy.artifact.path, env=environment(driver, "9.0 80"))


def test_a_machine_with_a_gpu_compiles_the_same_library(driver, tmp_path):
    for name, env in ("with.so", environment(driver, "9.0 80")), ("without.so", dict(os.environ)):
        run("cuda_program.py", "compile", tmp_path / name, env=env)
    assert (tmp_path / "with.so").read_bytes() == (tmp_path / "without.so").read_bytes()


# Bad input


def test_what_nvrtc_refuses_is_the_error_of_compile(monkeypatch, tmp_path):
    """Through TVM, which calls our function from C++."""

    def refuse(source, arch):
        raise TargetError(f"target: cuda:{arch}: NVRTC refuses")

    monkeypatch.setattr(codegen, "compile_source", refuse)
    config = ROOT / "configs" / "tiny.json"
    with pytest.raises(TargetError, match="cuda:sm_90: NVRTC refuses"):
        phi3c.compile(config, "cuda:sm_90", "q0f16", tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["cuda:sm_70", "cuda:sm_90a", "cuda:", "cuda:90"])
def test_unknown_architectures_are_refused(name):
    with pytest.raises(TargetError, match=rf"target: found '{name}'; accepted: cuda, .*sm_90"):
        parse_target(name)


def test_more_parts_than_an_architecture_are_refused():
    with pytest.raises(TargetError, match="target: found 'cuda:sm_90:x'"):
        parse_target("cuda:sm_90:x")


@pytest.mark.skipif(found_gpu(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(toy):
    with pytest.raises(TargetError, match="found 'cuda:native', but no GPU: cuda: found no driver"):
        parse_target("cuda:native")
    with pytest.raises(DeviceError, match="cuda: found no driver .* version 580 or later"):
        phi3c.load(toy.artifact.path)
    with pytest.raises(TargetError, match="device: found 'cpu'; accepted: cuda, cuda:<index>"):
        phi3c.load(toy.artifact.path, device="cpu")


def test_changed_machine_code_is_noticed(toy, tmp_path):
    other = tmp_path / "changed"
    other.mkdir()
    for file in toy.artifact.path.iterdir():
        if file.is_file():
            (other / file.name).write_bytes(file.read_bytes())
    data = bytearray((other / "model.so").read_bytes())
    data[data.index(b"\x7fELF", data.index(struct.pack("<I", 0xBA55ED50))) + 5000] ^= 1
    (other / "model.so").write_bytes(data)
    with pytest.raises(ArtifactError, match="model.so: changed"):
        phi3c.Artifact.open(other).check_integrity()


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(nvrtc, "_MODULES", ("cuda.bindings.nope",))
    with pytest.raises(
        TargetError, match=r"needs cuda.bindings.nope, .*pip install 'phi3c\[cuda\]'"
    ):
        nvrtc.compile_source("", "sm_90")


def test_missing_libraries_are_named(monkeypatch):
    """Of a package whose Python part is there."""
    from cuda.bindings import nvfatbin

    def absent():
        raise RuntimeError("not found")

    monkeypatch.setattr(nvfatbin, "version", absent)
    with pytest.raises(TargetError, match="needs the library nvfatbin, of NVIDIA's wheels"):
        nvrtc.compile_source("", "sm_90")
