"""Runs the CUDA and Metal source of kernels on the host, matrix units included (gpu_emulator.h)."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import tvm

from phi3c.pipeline import kernel_lowering

COMPILER = shutil.which("g++") or shutil.which("clang++")
HEADER = Path(__file__).with_name("gpu_emulator.h")
TARGETS = {
    "cuda": {"kind": "cuda", "arch": "sm_80", "host": "llvm"},
    "metal": {"kind": "metal", "host": "llvm"},
}
_START = {
    "cuda": r'(?=^extern "C" __global__.*\{$)',
    "metal": r"(?=^struct \w+_args_t|^kernel void )",
}
_OPERAND = r'"=?[rf]"\(((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*)\)'
_INSTRUCTIONS = {
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16": "emulator::ldmatrix_x4",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": "emulator::ldmatrix_x4_trans",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "emulator::mma_m16n8k16",
}


def source_of(function, target: str | dict, config: dict | None = None) -> str:
    """What TVM makes of a kernel for "cuda", "metal", or a TVM target."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    with kernel_lowering("gpu") as context:
        merged = {**context.config, **(config or {})}
    with tvm.transform.PassContext(opt_level=3, config=merged):
        built = tvm.compile(module, target=tvm.target.Target(TARGETS.get(str(target), target)))
    return built.mod.imports[0].inspect_source()


def plain_source(function, target: str) -> str:
    """As above, with no arguments to a kernel that the host would compute first."""
    return source_of(function, target, {"tirx.disable_cse_tir": True})


def kernels_of(source: str, target: str) -> list[str]:
    """The sources of its kernels."""
    parts = re.split(_START[target], source, flags=re.MULTILINE)[1:]
    if target == "cuda":
        return parts
    structs = [p for p in parts if p.startswith("struct")]
    # Each is a file of its own; what follows the last line of one is the head of the next.
    kernels = [p.partition("#include")[0] for p in parts if p.startswith("kernel")]
    return [s + k for s, k in zip(structs, kernels, strict=True)]


def _instruction(match: re.Match) -> str:
    (name,) = re.findall(r'"((?:ldmatrix|mma)[\w.]*)"', match[0])
    return f"{_INSTRUCTIONS[name]}({', '.join(re.findall(_OPERAND, match[0]))});"


def _as_cpp(kernel: str, target: str) -> tuple[str, list[str], list[str]]:
    """C++ with a function `launch(pointers, numbers, grid, threads, reversed)`; their names."""
    kernel = re.sub(
        r"(?:__shared__ alignas\(64\)|threadgroup) (\w+) (\w+)\[(\d+)\];",
        r"\1* \2 = (\1*)emulator::array(\3 * sizeof(\1));",
        kernel,
    )
    kernel = re.sub(r"\[\[[^\]]*\]\]", "", kernel)
    kernel = re.sub(r"(\d\.\d+e[+-]\d+)h\b", r"\1_h", kernel)
    kernel = re.sub(r"__asm__ __volatile__\(.*?\);(?=\n)", _instruction, kernel, flags=re.DOTALL)
    assert "asm" not in kernel
    pointers = re.findall(r"(?:device )?(\w+)\* (?:__restrict__ )?\s*(\w+)_ptr *[,)]", kernel)
    arguments = [f"({kind}*)pointers[{i}]" for i, (kind, _) in enumerate(pointers)]
    if target == "cuda":
        name = re.search(r"(main_kernel\w*)\(", kernel)[1]
        numbers = re.findall(r"int64_t (\w+)", kernel[: kernel.index(") {")])
        kernel = re.sub(r'extern "C" __global__ (.*?) __launch_bounds__\(\d+\)', r"\1", kernel)
        arguments += [f"numbers[{i}]" for i in range(len(numbers))]
    else:
        name = re.search(r"kernel void (main_kernel\w*)\(", kernel)[1]
        assert re.search(r"_args_t \{\n +long n;\n\}", kernel), kernel[:400]
        kernel, numbers = kernel.replace("kernel void", "void"), ["n"]
        arguments += [
            f"{name}_args_t{{numbers[0]}}",
            "uint2{emulator::block.x, emulator::block.y}",
            "uint2{emulator::current->index.x, emulator::current->index.y}",
        ]
        kernel = re.sub(r"constant (\w+)&", r"const \1&", kernel)
    define = "#define EMULATE_CUDA\n" if target == "cuda" else ""
    launch = f"""
extern "C" long launch(void** pointers, int64_t* numbers, unsigned* grid,
                       unsigned threads, bool reversed) {{
  emulator::run_grid({{grid[0], grid[1], grid[2]}}, {{threads, 1, 1}}, reversed,
                     [&] {{ {name}({", ".join(arguments)}); }});
  return emulator::conflicts;
}}
"""
    text = f'{define}#include "{HEADER}"\n{kernel}{launch}'
    return text, [name for _, name in pointers], numbers


class EmulatedKernel:
    """One kernel of one workgroup shape, `[threads, 1, 1]`, with numbers beside its buffers."""

    def __init__(self, kernel: str, target: str, folder: Path):
        text, self._pointers, self._numbers = _as_cpp(kernel, target)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        source, library = folder / f"{name}.cc", folder / f"{name}.so"
        source.write_text(text)
        machine = ["-mf16c"] if platform.machine() == "x86_64" else []
        flags = ["-O1", "-std=c++17", "-w", "-fno-strict-aliasing", "-ffp-contract=off"]
        command = [COMPILER, *flags, *machine, "-shared", "-fPIC", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        self._launch = ctypes.CDLL(str(library)).launch
        self._launch.restype = ctypes.c_long

    def __call__(
        self, buffers: dict[str, np.ndarray], numbers: dict[str, int], grid: tuple[int, ...],
        threads: int, reversed: bool = False,
    ) -> int:  # fmt: skip
        """Runs; returns how many rows of matrices met in a bank of shared memory."""
        assert set(buffers) == set(self._pointers) and set(numbers) == set(self._numbers)
        pointers = (ctypes.c_void_p * len(buffers))(
            *[buffers[name].ctypes.data for name in self._pointers]
        )
        size = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
        values = (ctypes.c_int64 * len(numbers))(*[numbers[name] for name in self._numbers])
        return self._launch(pointers, values, size, threads, ctypes.c_bool(reversed))
