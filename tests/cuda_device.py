"""Whether there is a GPU with CUDA."""

from __future__ import annotations

import pytest

from phi3c.cuda.driver import devices
from phi3c.errors import DeviceError


def found_gpu() -> bool:
    try:
        return bool(devices())
    except DeviceError:
        return False


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not found_gpu(), reason="no GPU with CUDA")]
