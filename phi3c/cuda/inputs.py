"""Small inputs of a call, copied to memory on a GPU that stays allocated."""

from __future__ import annotations

import numpy as np
import tvm


class Inputs:
    """Memory for each input by its name, grown when a larger one comes.

    An allocation takes CUDA tens of microseconds, and freeing one waits for the device: a decode
    step would spend more on its ten inputs of a few bytes than on launching its kernels. A tensor
    that was given out holds its values until the next one of that name is asked for; kernels that
    were launched before still read the old ones, as a copy waits its turn.
    """

    def __init__(self, device: tvm.runtime.Device):
        self._device = device
        self._memory: dict[str, tuple[np.ndarray, tvm.runtime.Tensor, tvm.runtime.Tensor]] = {}

    def tensor(self, name: str, array: np.ndarray) -> tvm.runtime.Tensor:
        """The array, on the device."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        view, here, there = self._grown(name, data.size)
        view[: data.size] = data
        # The memory here is not pinned, so the driver has read it all when the call returns.
        here._create_view(data.shape).copyto(there._create_view(data.shape))
        return there._create_view(array.shape, str(array.dtype))

    def _grown(self, name: str, size: int):
        known = self._memory.get(name)
        if known is None or known[0].size < size:
            here = tvm.runtime.empty((2 * size,), "uint8")
            there = tvm.runtime.empty((2 * size,), "uint8", self._device)
            known = self._memory[name] = (np.from_dlpack(here), here, there)
        return known
