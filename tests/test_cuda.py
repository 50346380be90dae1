"""The CUDA target, without a GPU: what a library carries is machine code, and all of it."""

from __future__ import annotations

import base64
import re
import zlib
from pathlib import Path

import pytest
import tvm

import phi3c
from phi3c.compiler import compile_library
from phi3c.config import Phi3Config
from phi3c.cuda import carrier, nvrtc
from phi3c.errors import ArtifactError, DeviceError, TargetError
from phi3c.manifest import Limits
from phi3c.quantization.scheme import parse_scheme
from phi3c.targets import parse_target

ROOT = Path(__file__).parent.parent
CARRIED = re.compile(rb"// phi3c: a fat binary, deflated, in base64\n([A-Za-z0-9+/=]+)")
no_gpu = pytest.mark.skipif(tvm.cuda().exist, reason="there is a GPU")

pytestmark = pytest.mark.skipif(
    nvrtc.missing() is not None, reason="NVIDIA's compiler is not installed"
)


def fat_binary(library: Path) -> bytes:
    """What the library carries, read without our own code."""
    data = library.read_bytes()
    found = CARRIED.findall(data)
    assert len(found) == 1
    assert b"__global__" not in data, "a source as well"
    return zlib.decompress(base64.b64decode(found[0]))


def launched(library: Path) -> set[str]:
    """The kernels that the host's code asks TVM for, by their names in the library."""
    return set(re.findall(rb"\b\w+_kernel(?:_\d+)?\b", library.read_bytes()))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> phi3c.Artifact:
    folder = tmp_path_factory.mktemp("cuda") / "tiny"
    return phi3c.compile(
        ROOT / "configs" / "tiny.json", "cuda:sm_90", "q4f16_1", folder, max_loras=2
    )


def test_a_library_carries_machine_code_of_every_kernel(artifact):
    code, needs = fat_binary(artifact.library), artifact.manifest.target.needs
    assert (needs.arch, needs.code_bytes) == ("sm_90", len(code))
    assert code.count(b"\x7fELF") >= 1
    kernels = launched(artifact.library)
    assert len(kernels) >= needs.kernels
    missing = {name for name in kernels if name not in code}
    assert not missing
    assert 32 <= needs.threads <= 256 and 0 < needs.shared_bytes <= 48 * 1024


def test_another_architecture_has_other_code(artifact, tmp_path):
    other = phi3c.compile(
        ROOT / "configs" / "tiny.json", "cuda", "q0f16", tmp_path / "tiny", max_batch_size=2
    )
    assert other.manifest.target.needs.arch == "sm_80"
    assert fat_binary(other.library) != fat_binary(artifact.library)


@pytest.mark.parametrize(("target", "quantization"), [("cuda:sm_90", "q4f16_1"), ("cuda", "q0f16")])
def test_all_of_phi3_mini(tmp_path, target, quantization):
    config = Phi3Config.from_file(ROOT / "configs" / "phi-3-mini-4k.json")
    place = parse_target(target)
    scheme = parse_scheme(quantization).on(place.device)
    made = compile_library(config, scheme, place, Limits(8, 4096, 512), tmp_path / "model.so")
    assert made.needs.kernels == 36
    assert made.needs.threads <= 256 and made.needs.shared_bytes <= 48 * 1024


def test_the_loader_unpacks_what_is_carried(artifact):
    code = fat_binary(artifact.library)
    assert carrier.fat_binary_of(carrier.carried(code)) == code
    assert carrier.fat_binary_of('extern "C" __global__ void f() {}') is None


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


# Bad input


@pytest.mark.parametrize("name", ["cuda:sm_70", "cuda:sm_90a", "cuda:", "cuda:90"])
def test_unknown_architectures_are_refused(name):
    with pytest.raises(TargetError, match=rf"target: found '{name}'; accepted: cuda, .*sm_90"):
        parse_target(name)


def test_more_parts_than_an_architecture_are_refused():
    with pytest.raises(TargetError, match="target: found 'cuda:sm_90:x'"):
        parse_target("cuda:sm_90:x")


@no_gpu
def test_a_gpu_that_is_not_there_is_named(artifact):
    with pytest.raises(TargetError, match="found 'cuda:native', but no GPU with CUDA"):
        parse_target("cuda:native")
    with pytest.raises(DeviceError, match="device: found cuda:0; accepted: an NVIDIA GPU that is"):
        phi3c.load(artifact.path)
    with pytest.raises(DeviceError, match="device: found cuda:3"):
        phi3c.load(artifact.path, device="cuda:3")


def test_changed_machine_code_is_noticed(artifact, tmp_path):
    other = tmp_path / "changed"
    other.mkdir()
    for file in artifact.path.iterdir():
        if file.is_file():
            (other / file.name).write_bytes(file.read_bytes())
    data = bytearray((other / "model.so").read_bytes())
    place = CARRIED.search(data).start(1) + 100
    data[place] = ord("A") if data[place] != ord("A") else ord("B")
    (other / "model.so").write_bytes(data)
    with pytest.raises(ArtifactError, match="model.so"):
        phi3c.Artifact.open(other).check_integrity()


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(nvrtc, "_MODULES", ("cuda.bindings.nope",))
    with pytest.raises(
        TargetError, match=r"needs cuda.bindings.nope, .*pip install 'phi3c\[cuda\]'"
    ):
        nvrtc.compile_source("", "sm_90")
