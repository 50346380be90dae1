"""Small inputs of a call, copied together to memory on a GPU that stays allocated."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import tvm
from tvm.runtime import Tensor

from .tensor_at import tensor_at

_ALIGNED = 64  # bytes, TVM's own alignment: kernels may load whole vectors
_MOST_LAYOUTS = 64
_FEWEST_BYTES = 4096

_Key = tuple[tuple[str, tuple[int, ...], np.dtype], ...]


class Inputs:
    """An allocation takes CUDA tens of microseconds, freeing one waits for the device, and every
    copy is a call of the driver, which may wait for it: a decode step would spend more on its ten
    inputs of a few bytes than on launching its kernels. So they are put side by side and copied at
    once, and what describes them is kept for the next call of the same shapes.

    Tensors that were given out hold their values until the next call; kernels that were launched
    before still read the old ones, as a copy waits its turn.
    """

    def __init__(self, device: tvm.runtime.Device):
        self._device = device
        self._size = -1  # bytes; nothing is allocated yet
        self._layouts: OrderedDict[_Key, _Layout] = OrderedDict()

    def tensors(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """The arrays, on the device."""
        if not arrays:
            return {}
        key = tuple((name, array.shape, array.dtype) for name, array in arrays.items())
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._laid_out(key)
        self._layouts.move_to_end(key)
        for place, array in zip(layout.places, arrays.values(), strict=True):
            place[...] = array
        # The memory here is not pinned, so the driver has read it all when the call returns.
        layout.here.copyto(layout.there)
        return layout.tensors

    def _laid_out(self, key: _Key) -> _Layout:
        offsets, size = [], 0
        for _, shape, dtype in key:
            offsets.append(size)
            size += -(-int(np.prod(shape)) * dtype.itemsize // _ALIGNED) * _ALIGNED
        if size > self._size:
            self._size = max(_FEWEST_BYTES, 2 * size)
            self._layouts.clear()  # they are in the old memory
            self._here = tvm.runtime.empty((self._size,), "uint8")
            self._there = tvm.runtime.empty((self._size,), "uint8", self._device)
        layout = self._layouts[key] = _Layout(self._here, self._there, key, offsets, size)
        if len(self._layouts) > _MOST_LAYOUTS:
            self._layouts.popitem(last=False)
        return layout


class _Layout:
    """Where the inputs of some shapes lie, one after another: `places`, arrays of the host in
    `here`, and `tensors` of the device in `there`."""

    def __init__(self, here: Tensor, there: Tensor, key: _Key, offsets: list[int], size: int):
        self.here, self.there = here._create_view((size,)), there._create_view((size,))
        data = np.from_dlpack(self.here)
        self.places: list[np.ndarray] = []
        self.tensors: dict[str, Tensor] = {}
        for (name, shape, dtype), offset in zip(key, offsets, strict=True):
            end = offset + int(np.prod(shape)) * dtype.itemsize
            self.places.append(data[offset:end].view(dtype).reshape(shape))
            self.tensors[name] = tensor_at(there, offset, shape, str(dtype))
