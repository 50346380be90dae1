"""Target names, the kernels that each CPU gets, and the flags that its code needs."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest
from tvm.target import codegen

import phi3c
import phi3c.readiness as readiness_module
from phi3c import targets
from phi3c.describe import render_readiness
from phi3c.errors import ConfigError, DeviceError, TargetError
from phi3c.kernels.cpu.isa import (
    AVX2,
    AVX512,
    AVX512_VNNI,
    AVX_VNNI,
    NEON,
    NEON_DOTPROD,
    NEON_I8MM,
    PORTABLE,
    vector_lanes,
)
from phi3c.linker import find_linker
from phi3c.runtime.host import _linux_cpu_flags
from phi3c.targets import PORTABLE_VULKAN, parse_target
from phi3c.triple import architecture, runs_here
from phi3c.vulkan import VulkanDevice

on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="CPU names of x86"
)

X86, ARM = "x86_64-linux-gnu", "aarch64-linux-gnu"

CPUS = [
    ("x86-64", X86, PORTABLE),
    ("x86-64-v2", X86, PORTABLE),
    ("nehalem", X86, PORTABLE),
    ("sandybridge", X86, PORTABLE),  # AVX without FMA
    ("x86-64-v3", X86, AVX2),
    ("haswell", X86, AVX2),
    ("znver3", X86, AVX2),
    ("alderlake", X86, AVX_VNNI),
    ("x86-64-v4", X86, AVX512),
    ("skylake-avx512", X86, AVX512),
    ("znver4", X86, AVX512_VNNI),
    ("sapphirerapids", X86, AVX512_VNNI),
    ("generic", ARM, NEON),
    ("cortex-a53", ARM, NEON),
    ("cortex-a72", ARM, NEON),
    ("a64fx", ARM, NEON),
    ("cortex-a76", ARM, NEON_DOTPROD),
    ("neoverse-n1", ARM, NEON_DOTPROD),
    ("apple-m1", "arm64-apple-darwin", NEON_DOTPROD),
    ("neoverse-v1", ARM, NEON_I8MM),
    ("neoverse-n2", "aarch64-unknown-linux-gnu", NEON_I8MM),
    ("apple-m2", "arm64-apple-macos", NEON_I8MM),
    ("apple-m4", "arm64-apple-darwin24.1", NEON_I8MM),
]


def test_cpu_is_this_machine():
    target = parse_target("cpu")
    assert target.name == "cpu"
    assert target.mcpu == codegen.llvm_get_system_cpu()
    assert target.mtriple == codegen.llvm_get_system_triple()
    assert target.tvm_target.kind.name == "llvm"
    assert str(target.tvm_target.attrs["mcpu"]) == target.mcpu


def test_this_machine_has_the_flags_of_its_own_target():
    have = _linux_cpu_flags()
    if have is None:
        pytest.skip("this system does not list CPU flags")
    assert set(parse_target("cpu").cpu_flags) <= have


@pytest.mark.parametrize(("mcpu", "triple", "isa"), CPUS)
def test_a_named_cpu_gets_its_instruction_set(mcpu, triple, isa):
    target = parse_target(f"cpu:{mcpu}:{triple}")
    assert target.name == f"cpu:{mcpu}:{triple}"
    assert target.mcpu == str(target.tvm_target.attrs["mcpu"]) == mcpu
    assert target.mtriple == str(target.tvm_target.attrs["mtriple"]) == triple
    assert target.kernels.isa == isa


@on_x86
def test_a_cpu_without_a_triple_is_one_of_this_architecture():
    target = parse_target("cpu:znver4")
    assert (target.mcpu, target.mtriple) == ("znver4", codegen.llvm_get_system_triple())
    named = parse_target("cpu:znver4:x86_64-linux-gnu")
    assert (named.kernels, named.cpu_flags) == (target.kernels, target.cpu_flags)


@on_x86
def test_the_same_cpu_by_name_is_the_same_target():
    by_name = parse_target(f"cpu:{codegen.llvm_get_system_cpu()}")
    host = parse_target("cpu")
    assert (by_name.kernels, by_name.cpu_flags) == (host.kernels, host.cpu_flags)


@pytest.mark.parametrize(
    ("mcpu", "needed", "not_needed"),
    [
        ("x86-64", set(), {"sse4_2", "avx"}),
        ("x86-64-v2", {"sse4_2"}, {"avx"}),
        ("sandybridge", {"sse4_2", "avx"}, {"avx2", "fma"}),
        ("x86-64-v3", {"avx2", "fma", "f16c"}, {"avx512f"}),
        ("x86-64-v4", {"fma", "avx512f", "avx512bw", "avx512vl"}, {"avx512_bf16"}),
        ("znver4", {"avx512f", "avx512dq", "avx512_vnni", "avx512_bf16"}, {"avx_vnni"}),
        ("alderlake", {"avx2", "avx_vnni"}, {"avx512f"}),
        ("cortex-a72", {"asimd"}, {"asimddp", "atomics", "asimdhp"}),
        ("neoverse-n1", {"asimd", "asimddp", "asimdhp", "atomics"}, {"i8mm", "sve", "bf16"}),
        ("neoverse-v1", {"asimddp", "i8mm", "sve", "bf16", "fcma"}, {"sve2"}),
    ],
)
def test_cpu_flags_are_what_the_code_may_use(mcpu, needed, not_needed):
    triple = next(triple for name, triple, _ in CPUS if name == mcpu)
    flags = set(parse_target(f"cpu:{mcpu}:{triple}").cpu_flags)
    assert needed <= flags
    assert not not_needed & flags


# Extensions of vector and bit instructions that LLVM picks by itself when the CPU has them.
PICKED_BY_LLVM = {
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "popcnt": "popcnt",
    "movbe": "movbe",
    "avx512cd": "avx512cd",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512fp16": "avx512_fp16",
    "gfni": "gfni",
    "dotprod": "asimddp",
    "rdm": "asimdrdm",
    "fullfp16": "asimdhp",
    "fp16fml": "asimdfhm",
    "complxnum": "fcma",
    "sha3": "sha3",
    "sve": "sve",
    "sve2": "sve2",
}


@pytest.mark.parametrize(
    ("mcpu", "triple"),
    [(x86, X86) for x86 in ("x86-64-v2", "x86-64-v3", "x86-64-v4", "znver4", "cannonlake")]
    + [(arm, ARM) for arm in ("cortex-a76", "neoverse-v1", "neoverse-v2", "apple-m1")],
)
def test_every_extension_that_llvm_may_pick_is_asked_for(mcpu, triple):
    target = parse_target(f"cpu:{mcpu}:{triple}")
    features = {str(f) for f in codegen.llvm_get_cpu_features(target.tvm_target)}
    expected = {flag for feature, flag in PICKED_BY_LLVM.items() if feature in features}
    missing = expected - set(target.cpu_flags)
    assert not missing, f"code for {mcpu} may use {sorted(missing)}, and no load asks for them"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rocm", "target: found 'rocm'; accepted: cpu, cpu:<mcpu>"),
        ("", "target: found ''; accepted: cpu, cpu:<mcpu>"),
        ("cpu:", "target: found 'cpu:'; accepted: cpu, cpu:<mcpu>"),
        ("CPU", "target: found 'CPU'"),
        ("llvm -mcpu=znver4", "target: found 'llvm -mcpu=znver4'"),
        ("cpu:no-such-cpu", "with a CPU that LLVM knows"),
        ("cpu:znver4 -mattr=+avx", "with a CPU that LLVM knows"),
        ("cpu:znver4:x", "the triple 'x'; accepted: x86_64, aarch64 or arm64 with -linux-gnu"),
        ("cpu:generic:riscv64-linux-gnu", "with the triple 'riscv64-linux-gnu'; accepted"),
        ("cpu:generic:aarch64-nonsense", "with the triple 'aarch64-nonsense'; accepted"),
        ("cpu::aarch64-linux-gnu", "accepted: cpu, cpu:<mcpu>, cpu:<mcpu>:<triple>"),
        ("cpu:generic:aarch64-linux-gnu:x", "accepted: cpu, cpu:<mcpu>, cpu:<mcpu>:<triple>"),
        ("cpu:znver4:aarch64-linux-gnu", "a CPU that LLVM knows for aarch64-linux-gnu, such as"),
        ("cpu:neoverse-n1:x86_64-linux-gnu", "a CPU that LLVM knows for x86_64-linux-gnu"),
        ("cpu:neoverse-n11:aarch64-linux-gnu", "such as neoverse-n1"),
    ],
)
def test_an_unknown_target_is_refused(name, message):
    with pytest.raises(TargetError) as error:
        parse_target(name)
    assert message in str(error.value)


@on_x86
def test_a_misspelt_cpu_is_refused_with_its_neighbours():
    with pytest.raises(TargetError, match="found 'cpu:znver44'.*such as znver4"):
        parse_target("cpu:znver44")


@pytest.mark.parametrize("isa", [AVX512, AVX2, NEON_I8MM, NEON, PORTABLE])
def test_vector_lanes_divide_the_extent(isa):
    for extent in (1, 2, 4, 6, 12, 16, 20, 36, 48, 64, 96, 128):
        lanes = vector_lanes(isa, extent)
        assert extent % lanes == 0 and lanes <= isa.lanes
        assert lanes == isa.lanes or extent % (2 * lanes), "a wider vector divides it too"


@pytest.mark.parametrize("isa", [AVX512, AVX2, NEON_I8MM, NEON, PORTABLE])
def test_attention_rows_divide_the_query_tile(isa):
    from phi3c.kernels.cpu.prefill_attention import QUERY_TILE

    assert QUERY_TILE % isa.attention_rows == 0


# Machines


def test_a_triple_names_a_machine():
    assert architecture("arm64-apple-darwin") == architecture("aarch64-linux-gnu") == "aarch64"
    assert runs_here(codegen.llvm_get_system_triple())
    assert not runs_here("riscv64-linux-gnu")
    assert runs_here("x86_64-linux-gnu") + runs_here("aarch64-linux-gnu") <= 1
    assert runs_here("arm64-apple-darwin") + runs_here("aarch64-linux-gnu") <= 1


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("flags\t\t: fpu avx2 fma", {"fpu", "avx2", "fma"}),
        ("Features\t: fp asimd asimddp", {"fp", "asimd", "asimddp"}),
    ],
)
def test_cpu_flags_are_read_on_x86_and_on_aarch64(tmp_path, line, flags):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nBogoMIPS\t: 50\n{line}\n\nprocessor\t: 1\n{line}\n")
    assert _linux_cpu_flags(cpuinfo) == flags
    cpuinfo.write_text("processor : 0\n")
    assert _linux_cpu_flags(cpuinfo) is None
    assert _linux_cpu_flags(tmp_path / "nothing") is None


# A triple of another architecture than this machine's, on Linux, and the compilers for it.
FOREIGN = ARM if platform.machine() in ("x86_64", "AMD64") else X86


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """add(name): a program on the path, which holds no other and notes its arguments."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def add(name: str) -> None:
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" > "{tmp_path}/called"\n')
        program.chmod(0o755)

    return add


