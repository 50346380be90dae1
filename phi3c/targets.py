"""Target names → TVM targets and the kernels that fit them.

`vulkan` is any GPU with Vulkan 1.1 and what PORTABLE_VULKAN asks for, in a machine like this one,
16-bit storage only for schemes with values of 16 bits; `vulkan:<index>` is this machine's device of
that index with all that it has, and `vulkan:native` its first. `cuda:<arch>` is an NVIDIA GPU of
that architecture or a later one (`cuda:sm_90`); `cuda` is `cuda:sm_80`, and `cuda:native` the GPU
that is here. `metal` is the GPU of any Mac with one of Apple's own chips.
`cpu` is this machine's CPU, `cpu:<mcpu>` another one of this architecture by LLVM's name
(`cpu:znver3`, `cpu:x86-64-v3`), `cpu:<mcpu>:<triple>` one of any machine
(`cpu:neoverse-n1:aarch64-linux-gnu`, `cpu:apple-m1:arm64-apple-darwin`).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import tvm
from tvm.target import codegen

from .cuda.driver import devices
from .errors import DeviceError, TargetError
from .kernels.cpu import CpuKernels
from .kernels.cpu.isa import (
    AVX2,
    AVX512,
    AVX512_VNNI,
    AVX_VNNI,
    NEON,
    NEON_DOTPROD,
    NEON_I8MM,
    PORTABLE,
    Isa,
)
from .kernels.family import Kernels
from .kernels.gpu import GpuKernels
from .kernels.gpu.limits import CUDA, GpuLimits
from .vulkan import VulkanDevice
from .vulkan import devices as vulkan_devices

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
_AARCH64_FLAGS = {
    "neon": "asimd",
    "lse": "atomics",
    "rdm": "asimdrdm",
    "fullfp16": "asimdhp",
    "fp16fml": "asimdfhm",
    "dotprod": "asimddp",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "complxnum": "fcma",
    "rcpc": "lrcpc",
    "rcpc-immo": "ilrcpc",
    "flagm": "flagm",
    "altnzcv": "flagm2",
    "fptoint": "frint",
    "sha3": "sha3",
    "cssc": "cssc",
    "mops": "mops",
    "sve": "sve",
    "sve2": "sve2",
    "sve2p1": "sve2p1",
}

_FORMS = (
    "cpu, cpu:<mcpu>, cpu:<mcpu>:<triple>, cuda, cuda:<arch>, cuda:native, metal, vulkan, "
    "vulkan:native, vulkan:<index>"
)
# Turing has the instructions too, but float16 at a lower rate than anybody measured here.
_CUDA_ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
# The systems that TVM's runtime is built for; LLVM would end the process on some other names.
_TRIPLE = re.compile(r"(x86_64|aarch64|arm64)-((\w+-)?linux-gnu|apple-(darwin|macos)[\d.]*)")


@dataclass(frozen=True)
class Target:
    """A place to compile for.

    device: what runs the kernels, `cpu`, `cuda`, `metal` or `vulkan`; arch: of CUDA, else empty.
    mcpu, mtriple: of the CPU, a GPU's host too; cpu_flags: what the code needs of it, as Linux
    names it.
    """

    name: str
    device: str
    tvm_target: tvm.target.Target
    kernels: Kernels
    mcpu: str
    mtriple: str
    cpu_flags: tuple[str, ...]
    arch: str = ""


def parse_target(name: str) -> Target:
    """A name in one of the forms above → Target. Raises TargetError naming what is accepted."""
    if name == "metal":
        return _metal()
    kind, *parts = name.split(":")
    if kind == "vulkan" and len(parts) < 2:
        return _vulkan(name, *parts)
    if kind == "cuda" and len(parts) < 2:
        return _cuda(name, parts[0] if parts else _CUDA_ARCHS[0])
    if kind != "cpu" or len(parts) > 2 or not all(parts):
        raise TargetError(f"target: found {name!r}; accepted: {_FORMS}")
    host = codegen.llvm_get_system_cpu()
    mcpu = parts[0] if parts else host
    triple = _checked_triple(name, parts[1]) if len(parts) == 2 else None
    attributes = {"kind": "llvm"} | ({"mtriple": triple} if triple else {})
    triple = triple or codegen.llvm_get_system_triple()
    # The list lacks other names of a CPU, such as apple-m1.
    if not codegen.llvm_is_valid_cpu(mcpu, triple):
        known = codegen.llvm_get_cpu_archlist(tvm.target.Target(attributes))
        known = [str(cpu) for cpu in known]
        near = difflib.get_close_matches(mcpu, known, n=3, cutoff=0.4)
        near = ", ".join(near) or (host if host in known else "generic")
        raise TargetError(
            f"target: found {name!r}; accepted: {_FORMS}, with a CPU that LLVM knows for {triple}, "
            f"such as {near}"
        )
    target = tvm.target.Target(attributes | {"mcpu": mcpu})
    isa, flags = _isa(target)
    return Target(name, "cpu", target, CpuKernels(isa), mcpu, triple, flags)


def _gpu_host() -> dict[str, str]:
    """Every CPU of this architecture: the code there does little but launch kernels."""
    triple = codegen.llvm_get_system_triple()
    mcpu = "x86-64" if triple.startswith("x86_64") else "generic"
    return {"kind": "llvm", "mtriple": triple, "mcpu": mcpu}


def _cuda(name: str, arch: str) -> Target:
    if arch == "native":
        arch = _native_arch(name)
    if arch not in _CUDA_ARCHS:
        raise TargetError(
            f"target: found {name!r}; accepted: cuda, cuda:native, or cuda:<arch> with one of "
            f"{', '.join(_CUDA_ARCHS)}"
        )
    host, kernels = _gpu_host(), GpuKernels("float32", CUDA, "mma")
    target = tvm.target.Target({"kind": "cuda", "arch": arch, "host": host})
    return Target(name, "cuda", target, kernels, host["mcpu"], host["mtriple"], (), arch)


def _native_arch(name: str) -> str:
    """That of this machine's first GPU; a GPU newer than our list runs the last of it."""
    try:
        found = devices()
    except DeviceError as error:
        raise TargetError(f"target: found {name!r}, but no GPU: {error}") from None
    if not found:
        raise TargetError(f"target: found {name!r}, but the driver finds no GPU")
    number = int(found[0].arch.removeprefix("sm_"))
    fitting = [arch for arch in _CUDA_ARCHS if int(arch.removeprefix("sm_")) <= number]
    return fitting[-1] if fitting else found[0].arch


