"""TVM's code generator for the target kind `vulkan`: lowered device functions → a module.

The bytes are those of TVM's own Vulkan module, so a TVM that was built with Vulkan loads them too:
the format's name; for each kernel its name, argument types and launch tags; for each its SPIR-V.
Lengths are 64-bit, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import tvm
import tvm_ffi

from ..errors import TargetError
from .granted import check_granted
from .kernel import Kernel, emit_kernel

_BUILD = "target.build.vulkan"
_LOAD = "ffi.Module.load_from_bytes.vulkan"
_TYPE_CODES = {"int": 0, "uint": 1, "float": 2, "handle": 3}
_HANDLE = (_TYPE_CODES["handle"], 64, 1)
_collecting: ContextVar[list[Kernel] | None] = ContextVar("collecting", default=None)


def register() -> None:
    """Makes TVM build for Vulkan, unless it can by itself."""
    tvm_ffi.register_error("TargetError", TargetError)  # as it passes through TVM's C++
    if tvm_ffi.get_global_func(_BUILD, allow_missing=True) is None:
        tvm_ffi.register_global_func(_BUILD, _build)


@contextmanager
def collected() -> Iterator[list[Kernel]]:
    """The kernels that are emitted inside: what is made of them goes by TVM's hands. It may be
    nested; the outer one has them all in the end."""
    kernels: list[Kernel] = []
    outer = _collecting.get()
    token = _collecting.set(kernels)
    try:
        yield kernels
    finally:
        _collecting.reset(token)
        if outer is not None:
            outer += kernels


def _build(module: tvm.IRModule, target: tvm.target.Target) -> tvm_ffi.Module:
    kernels = emit(module)
    if (collecting := _collecting.get()) is not None:
        collecting += kernels
    return tvm_ffi.get_global_func(_LOAD)(module_bytes(kernels))


def emit(module: tvm.IRModule) -> list[Kernel]:
    """The kernels of a module of device functions, each for its target. Raises TargetError.

    Indices become 32-bit: a storage buffer has at most 2^32 bytes.
    """
    module = tvm.tirx.transform.ForceNarrowIndexToInt32()(module)
    kernels = []
    for _, function in module.functions_items():
        kernels.append(emit_kernel(function))
        check_granted(kernels[-1], function.attrs["target"])
    return kernels


def module_bytes(kernels: Sequence[Kernel]) -> bytes:
    """What TVM's Vulkan runtime reads."""
    info = b"".join(_text(kernel.name) + _function_info(kernel) for kernel in kernels)
    code = b"".join(_text(kernel.name) + _sized(_shader(kernel)) for kernel in kernels)
    count = struct.pack("<Q", len(kernels))
    return _text("vulkan") + count + info + count + code


def _function_info(kernel: Kernel) -> bytes:
    arguments = b"".join(struct.pack("<BBH", *_type_code(dtype)) for dtype in kernel.arguments)
    tags = b"".join(_text(tag) for tag in kernel.launch)
    return (
        _text(kernel.name)
        + struct.pack("<Q", len(kernel.arguments))
        + arguments
        + struct.pack("<Q", len(kernel.launch))
        + tags
        + struct.pack("<Q", 0)  # no further tags of arguments
    )


def _type_code(dtype: str) -> tuple[int, int, int]:
    if dtype == "handle":
        return _HANDLE
    kind = dtype.rstrip("0123456789")
    return _TYPE_CODES[kind], int(dtype.removeprefix(kind)), 1


def _shader(kernel: Kernel) -> bytes:
    """flag 0: arguments that are no buffers are push constants."""
    return struct.pack("<IQ", 0, len(kernel.spirv) // 4) + kernel.spirv


def _sized(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _text(value: str) -> bytes:
    return _sized(value.encode())