def linked_by(triple: str, folder) -> str:
    find_linker(parse_target(f"cpu:generic:{triple}"))(str(folder / "out.so"), ["in.o"])
    return (folder / "called").read_text()


@pytest.mark.skipif(not platform.system() == "Linux", reason="Linux's compilers")
def test_a_library_for_another_machine_is_linked_by_a_compiler_for_it(programs, tmp_path):
    with pytest.raises(
        TargetError, match=f"needs a compiler for {FOREIGN}; found none of {FOREIGN}-g.*apt install"
    ):
        find_linker(parse_target(f"cpu:generic:{FOREIGN}"))
    programs("clang")
    with pytest.raises(TargetError, match="clang with ld.lld"):
        find_linker(parse_target(f"cpu:generic:{FOREIGN}"))
    programs("ld.lld")
    assert f"--target={FOREIGN} -fuse-ld=lld" in linked_by(FOREIGN, tmp_path)
    programs(f"{FOREIGN}-gcc")
    vendor = FOREIGN.replace("-linux", "-unknown-linux")
    for triple in (FOREIGN, vendor):
        assert linked_by(triple, tmp_path).startswith(f"{FOREIGN}-gcc -shared")
    programs(f"{vendor}-g++")
    assert linked_by(vendor, tmp_path).startswith(f"{vendor}-g++ -shared")


