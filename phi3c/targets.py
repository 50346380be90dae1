"""Target names → TVM targets and the kernels that fit them.

`cpu` is this machine's CPU, `cpu:<mcpu>` another one of this architecture by LLVM's name
(`cpu:znver3`, `cpu:x86-64-v3`).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import tvm
from tvm.target import codegen

from .errors import TargetError
from .kernels.cpu import CpuKernels
from .kernels.cpu.isa import AVX2, AVX512, AVX512_VNNI, AVX_VNNI, NEON, PORTABLE, Isa

# LLVM feature → the flag that Linux reports for it. An artifact lists those that its code may use,
# so that a CPU without them is refused at load instead of dying on an illegal instruction.
_X86_FLAGS = {
    "popcnt": "popcnt",
    "movbe": "movbe",
    "lzcnt": "abm",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "gfni": "gfni",
    "sse4.2": "sse4_2",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512cd": "avx512cd",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512fp16": "avx512_fp16",
    "avx512bf16": "avx512_bf16",
    "avxvnni": "avx_vnni",
}


@dataclass(frozen=True)
class Target:
    """A place to compile for. `cpu_flags`: what the code needs of the CPU, as Linux names it."""

    name: str
    tvm_target: tvm.target.Target
    kernels: CpuKernels
    mcpu: str
    mtriple: str
    cpu_flags: tuple[str, ...]


def parse_target(name: str) -> Target:
    """`cpu` or `cpu:<mcpu>` → Target. Raises TargetError naming what is accepted."""
    kind, _, mcpu = name.partition(":")
    if kind != "cpu" or name.endswith(":"):
        raise TargetError(f"target: found {name!r}; accepted: cpu, cpu:<mcpu>")
    host = codegen.llvm_get_system_cpu()
    mcpu = mcpu or host
    known = [str(cpu) for cpu in codegen.llvm_get_cpu_archlist(tvm.target.Target("llvm"))]
    if mcpu not in known:
        near = ", ".join(difflib.get_close_matches(mcpu, known, n=3, cutoff=0.4)) or host
        raise TargetError(
            f"target: found {name!r}; accepted: cpu, or cpu:<mcpu> with a CPU that LLVM knows, "
            f"such as {near}"
        )
    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu})
    isa, flags = _isa(target)
    triple = codegen.llvm_get_system_triple()
    return Target(name, target, CpuKernels(isa), mcpu, triple, flags)


def _isa(target: tvm.target.Target) -> tuple[Isa, tuple[str, ...]]:
    features = {str(f) for f in codegen.llvm_get_cpu_features(target)}
    if "neon" in features:
        return NEON, ()
    flags = tuple(flag for feature, flag in _X86_FLAGS.items() if feature in features)
    if {"avx512f", "avx512vl", "avx512dq", "avx512bw"} <= features:
        return (AVX512_VNNI if "avx512vnni" in features else AVX512), flags
    if {"avx2", "fma", "f16c"} <= features:
        return (AVX_VNNI if "avxvnni" in features else AVX2), flags
    return PORTABLE, flags
