"""Loads the runtime library into TVM."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import tvm
import tvm_ffi

from ..errors import ArtifactError, DeviceError, OutOfMemoryError
from .build import runtime_library

_lock = threading.Lock()
_library: ctypes.CDLL | None = None  # stays loaded: TVM holds functions of it


def load_runtime(
    *,
    loader: str | Path | None = None,
    cache: str | Path | None = None,
    flags: Sequence[str] = (),
) -> None:
    """Gives TVM the device `vulkan` and modules of that kind; compiles the library if need be.

    Does nothing the second time, nor for a TVM that has a Vulkan runtime of its own. Does not touch
    Vulkan: a machine without a device can load it, to compile for others.

    loader: Vulkan's loader, a path or a name for dlopen; None: the system's.
    cache: the folder of the compiled library and of the drivers' pipeline caches; None:
        `phi3c/vulkan` in XDG_CACHE_HOME or ~/.cache.
    flags: for the C++ compiler, beside the usual ones.

    Raises DeviceError where it cannot be compiled or loaded; OSError if the cache cannot be
    written.
    """
    global _library
    with _lock:
        if _library is not None or _function("device_api.vulkan") is not None:
            return
        folder = default_cache() if cache is None else Path(cache)
        path = runtime_library(folder, flags)
        # The classes of the kinds in failure.h.
        for error in (DeviceError, OutOfMemoryError, ArtifactError):
            tvm_ffi.register_error(f"phi3c.{error.__name__}", error)
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise DeviceError(f"vulkan: the runtime library does not load: {error}") from None
        runtime_function("set_cache_folder")(str(folder))
        if loader is not None:
            runtime_function("set_library")(str(loader))
        _library = library


def tvm_has_vulkan() -> bool:
    """Whether TVM itself was built with a Vulkan runtime, which is then the one that runs kernels.

    Raises as `load_runtime` does.
    """
    load_runtime()
    return _library is None


def module_from_bytes(data: bytes) -> tvm.runtime.Module:
    """The module of kind "vulkan" of these bytes (format: module_format.h).

    Needs neither a device nor a Vulkan loader until a kernel is called. Raises ArtifactError if
    the bytes are damaged; also what `load_runtime` raises.
    """
    load_runtime()
    return tvm_ffi.get_global_func("ffi.Module.load_from_bytes.vulkan")(data)


def save_pipelines() -> None:
    """Writes the drivers' pipeline caches to disk now; else it is done from time to time."""
    load_runtime()
    runtime_function("save_pipelines")()


def runtime_function(name: str) -> Callable:
    """A function of the loaded library. Raises DeviceError if TVM's own runtime is used."""
    function = _function(f"phi3c.vulkan.{name}")
    if function is None:
        raise DeviceError(
            f"vulkan: {name}: this TVM has a Vulkan runtime of its own, which does not offer it"
        )
    return function


def default_cache() -> Path:
    """`phi3c/vulkan` in XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "phi3c" / "vulkan"


def _function(name: str) -> Callable | None:
    return tvm_ffi.get_global_func(name, allow_missing=True)