@pytest.mark.skipif(not platform.system() == "Linux", reason="on macOS its own compiler does it")
def test_a_library_for_macos_is_linked_by_clang(programs, tmp_path, monkeypatch):
    monkeypatch.setattr("phi3c.linker._zig", lambda triple: None)
    with pytest.raises(TargetError, match="arm64-apple-macos; found no clang with ld64.lld"):
        find_linker(parse_target("cpu:apple-m1:arm64-apple-macos"))
    programs("clang")
    programs("ld64.lld")
    assert "-Wl,-undefined,dynamic_lookup" in linked_by("arm64-apple-macos", tmp_path)


def test_compile_finds_the_linker_before_it_reads_anything(programs, tmp_path):
    with pytest.raises(TargetError, match=f"needs a compiler for {FOREIGN}"):
        phi3c.compile("no/such/checkpoint", f"cpu:generic:{FOREIGN}", output=tmp_path / "out")


# Vulkan


def test_vulkan_is_the_same_on_every_machine(monkeypatch):
    expected = parse_target("vulkan").tvm_target
    monkeypatch.setattr(targets, "vulkan_devices", lambda: pytest.fail("asked for devices"))
    assert str(parse_target("vulkan").tvm_target) == str(expected)
    assert {name: expected.attrs[name] for name in PORTABLE_VULKAN} == PORTABLE_VULKAN
    assert "supports_int64" not in expected.attrs and "supports_float16" not in expected.attrs


