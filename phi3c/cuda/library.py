"""TVM's CUDA runtime: loaded where TVM did not do it by itself, or the reason why it cannot be."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

import tvm
import tvm_ffi

from ..errors import DeviceError
from .driver import NEEDED_CUDA, driver_version

_API = "device_api.cuda"
_CUDART = "libcudart.so.13"
_RUNTIME = "libtvm_runtime_cuda.so"


def load_runtime() -> None:
    """Makes `tvm.cuda()` work. Raises DeviceError: no driver or too old a one, CUDA's runtime
    library or TVM's is missing."""
    if (found := driver_version()) < NEEDED_CUDA:
        raise DeviceError(
            f"cuda: the driver is for CUDA {_dotted(found)}; needed: one for {_dotted(NEEDED_CUDA)}"
            " or later (580 or later)"
        )
    if tvm_ffi.get_global_func(_API, allow_missing=True) is not None:
        return
    _load_cudart()
    path = Path(tvm.libinfo.find_libtvm_runtime()).with_name(_RUNTIME)
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        raise DeviceError(f"cuda: TVM's CUDA runtime does not load: {error}") from None


def _load_cudart() -> None:
    """Of the system, or of NVIDIA's wheel, which the system's loader does not look into."""
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    wheels = [str(path) for folder in folders for path in folder.glob(f"*/lib/{_CUDART}")]
    for name in (_CUDART, *wheels):
        try:
            ctypes.CDLL(name)
            return
        except OSError:
            continue
    raise DeviceError(
        f"cuda: found no {_CUDART}, CUDA's runtime library (pip install nvidia-cuda-runtime, "
        "or CUDA 13)"
    )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
