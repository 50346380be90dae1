"""The GPUs that there are, asked of NVIDIA's driver itself: no part of TVM or CUDA's toolkit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import DeviceError

_LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
NEEDED_CUDA = (13, 0)  # the version that TVM's CUDA runtime and our PTX are made with


@dataclass(frozen=True)
class CudaDevice:
    """capability: NVIDIA's compute capability; memory_bytes: all of its memory."""

    index: int  # as in tvm.cuda(index)
    name: str
    capability: tuple[int, int]
    memory_bytes: int

    @property
    def arch(self) -> str:
        major, minor = self.capability
        return f"sm_{major}{minor}"

    def __str__(self) -> str:
        return f"cuda:{self.index} ({self.name}, {self.arch})"


def devices() -> list[CudaDevice]:
    """Those that the process may see (CUDA_VISIBLE_DEVICES), in TVM's order.

    Empty where the driver finds none. Raises DeviceError: no driver, or it fails.
    """
    driver = _driver()
    return [] if driver is None else [_device(driver, index) for index in range(_count(driver))]


def driver_version() -> tuple[int, int]:
    """The newest CUDA that the driver runs. Raises DeviceError where there is no driver."""
    version = ctypes.c_int()
    _check("cuDriverGetVersion", _library().cuDriverGetVersion(ctypes.byref(version)))
    return version.value // 1000, version.value % 1000 // 10


def free_bytes(index: int) -> int:
    """Memory of a device that nobody has allocated. Raises DeviceError."""
    driver, device, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    if driver is None:
        raise DeviceError(f"cuda:{index}: the driver finds no GPU")
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    driver("cuDeviceGet", ctypes.byref(device), index)
    # The context that TVM uses too; it lives for as long as somebody holds it.
    driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        driver("cuCtxPushCurrent_v2", context)
        try:
            driver("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        finally:
            driver("cuCtxPopCurrent_v2", ctypes.byref(context))
    finally:
        driver("cuDevicePrimaryCtxRelease_v2", device)
    return free.value


def call_driver(name: str, *arguments: Any) -> None:
    """A function of the driver's, once it has begun. Raises DeviceError, naming its error."""
    _check(name, getattr(_library(), name)(*arguments))


def _count(driver: Callable[..., None]) -> int:
    count = ctypes.c_int()
    driver("cuDeviceGetCount", ctypes.byref(count))
    return count.value


def _device(driver: Callable[..., None], index: int) -> CudaDevice:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    size, values = ctypes.c_size_t(), []
    driver("cuDeviceGet", ctypes.byref(device), index)
    driver("cuDeviceGetName", name, len(name), device)
    driver("cuDeviceTotalMem_v2", ctypes.byref(size), device)
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        driver("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        values.append(value.value)
    return CudaDevice(index, name.value.decode(), (values[0], values[1]), size.value)


def _driver() -> Callable[..., None] | None:
    """What calls a function of the driver by name; None where it finds no device."""
    library = _library()
    status = library.cuInit(0)
    if status == _NO_DEVICE:
        return None
    _check("cuInit", status)
    return call_driver


@cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        raise DeviceError(
            f"cuda: found no driver ({_LIBRARY}); an NVIDIA GPU needs its driver, version 580 or "
            "later, which the system's vendor or NVIDIA supplies"
        ) from None


def _check(name: str, status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorName(status, ctypes.byref(text))
        error = text.value.decode() if text.value else str(status)
        raise DeviceError(f"cuda: the driver fails: {name}: {error}")