DEVICE = VulkanDevice(
    index=0,
    name="some GPU",
    driver="some driver 1.2",
    api_version=(1, 3, 230),
    kind="discrete",
    shader_int8=True,
    shader_int16=False,
    shader_int64=True,
    shader_float16=True,
    shader_float64=False,
    storage_buffer_8bit=True,
    storage_buffer_16bit=True,
    push_descriptors=True,
    timestamps=True,
    subgroup_size=64,
    subgroup_operations=0xFF,
    max_storage_buffer_range=2**32 - 1,
    max_allocation=2**31,
    max_storage_buffers=2**20,
    max_shared_memory=65536,
    max_workgroup_invocations=1024,
    max_workgroup_size=(1024, 512, 64),
    max_workgroup_count=(2**31 - 1, 65535, 65535),
    max_push_constants=256,
    memory_bytes=2**34,
)


def test_a_vulkan_device_grants_what_it_has(monkeypatch):
    poor = replace(DEVICE, index=1, storage_buffer_16bit=False, max_workgroup_invocations=128)
    monkeypatch.setattr(targets, "vulkan_devices", lambda: [DEVICE, poor])
    native = parse_target("vulkan:native")
    assert (native.name, native.device) == ("vulkan:native", "vulkan")
    portable = parse_target("vulkan")
    assert (native.kernels, native.mcpu) == (portable.kernels, portable.mcpu)
    attributes = native.tvm_target.attrs
    names = ("int8", "int16", "int64", "float16", "float64", "8bit_buffer", "16bit_buffer")
    granted = [bool(attributes[f"supports_{name}"]) for name in names]
    assert granted == [True, False, True, True, False, True, True]
    sizes = {
        "max_num_threads": 1024,
        "max_threads_per_block": 1024,
        "max_block_size_x": 1024,
        "max_block_size_y": 512,
        "max_block_size_z": 64,
        "max_shared_memory_per_block": 65536,
        "max_push_constants_size": 256,
        "max_storage_buffer_range": 2**32 - 1,
        "max_per_stage_descriptor_storage_buffer": 2**20,
        "supported_subgroup_operations": 0xFF,
        "vulkan_api_version": 1 << 22 | 3 << 12 | 230,
        "thread_warp_size": 1,  # TVM's; not the subgroup's
    }
    assert {name: int(attributes[name]) for name in sizes} == sizes
    first, second = parse_target("vulkan:0"), parse_target("vulkan:1")
    assert str(first.tvm_target) == str(native.tvm_target)
    assert not second.tvm_target.attrs["supports_16bit_buffer"]
    for name in ("vulkan:2", "vulkan:99"):
        with pytest.raises(
            TargetError, match=f"'{name}'; accepted: a device .*: vulkan:0 .some GP"
        ):
            parse_target(name)
    for name in ("vulkan:", "vulkan:x", "vulkan:-1", "vulkan:0:1", "vulkan:native:x"):
        with pytest.raises(TargetError, match=f"target: found '{name}'; accepted: .*vulkan:native"):
            parse_target(name)


