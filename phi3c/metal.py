"""TVM's code generator for the target kind `metal`, with 32-bit indices and checked limits.

What is checked is what every GPU of Apple's grants (Metal Feature Set Tables): a kernel that asks
for more would be refused on the Mac, by a line that names Metal's compiler and not the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod

import tvm
import tvm_ffi
from tvm import tirx

from .errors import TargetError

THREADS = 1024  # of a threadgroup
SHARED_BYTES = 32768  # of its memory
BUFFERS = 31  # arguments of a kernel; all that are no buffers are in one together
PLAIN_BYTES = 8  # of an argument that is no buffer

_BUILD = "target.build.metal"
_collecting: ContextVar[list[tirx.PrimFunc] | None] = ContextVar("collecting", default=None)


@dataclass(frozen=True)
class MetalKernel:
    """buffers, plain: arguments that are buffers, and that are not; threads: of a threadgroup;
    shared_bytes: of its memory."""

    name: str
    buffers: int
    plain: int
    threads: int
    shared_bytes: int


@contextmanager
def collected() -> Iterator[list[tirx.PrimFunc]]:
    """The device functions that TVM builds inside, with 32-bit indices; `kernels_of` checks them,
    as an error of ours would lose its class on its way through TVM.

    Outside, TVM builds for Metal as ever. Raises TargetError for a TVM that cannot.
    """
    _register()
    functions: list[tirx.PrimFunc] = []
    token = _collecting.set(functions)
    try:
        yield functions
    finally:
        _collecting.reset(token)


def available() -> bool:
    """Whether this TVM has a code generator for Metal."""
    return tvm_ffi.get_global_func(_BUILD, allow_missing=True) is not None


_registered = False


def _register() -> None:
    global _registered
    if _registered:
        return
    if not available():
        raise TargetError("metal: this TVM was built without a code generator for Metal")
    generate = tvm_ffi.get_global_func(_BUILD)

    def build(module: tvm.IRModule, target: tvm.target.Target) -> tvm_ffi.Module:
        functions = _collecting.get()
        if functions is None:
            return generate(module, target)
        # A buffer has fewer than 2^31 elements: open_device refuses larger ones.
        module = tirx.transform.ForceNarrowIndexToInt32()(module)
        functions += [function for _, function in module.functions_items()]
        return generate(module, target)

    tvm_ffi.register_global_func(_BUILD, build, override=True)
    _registered = True


def kernels_of(functions: Sequence[tirx.PrimFunc]) -> list[MetalKernel]:
    """What lowered device functions ask for. Raises TargetError, naming the kernel, where that is
    more than Metal grants, or not a constant."""
    return [checked(_kernel(function)) for function in functions]


def _kernel(function: tirx.PrimFunc) -> MetalKernel:
    name = str(function.attrs["global_symbol"])
    pointers = [p for p in function.params if type(p.ty).__name__ == "PointerType"]
    axes: dict[str, int] = {}
    shared = 0
    for node in _statements(function.body):
        kind = type(node).__name__
        if kind == "AttrStmt" and node.attr_key == "thread_extent":
            if str(node.node.thread_tag).startswith("threadIdx"):
                extent = _constant(name, "threads in a threadgroup", node.value)
                axes[str(node.node.thread_tag)] = extent
        elif kind == "AllocBuffer" and str(node.buffer.scope()).startswith("shared"):
            extents = [_constant(name, "threadgroup memory", n) for n in node.buffer.shape]
            shared += prod(extents) * _bits(node.buffer.dtype) // 8
    return MetalKernel(
        name=name,
        buffers=len(pointers),
        plain=len(function.params) - len(pointers),
        threads=prod(axes.values()),
        shared_bytes=shared,
    )


def checked(kernel: MetalKernel) -> MetalKernel:
    """The kernel itself. Raises TargetError, naming it, if it asks for more than Metal grants."""
    for what, found, most in (
        ("threads in a threadgroup", kernel.threads, THREADS),
        ("bytes of threadgroup memory", kernel.shared_bytes, SHARED_BYTES),
        ("buffers", kernel.buffers + (kernel.plain > 0), BUFFERS),
    ):
        if found > most:
            raise TargetError(
                f"metal: the kernel {kernel.name}: found {found} {what}; accepted: up to {most}"
            )
    return kernel


def _statements(node) -> Iterator:
    """The statement and all that are in it."""
    yield node
    for part in ("body", "then_case", "else_case"):
        if (inner := getattr(node, part, None)) is not None:
            yield from _statements(inner)
    if type(node).__name__ == "SeqStmt":
        for inner in node.seq:
            yield from _statements(inner)


def _bits(dtype) -> int:
    """`float16x4` → 64; a bool takes a byte."""
    kind = tvm.DataType(str(dtype))
    return max(kind.bits, 8) * kind.lanes


def _constant(name: str, what: str, value) -> int:
    found = getattr(value, "value", value)
    if not isinstance(found, int):
        raise TargetError(f"metal: the kernel {name}: found {what} {value}; accepted: a constant")
    return found
