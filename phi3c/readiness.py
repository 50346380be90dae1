"""What this installation can do for each kind of target: lower, link, run; and what is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tvm

from . import metal
from .cuda import nvrtc
from .cuda.driver import devices as cuda_devices
from .cuda.library import load_runtime as load_cuda_runtime
from .errors import DeviceError, TargetError
from .linker import find_linker
from .targets import parse_target
from .vulkan import devices, load_runtime, tvm_has_vulkan


@dataclass(frozen=True)
class Readiness:
    """lowers: kernels can be compiled for the target; links: their library can be linked; devices:
    those here that can run it; missing: what stands in the way, and how to get it."""

    target: str
    lowers: bool
    links: bool
    devices: tuple[str, ...]
    missing: tuple[str, ...]


def readiness() -> list[Readiness]:
    """Of every kind of target."""
    return [_cpu(), _cuda(), _vulkan(), _metal()]


def _cpu() -> Readiness:
    missing: list[str] = []
    links = _works(lambda: find_linker(parse_target("cpu")), missing)
    host = parse_target("cpu")
    return Readiness("cpu", True, links, (f"{host.mcpu} ({host.mtriple})",), tuple(missing))


def _cuda() -> Readiness:
    missing: list[str] = []
    needed = nvrtc.missing()
    if needed:
        missing.append(f"cuda: compiling kernels needs {needed}")
    links = _works(lambda: find_linker(parse_target("cuda")), missing)
    found: list[str] = []

    def look() -> None:
        there = cuda_devices()
        if not there:
            raise DeviceError("cuda: the driver finds no GPU")
        load_cuda_runtime()
        found.extend(map(str, there))

    _works(look, missing)
    return Readiness("cuda", needed is None, links, tuple(found), tuple(missing))


def _vulkan() -> Readiness:
    missing: list[str] = []
    lowers = _works(load_runtime, missing)
    links = _works(lambda: find_linker(parse_target("vulkan")), missing)
    found: list[str] = []

    def look() -> None:
        found.extend(_of_tvm(tvm.vulkan) if tvm_has_vulkan() else map(str, devices()))
        if not found:
            raise DeviceError(
                "vulkan: found no device; a GPU's driver brings one, and for the CPU (slow, for "
                "tests) Debian's apt install mesa-vulkan-drivers"
            )

    if lowers:
        _works(look, missing)
    return Readiness("vulkan", lowers, links, tuple(found), tuple(dict.fromkeys(missing)))


def _metal() -> Readiness:
    missing: list[str] = []
    lowers = metal.available()
    if not lowers:
        missing.append("metal: this TVM was built without a code generator for Metal")
    links = _works(lambda: find_linker(parse_target("metal")), missing)
    found = _of_tvm(tvm.metal)
    if not found:
        missing.append("metal: found no device: only a Mac has one, to which artifacts are copied")
    return Readiness("metal", lowers, links, tuple(found), tuple(missing))


def _of_tvm(device: Callable[[int], tvm.runtime.Device]) -> list[str]:
    """Those that a runtime of TVM's own finds."""
    there = [device(index) for index in range(8)]
    return [f"{one}: {one.device_name}" for one in there if one.exist]


def _works(action: Callable[[], object], missing: list[str]) -> bool:
    try:
        action()
    except (DeviceError, TargetError) as error:
        missing.append(str(error))
        return False
    return True
