"""TVM's code generator for CUDA, and behind it NVRTC: what a library holds is machine code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import tvm
import tvm_ffi

from ..errors import TargetError
from .carrier import carried, teach_loader
from .nvrtc import DeviceCode, compile_source

_BUILD, _AFTER = "target.build.cuda", "tvm_callback_cuda_postproc"
_LAUNCH = re.compile(r"__launch_bounds__\((\d+)\) (\w+)\(")


@dataclass
class Collected:
    """What was made for an architecture. threads: kernel → those of its workgroups."""

    arch: str
    codes: list[DeviceCode] = field(default_factory=list)
    threads: dict[str, int] = field(default_factory=dict)


_collecting: ContextVar[Collected | None] = ContextVar("collecting", default=None)


@contextmanager
def collected(arch: str) -> Iterator[Collected]:
    """Inside, TVM's modules for CUDA are machine code. arch: such as sm_90.

    Raises TargetError (NVRTC's packages, kernels that it refuses or that do not fit registers).
    """
    _register()
    made = Collected(arch)
    token = _collecting.set(made)
    try:
        yield made
    finally:
        _collecting.reset(token)


_registered = False


def _register() -> None:
    """Once: TVM's functions are wrapped, and do outside `collected` what they did."""
    global _registered
    if _registered:
        return
    tvm_ffi.register_error("TargetError", TargetError)  # as it passes through TVM's C++
    teach_loader()  # where TVM finds a GPU, it loads what it has just built
    build = tvm_ffi.get_global_func(_BUILD)
    after = tvm_ffi.get_global_func(_AFTER, allow_missing=True)

    def build_narrow(module: tvm.IRModule, target: tvm.target.Target) -> tvm_ffi.Module:
        if _collecting.get() is not None:  # no buffer has more than 2^31 elements
            module = tvm.tirx.transform.ForceNarrowIndexToInt32()(module)
        return build(module, target)

    def compile_after(source, target):
        if (made := _collecting.get()) is None:
            return source if after is None else after(source, target)
        return _compiled(str(source), made)

    tvm_ffi.register_global_func(_BUILD, build_narrow, override=True)
    tvm_ffi.register_global_func(_AFTER, compile_after, override=True)
    _registered = True


def _compiled(source: str, made: Collected) -> str:
    code = compile_source(source, made.arch)
    made.codes.append(code)
    made.threads |= {name: int(threads) for threads, name in _LAUNCH.findall(source)}
    if spilled := [kernel for kernel in code.kernels if kernel.spilled]:
        kernel = spilled[0]
        raise TargetError(
            f"target: cuda:{made.arch}: the kernel {kernel.name}: {kernel.spilled} bytes find no "
            f"register beside {kernel.registers}"
        )
    return carried(code.fat_binary)
