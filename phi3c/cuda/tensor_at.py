"""Tensors that begin inside another one's memory.

TVM's own views keep the address of the whole and an offset beside it, which compiled functions
refuse; so the offset is added to the address, in the struct by which DLPack hands a tensor on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import tvm
from tvm.runtime import Tensor

_CAPSULE = b"dltensor"


class _DLTensor(ctypes.Structure):
    """What DLPack's DLManagedTensor begins with."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Moved:
    """Hands on a view whose address is where it begins."""

    def __init__(self, view: Tensor):
        self._device = view.__dlpack_device__()
        self._capsule = view._to_dlpack()
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.restype = ctypes.c_void_p
        pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]
        described = _DLTensor.from_address(pointer_of(self._capsule, _CAPSULE))
        described.data += described.byte_offset
        described.byte_offset = 0

    def __dlpack__(self, **_: object) -> object:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device


def tensor_at(base: Tensor, offset: int, shape: Sequence[int], dtype: str) -> Tensor:
    """`shape` of `dtype`, in the memory of `base`, which lives as long, from `offset` bytes on."""
    return tvm.runtime.from_dlpack(_Moved(base._create_view(tuple(shape), dtype, offset)))