# What `vulkan` grants, as attributes of TVM's target: GpuLimits', and what no desktop's or phone's
# GPU is known to lack; 128 bytes of push constants are the least that Vulkan allows.
PORTABLE_VULKAN = {
    "max_num_threads": GpuLimits.threads,
    "max_threads_per_block": GpuLimits.threads,
    "max_block_size_x": GpuLimits.threads,
    "max_block_size_y": GpuLimits.threads,
    "max_block_size_z": 64,
    "max_shared_memory_per_block": GpuLimits.shared_bytes,
    "max_push_constants_size": 128,
    "max_per_stage_descriptor_storage_buffer": 16,
    "supports_16bit_buffer": True,
}


def _vulkan(name: str, which: str | None = None) -> Target:
    """which: of this machine's devices; None: a portable one.

    thread_warp_size stays 1: the width of a subgroup may vary within a kernel.
    """
    granted = PORTABLE_VULKAN if which is None else _granted(_vulkan_device(name, which))
    host, kernels = _gpu_host(), GpuKernels("float32")
    target = tvm.target.Target({"kind": "vulkan", "host": host, **granted})
    return Target(name, "vulkan", target, kernels, host["mcpu"], host["mtriple"], ())


def _vulkan_device(name: str, which: str) -> VulkanDevice:
    if which != "native" and not re.fullmatch(r"[0-9]{1,4}", which):
        raise TargetError(f"target: found {name!r}; accepted: {_FORMS}")
    try:
        found = vulkan_devices()
    except DeviceError as error:
        raise TargetError(f"target: found {name!r}, but no device: {error}") from None
    index = 0 if which == "native" else int(which)
    if index >= len(found):
        there = ", ".join(map(str, found)) or "none, as no driver is installed"
        raise TargetError(f"target: found {name!r}; accepted: a device that is there: {there}")
    return found[index]


