"""Target names, the kernels that each CPU gets, and the flags that its code needs."""

from __future__ import annotations

import platform

import pytest
from tvm.target import codegen

from phi3c.errors import TargetError
from phi3c.kernels.cpu.isa import AVX2, AVX512, NEON, PORTABLE, Isa, vector_lanes
from phi3c.runtime.host import _linux_cpu_flags
from phi3c.targets import parse_target

on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="CPU names of x86"
)

CPUS = [
    ("x86-64", PORTABLE),
    ("x86-64-v2", PORTABLE),
    ("nehalem", PORTABLE),
    ("sandybridge", PORTABLE),  # AVX without FMA
    ("x86-64-v3", AVX2),
    ("haswell", AVX2),
    ("znver3", AVX2),
    ("alderlake", AVX2),
    ("x86-64-v4", AVX512),
    ("skylake-avx512", AVX512),
    ("znver4", AVX512),
    ("sapphirerapids", AVX512),
]


def registers(isa: Isa) -> tuple[int, ...]:
    return isa.lanes, isa.linear_rows, isa.linear_panels, isa.attention_rows


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


@on_x86
@pytest.mark.parametrize(("mcpu", "isa"), CPUS)
def test_a_named_cpu_gets_its_instruction_set(mcpu, isa):
    target = parse_target(f"cpu:{mcpu}")
    assert target.name == f"cpu:{mcpu}"
    assert target.mcpu == str(target.tvm_target.attrs["mcpu"]) == mcpu
    # What sets instruction sets of one width apart (integer dot products) is not looked at here.
    assert registers(target.kernels.isa) == registers(isa)


@on_x86
def test_the_same_cpu_by_name_is_the_same_target():
    by_name = parse_target(f"cpu:{codegen.llvm_get_system_cpu()}")
    host = parse_target("cpu")
    assert (by_name.kernels, by_name.cpu_flags) == (host.kernels, host.cpu_flags)


@on_x86
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
    ],
)
def test_cpu_flags_are_what_the_code_may_use(mcpu, needed, not_needed):
    flags = set(parse_target(f"cpu:{mcpu}").cpu_flags)
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
}


@on_x86
@pytest.mark.parametrize("mcpu", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "znver4", "cannonlake"])
def test_every_extension_that_llvm_may_pick_is_asked_for(mcpu):
    target = parse_target(f"cpu:{mcpu}")
    features = {str(f) for f in codegen.llvm_get_cpu_features(target.tvm_target)}
    expected = {flag for feature, flag in PICKED_BY_LLVM.items() if feature in features}
    missing = expected - set(target.cpu_flags)
    assert not missing, f"code for {mcpu} may use {sorted(missing)}, and no load asks for them"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "target: found 'cuda'; accepted: cpu, cpu:<mcpu>"),
        ("", "target: found ''; accepted: cpu, cpu:<mcpu>"),
        ("cpu:", "target: found 'cpu:'; accepted: cpu, cpu:<mcpu>"),
        ("CPU", "target: found 'CPU'"),
        ("llvm -mcpu=znver4", "target: found 'llvm -mcpu=znver4'"),
        ("cpu:no-such-cpu", "with a CPU that LLVM knows"),
        ("cpu:znver4 -mattr=+avx", "with a CPU that LLVM knows"),
        ("cpu:znver4:x", "with a CPU that LLVM knows"),
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


@pytest.mark.parametrize("isa", [AVX512, AVX2, NEON, PORTABLE])
def test_vector_lanes_divide_the_extent(isa):
    for extent in (1, 2, 4, 6, 12, 16, 20, 36, 48, 64, 96, 128):
        lanes = vector_lanes(isa, extent)
        assert extent % lanes == 0 and lanes <= isa.lanes
        assert lanes == isa.lanes or extent % (2 * lanes), "a wider vector divides it too"


@pytest.mark.parametrize("isa", [AVX512, AVX2, NEON, PORTABLE])
def test_attention_rows_divide_the_query_tile(isa):
    from phi3c.kernels.cpu.prefill_attention import QUERY_TILE

    assert QUERY_TILE % isa.attention_rows == 0
