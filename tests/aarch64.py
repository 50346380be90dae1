"""Kernels for aarch64, run by qemu's user emulation where it and a cross compiler are installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import libinfo as tvm_paths
from tvm_ffi import libinfo as ffi_paths

from phi3c.kernels.cpu.isa import NEON, NEON_DOTPROD, NEON_I8MM, Isa
from phi3c.targets import Target, parse_target

TRIPLE = "aarch64-linux-gnu"
COMPILER, EMULATOR = f"{TRIPLE}-gcc", "qemu-aarch64"
RUNNER = Path(__file__).parent / "aarch64_runner.c"

# Of each instruction set, LLVM's name of a CPU and qemu's of one that has no more than that (qemu 7
# has none with i8mm but that which has everything).
CPUS = {
    NEON: ("cortex-a72", "cortex-a72"),
    NEON_DOTPROD: ("neoverse-n1", "neoverse-n1"),
    NEON_I8MM: ("neoverse-v1", "max"),
}

missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]


def skip_unless_emulated() -> None:
    if missing:
        pytest.skip(f"no {missing[0]} is installed")


def target_of(isa: Isa) -> Target:
    return parse_target(f"cpu:{CPUS[isa][0]}:{TRIPLE}")


class EmulatedKernel:
    """A kernel as a callable of TVM tensors, like a compiled one of this machine."""

    def __init__(self, func: tvm.tirx.PrimFunc, isa: Isa):
        module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        self._folder = tempfile.TemporaryDirectory()
        self.object = Path(self._folder.name) / "kernel.o"
        self._program = Path(self._folder.name) / "kernel"
        self._cpu = CPUS[isa][1]
        built = tvm.compile(module, target=target_of(isa).tvm_target)
        built.mod.write_to_file(str(self.object), "o")
        command = [COMPILER, "-static", _runner(), self.object, "-lm", "-o", self._program]
        subprocess.run(command, check=True)

    def __call__(self, *tensors: tvm.runtime.Tensor) -> None:
        arrays = [t.numpy() for t in tensors]
        kinds = {"i": 0, "u": 1, "f": 2}  # DLPack's
        data = np.int64(len(arrays)).tobytes()
        for a in arrays:
            head = [kinds[a.dtype.kind], a.dtype.itemsize * 8, a.ndim, *a.shape]
            data += np.array(head, np.int64).tobytes() + a.tobytes()
        command = [EMULATOR, "-cpu", self._cpu, self._program]
        done = subprocess.run(command, input=data, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {done.stderr.decode().strip()}")
        out = memoryview(done.stdout)
        for tensor, a in zip(tensors, arrays, strict=True):
            tensor.copyfrom(np.frombuffer(out[: a.nbytes], a.dtype).reshape(a.shape))
            out = out[a.nbytes :]


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@cache
def _runner() -> Path:
    """The runner, compiled."""
    path = Path(_folder().name) / "runner.o"
    headers = [paths.find_include_path() for paths in (ffi_paths, tvm_paths)]
    include = [f"-I{folder}" for folder in [*headers, ffi_paths.find_dlpack_include_path()]]
    subprocess.run([COMPILER, "-O1", "-Wall", *include, "-c", RUNNER, "-o", path], check=True)
    return path
