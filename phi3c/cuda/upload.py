"""Copies arrays of the host to a GPU in a stream of chunks through pinned memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import tvm
import tvm_ffi

CHUNK_BYTES = 32 << 20


def uploaded(
    arrays: Iterable[np.ndarray], device: tvm.runtime.Device, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tvm.runtime.Tensor]:
    """Tensors on the device, in the order of the arrays.

    A chunk is read from the array (a mapped file: from disk) while the one before it is under way:
    the driver copies from pinned memory by itself, from other memory only by way of its own.
    """
    host = tvm.device(tvm_ffi.DLDeviceType.kDLCUDAHost, device.index)
    pinned = [tvm.runtime.empty((chunk_bytes,), "uint8", host) for _ in range(2)]
    views = [np.from_dlpack(tensor) for tensor in pinned]
    turn = 0
    for array in arrays:
        tensor = tvm.runtime.empty(array.shape, str(array.dtype), device)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, data.size, chunk_bytes):
            chunk = data[start : start + chunk_bytes]
            views[turn][: chunk.size] = chunk
            device.sync()  # the other chunk has arrived: its memory is filled next
            target = tensor._create_view((chunk.size,), "uint8", start)
            pinned[turn]._create_view((chunk.size,)).copyto(target)
            turn = 1 - turn
        yield tensor
    device.sync()
