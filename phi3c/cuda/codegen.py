"""TVM's code generator for CUDA, and behind it NVRTC: what a library holds is machine code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import tvm
import tvm_ffi

from ..errors import TargetError
from .nvrtc import DeviceCode, compile_source

_BUILD = "target.build.cuda"
_LAUNCH = re.compile(r"__global__ void __launch_bounds__\((\d+)\) (\w+)\(")
_ACTIVE, _ALL, _WARP = "__activemask()", "0xffffffffu", 32
# TVM has no other switch for it: a module of source, also where its CUDA runtime is loaded, which
# would compile the source at once.
_KEEP_SOURCE = "TVM_COMPILE_FORCE_FALLBACK"


@dataclass
class Collected:
    """What was made for an architecture: source → its machine code, kernel → its threads."""

    arch: str
    codes: dict[str, DeviceCode] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)


_collecting: ContextVar[Collected | None] = ContextVar("collecting", default=None)


@contextmanager
def collected(arch: str) -> Iterator[Collected]:
    """Inside, what TVM builds for CUDA is compiled too, for `arch` (such as sm_90).

    It may be nested; the outer one has all in the end. TVM's modules still hold the source:
    packing.py puts the code in its place. Raises TargetError (NVIDIA's packages are missing, or
    NVRTC refuses a kernel).
    """
    _register()
    made, outer = Collected(arch), _collecting.get()
    token = _collecting.set(made)
    try:
        yield made
    finally:
        _collecting.reset(token)
        if outer is not None:
            outer.codes |= made.codes
            outer.threads |= made.threads


_registered = False


def _register() -> None:
    """Once: TVM's function is wrapped, and does outside `collected` what it did."""
    global _registered
    if _registered:
        return
    tvm_ffi.register_error("TargetError", TargetError)  # as it passes through TVM's C++
    build = tvm_ffi.get_global_func(_BUILD)

    def build_and_compile(module: tvm.IRModule, target: tvm.target.Target) -> tvm_ffi.Module:
        if (made := _collecting.get()) is None:
            return build(module, target)
        # 32-bit indices: no buffer has more than 2^31 elements (runtime/device.py refuses others).
        module = tvm.tirx.transform.ForceNarrowIndexToInt32()(module)
        with _environment(_KEEP_SOURCE, "1"):
            built = build(module, target)
        _compile(str(built.inspect_source("cuda")), made)
        return built

    tvm_ffi.register_global_func(_BUILD, build_and_compile, override=True)
    _registered = True


def _compile(source: str, made: Collected) -> None:
    # TVM's reductions shuffle among the threads that are active, which need not be the whole warp
    # where it has diverged; ours are written for all of them.
    whole_warps = source.replace(_ACTIVE, _ALL)
    code = made.codes[source] = compile_source(whole_warps, made.arch)
    bounds = {name: int(threads) for threads, name in _LAUNCH.findall(source)}
    assert not any(threads % _WARP for threads in bounds.values()), bounds
    if unbound := sorted({kernel.name for kernel in code.kernels} - set(bounds)):
        raise TargetError(
            f"target: cuda:{made.arch}: the kernel {unbound[0]}: its number of threads is not "
            "known when it is compiled"
        )
    made.threads |= bounds


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
