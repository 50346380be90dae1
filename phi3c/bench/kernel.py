"""One kernel as a function, linked and run as the kernels of an artifact are."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import tvm

from ..linker import find_linker
from ..runtime.threads import ThreadPool
from ..targets import Target


def load_kernel(kernel: tvm.tirx.PrimFunc, place: Target, threads: int) -> Callable:
    """Takes the kernel's tensors. Raises TargetError without a linker."""
    module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    built = tvm.compile(module, target=place.tvm_target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.so"
        built.export_library(str(path), fcompile=find_linker(place))
        library = tvm.runtime.load_module(str(path))
        ThreadPool(path).use(threads)
    return library["main"]
