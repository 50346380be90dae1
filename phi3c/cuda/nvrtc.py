"""CUDA C++ → a fat binary: machine code for one architecture, and PTX for those after it.

By NVRTC and nvFatbin of NVIDIA's wheels (the extra `cuda`); neither needs a GPU or a toolkit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import TargetError

_MODULES = ("cuda.bindings.nvrtc", "cuda.bindings.nvfatbin")
_USED = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<spilled>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class KernelUse:
    """What a kernel takes: registers of a thread, shared bytes of a workgroup; spilled: bytes that
    found no register."""

    name: str
    registers: int
    shared_bytes: int
    spilled: int


@dataclass(frozen=True)
class DeviceCode:
    fat_binary: bytes
    kernels: tuple[KernelUse, ...]


def missing() -> str | None:
    """What must be installed before `compile_source` works; None: nothing."""
    try:
        absent = [name for name in _MODULES if find_spec(name) is None]
    except ModuleNotFoundError:
        absent = list(_MODULES)
    if absent:
        return f"{absent[0]}, of the package cuda-bindings (pip install 'phi3c[cuda]')"
    if _headers() is None:
        return (
            "CUDA's headers, of the packages nvidia-cuda-runtime and nvidia-cuda-cccl "
            "(pip install 'phi3c[cuda]')"
        )
    from cuda.bindings import nvfatbin, nvrtc

    for library, load in (("nvrtc", nvrtc.nvrtcVersion), ("nvfatbin", nvfatbin.version)):
        try:
            load()
        except RuntimeError:  # its wheel is not there
            return f"the library {library}, of NVIDIA's wheels (pip install 'phi3c[cuda]')"
    return None


def compile_source(source: str, arch: str) -> DeviceCode:
    """arch: such as sm_90. Raises TargetError: NVIDIA's packages are missing, or NVRTC refuses."""
    if what := missing():
        raise TargetError(f"target: cuda:{arch}: compiling kernels needs {what}")
    from cuda.bindings import nvfatbin, nvrtc

    def check(result):
        error, *values = result
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise TargetError(f"target: cuda:{arch}: NVRTC: {error.name}")
        return values[0] if values else None

    include = _headers()
    options = [
        f"--gpu-architecture={arch}",
        f"-I{include}",
        f"-I{include / 'cccl'}",
        "-std=c++17",
        "--ptxas-options=-v",
        "--device-as-default-execution-space",
    ]
    program = check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    encoded = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
    check(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode(errors="replace")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        first = next((line for line in text.splitlines() if "error" in line), text.strip()[:200])
        raise TargetError(f"target: cuda:{arch}: NVRTC does not compile the kernels: {first}")
    cubin = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
    check(nvrtc.nvrtcGetCUBIN(program, cubin))
    ptx = b" " * check(nvrtc.nvrtcGetPTXSize(program))
    check(nvrtc.nvrtcGetPTX(program, ptx))
    check(nvrtc.nvrtcDestroyProgram(program))
    return DeviceCode(_fat(nvfatbin, arch.removeprefix("sm_"), cubin, ptx), _uses(text))


def _fat(nvfatbin, arch: str, cubin: bytes, ptx: bytes) -> bytes:
    handle = nvfatbin.create([], 0)
    nvfatbin.add_cubin(handle, cubin, len(cubin), arch, "kernels")
    nvfatbin.add_ptx(handle, ptx, len(ptx), arch, "kernels", "")
    made = bytearray(nvfatbin.size(handle))
    nvfatbin.get(handle, made)
    nvfatbin.destroy(handle)
    return bytes(made)


def _uses(log: str) -> tuple[KernelUse, ...]:
    """ptxas tells them one kernel after another."""
    found = []
    for match in _USED.finditer(log):
        shared = _SHARED.search(match["rest"])
        found.append(
            KernelUse(
                match["name"],
                int(match["registers"]),
                int(shared[1]) if shared else 0,
                int(match["spilled"]),
            )
        )
    return tuple(found)


def _headers() -> Path | None:
    """The folder of NVIDIA's wheels, whatever CUDA's version."""
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for include in sorted(Path(folder).glob("cu*/include"), reverse=True):
            if (include / "cuda_fp16.h").is_file() and (include / "cccl").is_dir():
                return include
    return None
