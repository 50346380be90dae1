"""Where a loaded model's kernels run: the CPU, or one of the GPUs that are there."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

from ..artifact import Artifact
from ..errors import DeviceError, OutOfMemoryError, TargetError
from ..manifest import Manifest
from ..memory import in_units
from ..tensor_file import tensor_bytes
from ..vulkan import KernelTime, VulkanDevice, check_device, devices, profiled, statistics
from .host import check_memory


class RunDevice(Protocol):
    """tvm: as TVM names it."""

    tvm: tvm.runtime.Device

    def parameter(self, array: np.ndarray) -> tvm.runtime.Tensor:
        """A mapped parameter, for kernels."""

    def check_memory(self, what: str, parts: dict[str, int]) -> None:
        """Raises OutOfMemoryError if `parts` (name → bytes) do not fit now."""

    def check_buffer(self, what: str, size: int) -> None:
        """Raises DeviceError if a kernel cannot be given a tensor of so many bytes."""

    def kernel_times(self, vm: VirtualMachine) -> AbstractContextManager[dict[str, KernelTime]]:
        """Times what `vm` runs inside; filled at the end."""


Gpu = TypeVar("Gpu", bound=RunDevice)


class HostCpu:
    """The CPU: parameters stay where they are mapped, tensors have any size."""

    tvm = tvm.cpu()

    def parameter(self, array: np.ndarray) -> tvm.runtime.Tensor:
        return tvm.runtime.from_dlpack(array)

    def check_memory(self, what: str, parts: dict[str, int]) -> None:
        check_memory(what, parts)

    def check_buffer(self, what: str, size: int) -> None:
        pass

    def kernel_times(self, vm: VirtualMachine) -> AbstractContextManager[dict[str, KernelTime]]:
        return _timed_calls(vm, lambda: None)


class VulkanGpu:
    """A device with Vulkan: parameters are copied there, one at a time."""

    def __init__(self, found: VulkanDevice):
        self._found = found
        self.tvm = tvm.vulkan(found.index)

    def parameter(self, array: np.ndarray) -> tvm.runtime.Tensor:
        return tvm.runtime.tensor(array, self.tvm)

    def check_memory(self, what: str, parts: dict[str, int]) -> None:
        needed = sum(parts.values())
        available = self._found.memory_bytes - statistics(self._found.index).bytes_in_use
        if needed > available:
            detail = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items())
            raise OutOfMemoryError(
                f"{what}: needs {in_units(needed)} of memory ({detail}); found "
                f"{in_units(max(0, available))} available on {self._found}"
            )

    def check_buffer(self, what: str, size: int) -> None:
        """Kernels count the elements of a buffer in 32 bits, but a driver may allow fewer bytes."""
        most = min(self._found.max_storage_buffer_range, self._found.max_allocation)
        if size > most:
            raise DeviceError(
                f"{what}: found {in_units(size)}; accepted: up to {in_units(most)}, what "
                f"{self._found} takes as one buffer"
            )

    def kernel_times(self, vm: VirtualMachine) -> AbstractContextManager[dict[str, KernelTime]]:
        return profiled(self._found.index)


class MetalGpu:
    """A Mac's GPU, by TVM's own runtime. No part of it has been run: there was no Mac."""

    def __init__(self, index: int, storage_bits: int):
        """storage_bits: the narrowest values in buffers. Raises DeviceError if it is not there."""
        self.tvm = tvm.metal(index)
        if not self.tvm.exist:
            raise DeviceError(
                f"device: found metal:{index}; accepted: one that is there, for a TVM that was "
                "built with Metal"
            )
        self._most = 2**31 * storage_bits // 8

    def parameter(self, array: np.ndarray) -> tvm.runtime.Tensor:
        return tvm.runtime.tensor(array, self.tvm)

    def check_memory(self, what: str, parts: dict[str, int]) -> None:
        """Against the working set that Metal recommends, what is in use of it unknown: the GPU's
        memory is the machine's."""
        needed, most = sum(parts.values()), self.tvm.total_global_memory
        if most and needed > most:
            detail = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items())
            raise OutOfMemoryError(
                f"{what}: needs {in_units(needed)} of memory ({detail}); Metal recommends up to "
                f"{in_units(most)}"
            )

    def check_buffer(self, what: str, size: int) -> None:
        """Kernels count the elements of a buffer in 32 bits."""
        if size > self._most:
            raise DeviceError(
                f"{what}: found {in_units(size)}; accepted: up to {in_units(self._most)}, what "
                "kernels for Metal take as one buffer"
            )

    def kernel_times(self, vm: VirtualMachine) -> AbstractContextManager[dict[str, KernelTime]]:
        """Of calls that wait for the GPU, so their sum is more than the time without this."""
        return _timed_calls(vm, self.tvm.sync)


@contextmanager
def _timed_calls(vm: VirtualMachine, finish: Callable[[], None]) -> Iterator[dict[str, KernelTime]]:
    """Times every call of the virtual machine, until `finish` returns."""
    started: list[float] = []
    spent: dict[str, list[float]] = defaultdict(list)

    def instrument(function, name: str, before: bool, result, *args) -> None:
        finish()
        if before:
            started.append(time.perf_counter())
        else:
            spent[name].append(time.perf_counter() - started.pop())

    times: dict[str, KernelTime] = {}
    vm.set_instrument(instrument)
    try:
        yield times
    finally:
        vm.set_instrument(lambda *_: None)
        times |= {name: KernelTime(len(each), sum(each)) for name, each in spent.items()}


def open_device(artifact: Artifact, name: str | None) -> RunDevice:
    """name: `cpu`, `vulkan`, `vulkan:<index>`, `metal` or `metal:<index>`; None: the artifact's own
    kind, the first of it.

    Raises TargetError for another kind, and DeviceError where there is no such device, or it lacks
    what the kernels or the weights need.
    """
    kind = artifact.manifest.target.device
    accepted = "cpu, or None" if kind == "cpu" else f"{kind}, {kind}:<index>, or None"
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", str(name or kind))
    if match is None or match[1] != kind or (kind == "cpu" and match[2]):
        raise TargetError(
            f"device: found {name!r}; accepted: {accepted}, as {artifact.path} was compiled for "
            f"{artifact.manifest.target.name}"
        )
    index = int(match[2] or 0)
    if kind == "cpu":
        return HostCpu()
    return {"vulkan": _open_vulkan, "metal": _open_metal}[kind](artifact.manifest, index)


def _open_vulkan(manifest: Manifest, index: int) -> VulkanGpu:
    found = devices()
    if index >= len(found):
        there = ", ".join(map(str, found)) or "none, as no driver is installed"
        raise DeviceError(
            f"device: found vulkan:{index}; accepted: one that is there: {there} (a driver for "
            "CPUs, on Debian: apt install mesa-vulkan-drivers)"
        )
    needs = manifest.target.needs
    check_device(
        found[index],
        shared_memory=needs.shared_bytes,
        workgroup_invocations=needs.threads,
        push_constants=needs.argument_bytes,
    )
    return _checked_parameters(VulkanGpu(found[index]), manifest)


def _open_metal(manifest: Manifest, index: int) -> MetalGpu:
    """Kernels need no more than every Mac's GPU grants: metal.py, when they were compiled."""
    return _checked_parameters(MetalGpu(index, manifest.target.needs.storage_bits), manifest)


def _checked_parameters(device: Gpu, manifest: Manifest) -> Gpu:
    for info in manifest.parameters:
        device.check_buffer(info.name, tensor_bytes(info.shape, info.dtype))
    return device
