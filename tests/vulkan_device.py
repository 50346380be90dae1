"""Runs single kernels on the Vulkan device that is there; CI's is Mesa's lavapipe."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import tvm

from phi3c.errors import DeviceError
from phi3c.kernels.root import hand_scheduled
from phi3c.pipeline import kernel_lowering
from phi3c.spirv.codegen import register
from phi3c.targets import parse_target
from phi3c.vulkan import devices, load_runtime


@cache
def found_device() -> bool:
    try:
        return bool(devices())
    except DeviceError:
        return False


needs_device = pytest.mark.skipif(not found_device(), reason="no Vulkan device")


def built(function, target: str = "vulkan") -> tvm.runtime.Module:
    """A kernel as a callable of tensors on `tvm.vulkan()`."""
    load_runtime()
    register()
    function = function.with_attr("global_symbol", "main")
    module = tvm.IRModule({"main": function})
    with kernel_lowering("vulkan"):
        return tvm.compile(module, target=parse_target(target).tvm_target)


def run(function, arrays: list[np.ndarray], shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Of a function of inputs and one output, which may use all that the device has."""
    device = tvm.vulkan()
    inputs = [tvm.runtime.tensor(array, device) for array in arrays]
    output = tvm.runtime.empty(shape, dtype, device)
    built(hand_scheduled(function), "vulkan:native")["main"](*inputs, output)
    return output.numpy()


class DeviceKernel:
    """A kernel that takes tensors of the host, as the CPU's do: copies them there and back."""

    def __init__(self, function):
        self._kernel = built(function)["main"]

    def __call__(self, *tensors: tvm.runtime.Tensor) -> None:
        there = [tvm.runtime.tensor(tensor.numpy(), tvm.vulkan()) for tensor in tensors]
        self._kernel(*there)
        for tensor, copy in zip(tensors, there, strict=True):
            tensor.copyfrom(copy.numpy())