def test_a_device_that_cannot_run_the_kernels_is_refused_at_compile_time(monkeypatch, tmp_path):
    config = Path(__file__).parent.parent / "configs" / "tiny.json"
    for change, scheme, message in (
        ({"storage_buffer_16bit": False}, "q0f16", "kernel .*: found storage_buffer_16bit; accept"),
        ({"max_workgroup_invocations": 128}, "q0f32", "kernel .*: found 256 threads in a workgro"),
        ({"max_shared_memory": 1024}, "q0f32", "kernel .*: found .* bytes of shared memory; acce"),
    ):
        device = replace(DEVICE, **change)
        monkeypatch.setattr(targets, "vulkan_devices", lambda device=device: [device])
        with pytest.raises(TargetError, match=message):
            phi3c.compile(config, "vulkan:native", scheme, tmp_path / "made")
        assert not (tmp_path / "made").exists()


def test_no_vulkan_device_is_named(monkeypatch):
    monkeypatch.setattr(targets, "vulkan_devices", list)
    with pytest.raises(
        TargetError, match="'vulkan:native'; accepted: .* none, as no driver is ins"
    ):
        parse_target("vulkan:native")

    def none():
        raise DeviceError("vulkan: found no Vulkan loader")

    monkeypatch.setattr(targets, "vulkan_devices", none)
    with pytest.raises(
        TargetError, match="'vulkan:0', but no device: vulkan: found no Vulkan load"
    ):
        parse_target("vulkan:0")


def test_readiness_lists_the_vulkan_devices(monkeypatch):
    def vulkan() -> readiness_module.Readiness:
        (found,) = (one for one in readiness_module.readiness() if one.target == "vulkan")
        return found

    monkeypatch.setattr(readiness_module, "load_runtime", lambda: None)
    monkeypatch.setattr(readiness_module, "tvm_has_vulkan", lambda: False)
    monkeypatch.setattr(readiness_module, "devices", lambda: [DEVICE, replace(DEVICE, index=1)])
    found = vulkan()
    assert found.lowers and found.missing == ()
    named = "(some GPU, driver some driver 1.2)"
    assert found.devices == (f"vulkan:0 {named}", f"vulkan:1 {named}")
    assert f"         vulkan:1 {named}" in render_readiness([found]).splitlines()
    monkeypatch.setattr(readiness_module, "devices", list)
    found = vulkan()
    assert found.devices == () and "vulkan: found no device" in found.missing[0]


@pytest.mark.parametrize("value", [0, 65536])
def test_rows_fit_on_an_axis_of_workgroups(tmp_path, value):
    config = Path(__file__).parent.parent / "configs" / "tiny.json"
    with pytest.raises(ConfigError, match="prefill_chunk_size: found .*integer from 1 to 65535"):
        phi3c.compile(config, "vulkan", output=tmp_path / "made", prefill_chunk_size=value)