def _granted(device: VulkanDevice) -> dict[str, bool | int]:
    """All that the device has, as attributes of TVM's target."""
    x, y, z = device.max_workgroup_size
    major, minor, patch = device.api_version
    return {
        "supports_float16": device.shader_float16,
        "supports_float64": device.shader_float64,
        "supports_int8": device.shader_int8,
        "supports_int16": device.shader_int16,
        "supports_int64": device.shader_int64,
        "supports_8bit_buffer": device.storage_buffer_8bit,
        "supports_16bit_buffer": device.storage_buffer_16bit,
        "max_num_threads": device.max_workgroup_invocations,
        "max_threads_per_block": device.max_workgroup_invocations,
        "max_block_size_x": x,
        "max_block_size_y": y,
        "max_block_size_z": z,
        "max_shared_memory_per_block": device.max_shared_memory,
        "max_push_constants_size": device.max_push_constants,
        "max_storage_buffer_range": device.max_storage_buffer_range,
        "max_per_stage_descriptor_storage_buffer": device.max_storage_buffers,
        "supported_subgroup_operations": device.subgroup_operations,
        "vulkan_api_version": major << 22 | minor << 12 | patch,
    }


def _metal() -> Target:
    """Its host code runs on every Mac with an Apple chip.

    thread_warp_size 1: sums over threads go through shared memory, as on Vulkan, where the same
    kernels are tested. TVM would make simd_shuffle of them and, for several sums in a simdgroup,
    name lanes past its end: Metal leaves the result open, where CUDA takes the rest.
    """
    triple, mcpu = "arm64-apple-macos", "apple-m1"
    kernels = GpuKernels("float32", matrix="simdgroup")
    target = tvm.target.Target(
        {
            "kind": "metal",
            "host": {"kind": "llvm", "mtriple": triple, "mcpu": mcpu},
            "max_num_threads": kernels.limits.threads,
            "max_threads_per_block": kernels.limits.threads,
            "max_shared_memory_per_block": kernels.limits.shared_bytes,
            "thread_warp_size": 1,
        }
    )
    return Target("metal", "metal", target, kernels, mcpu, triple, ())


def _checked_triple(name: str, triple: str) -> str:
    if not _TRIPLE.fullmatch(triple):
        raise TargetError(
            f"target: found {name!r}, with the triple {triple!r}; accepted: x86_64, aarch64 or "
            "arm64 with -linux-gnu, -apple-darwin or -apple-macos, such as aarch64-linux-gnu"
        )
    return triple


def _isa(target: tvm.target.Target) -> tuple[Isa, tuple[str, ...]]:
    features = {str(f) for f in codegen.llvm_get_cpu_features(target)}

    def flags(names: dict[str, str]) -> tuple[str, ...]:
        return tuple(flag for feature, flag in names.items() if feature in features)

    if "neon" in features:
        dotprod = NEON_DOTPROD if "dotprod" in features else NEON
        return (NEON_I8MM if "i8mm" in features else dotprod), flags(_AARCH64_FLAGS)
    if {"avx512f", "avx512vl", "avx512dq", "avx512bw"} <= features:
        return (AVX512_VNNI if "avx512vnni" in features else AVX512), flags(_X86_FLAGS)
    if {"avx2", "fma", "f16c"} <= features:
        return (AVX_VNNI if "avxvnni" in features else AVX2), flags(_X86_FLAGS)
    return PORTABLE, flags(_X86_FLAGS)
