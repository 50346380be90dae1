"""Where a loaded model's kernels run: the CPU, or one of the GPUs that are there."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import tvm
import tvm_ffi
from tvm.runtime.vm import VirtualMachine

from ..artifact import Artifact
from ..cuda.driver import CudaDevice, free_bytes
from ..cuda.driver import devices as cuda_devices
from ..cuda.graph import DecodeGraphs
from ..cuda.inputs import Inputs
from ..cuda.library import load_runtime as load_cuda_runtime
from ..cuda.upload import uploaded
from ..errors import DeviceError, OutOfMemoryError, TargetError
from ..manifest import Manifest
from ..memory import in_units
from ..tensor_file import tensor_bytes
from ..vulkan import (
    KernelTime,
    VulkanDevice,
    check_device,
    devices,
    profiled,
    tvm_has_vulkan,
)
from .host import check_memory

Shape = tuple[int, ...]


class RunDevice(Protocol):
    """tvm: as TVM names it."""

    tvm: tvm.runtime.Device

    def parameters(self, arrays: Iterable[np.ndarray]) -> list[tvm.runtime.Tensor]:
        """Mapped parameters, for kernels."""

    def inputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, tvm.runtime.Tensor]:
        """Copies of a call's inputs: kernels may load whole vectors, so they are aligned as TVM
        aligns.

        They may be gone when another call's are asked for.
        """

    def check_memory(self, what: str, parts: dict[str, int]) -> None:
        """Raises OutOfMemoryError if `parts` (name → bytes) do not fit now."""

    def check_buffer(self, what: str, shape: Shape, dtype: str) -> None:
        """Raises DeviceError if a kernel cannot be given such a tensor."""

    def kernel_times(self, vm: VirtualMachine) -> AbstractContextManager[dict[str, KernelTime]]:
        """Times what `vm` runs inside; filled at the end."""

    def decode_graphs(
        self, library: tvm_ffi.Module, path: Path, most_blocks: int
    ) -> DecodeGraphs | None:
        """What makes a decode step one launch, for devices that can."""


class HostCpu:
    """The CPU: parameters stay where they are mapped, tensors have any size."""

    tvm = tvm.cpu()

    def parameters(self, arrays: Iterable[np.ndarray]) -> list[tvm.runtime.Tensor]:
        return [tvm.runtime.from_dlpack(array) for array in arrays]

    def inputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, tvm.runtime.Tensor]:
        return {name: tvm.runtime.tensor(array, self.tvm) for name, array in arrays.items()}

    def check_memory(self, what: str, parts: dict[str, int]) -> None:
        check_memory(what, parts)

    def check_buffer(self, what: str, shape: Shape, dtype: str) -> None:
        pass

    def kernel_times(self, vm: VirtualMachine) -> AbstractContextManager[dict[str, KernelTime]]:
        return _call_times(vm)

    def decode_graphs(self, library: tvm_ffi.Module, path: Path, most_blocks: int) -> None:
        return None


class VulkanGpu:
    """A device with Vulkan: parameters are copied there, one at a time."""

    def __init__(self, found: VulkanDevice):
        self._found = found
        self.tvm = tvm.vulkan(found.index)

    def parameters(self, arrays: Iterable[np.ndarray]) -> list[tvm.runtime.Tensor]:
        return [tvm.runtime.tensor(array, self.tvm) for array in arrays]

    def inputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, tvm.runtime.Tensor]:
        # By way of a tensor: TVM waits for the device after a copy from an array.
        here = {name: tvm.runtime.tensor(array) for name, array in arrays.items()}
        return {
            name: tensor.copyto(tvm.runtime.empty(tensor.shape, tensor.dtype, self.tvm))
            for name, tensor in here.items()
        }

    def check_memory(self, what: str, parts: dict[str, int]) -> None:
        available = self.tvm.available_global_memory
        if sum(parts.values()) > available:
            raise OutOfMemoryError(_no_room(what, parts, available, str(self._found)))

    def check_buffer(self, what: str, shape: Shape, dtype: str) -> None:
        """Kernels count the elements of a buffer in 32 bits, but a driver may allow fewer bytes."""
        most = min(self._found.max_storage_buffer_range, self._found.max_allocation)
        if (size := tensor_bytes(shape, dtype)) > most:
            raise DeviceError(
                f"{what}: found {in_units(size)}; accepted: up to {in_units(most)}, what "
                f"{self._found} takes as one buffer"
            )

    def kernel_times(self, vm: VirtualMachine) -> AbstractContextManager[dict[str, KernelTime]]:
        return profiled(self._found.index)

    def decode_graphs(self, library: tvm_ffi.Module, path: Path, most_blocks: int) -> None:
        return None


class TvmGpu:
    """A GPU whose runtime TVM brings: parameters are copied there, one at a time."""

    def __init__(self, device: tvm.runtime.Device):
        self.tvm = device

    def parameters(self, arrays: Iterable[np.ndarray]) -> list[tvm.runtime.Tensor]:
        return [tvm.runtime.tensor(array, self.tvm) for array in arrays]

    def inputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, tvm.runtime.Tensor]:
        return {name: tvm.runtime.tensor(array, self.tvm) for name, array in arrays.items()}

    def check_memory(self, what: str, parts: dict[str, int]) -> None:
        """On a Mac, whose memory is the GPU's too, against what Metal recommends to use."""
        available = self.tvm.available_global_memory or self.tvm.total_global_memory
        if available and sum(parts.values()) > available:
            raise OutOfMemoryError(_no_room(what, parts, int(available), str(self.tvm)))

    def check_buffer(self, what: str, shape: Shape, dtype: str) -> None:
        """Kernels count the elements of a buffer in 32 bits."""
        size, elements = tensor_bytes(shape, dtype), math.prod(shape)
        if elements > _MOST_ELEMENTS:
            most = in_units(_MOST_ELEMENTS * (size // elements))
            raise DeviceError(
                f"{what}: found {in_units(size)}; accepted: up to {most} of {dtype}, what kernels "
                "address"
            )

    @contextmanager
    def kernel_times(self, vm: VirtualMachine) -> Iterator[dict[str, KernelTime]]:
        """Each call of the virtual machine is waited for."""
        with _call_times(vm, self.tvm.sync) as times:
            yield times

    def decode_graphs(
        self, library: tvm_ffi.Module, path: Path, most_blocks: int
    ) -> DecodeGraphs | None:
        return None


class CudaGpu(TvmGpu):
    """An NVIDIA GPU: parameters are copied there through pinned memory, inputs into memory that
    stays allocated."""

    def __init__(self, found: CudaDevice):
        super().__init__(tvm.cuda(found.index))
        self._found, self._inputs = found, Inputs(self.tvm)

    def parameters(self, arrays: Iterable[np.ndarray]) -> list[tvm.runtime.Tensor]:
        return list(uploaded(arrays, self.tvm))

    def inputs(self, arrays: Mapping[str, np.ndarray]) -> dict[str, tvm.runtime.Tensor]:
        return self._inputs.tensors(arrays)

    def check_memory(self, what: str, parts: dict[str, int]) -> None:
        """TVM would tell what is free on the device that it used last."""
        available = free_bytes(self._found.index)
        if sum(parts.values()) > available:
            raise OutOfMemoryError(_no_room(what, parts, available, str(self._found)))

    def decode_graphs(
        self, library: tvm_ffi.Module, path: Path, most_blocks: int
    ) -> DecodeGraphs | None:
        return DecodeGraphs(library, path, self.tvm, most_blocks)


_MOST_ELEMENTS = 2**31 - 1


def _no_room(what: str, parts: dict[str, int], available: int, place: str) -> str:
    detail = ", ".join(f"{name} {in_units(size)}" for name, size in parts.items())
    return (
        f"{what}: needs {in_units(sum(parts.values()))} of memory ({detail}); found "
        f"{in_units(max(0, available))} available on {place}"
    )


@contextmanager
def _call_times(
    vm: VirtualMachine, wait: Callable[[], None] = lambda: None
) -> Iterator[dict[str, KernelTime]]:
    """Of what a virtual machine calls inside; `wait`: until a call's kernels have ended."""
    started: list[float] = []
    spent: dict[str, list[float]] = defaultdict(list)

    def instrument(function, name: str, before: bool, result, *args) -> None:
        if before:
            started.append(time.perf_counter())
        else:
            wait()
            spent[name].append(time.perf_counter() - started.pop())

    times: dict[str, KernelTime] = {}
    vm.set_instrument(instrument)
    try:
        yield times
    finally:
        vm.set_instrument(lambda *_: None)
        times |= {name: KernelTime(len(each), sum(each)) for name, each in spent.items()}


def open_device(artifact: Artifact, name: str | None) -> RunDevice:
    """name: `cpu`, or `cuda`, `metal` or `vulkan`, with or without `:<index>`; None: the artifact's
    own kind, the first of it.

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
    if kind == "cpu":
        return HostCpu()
    index = int(match[2] or 0)
    opened = {"cuda": _open_cuda, "metal": _open_metal, "vulkan": _open_vulkan}[kind]
    device = opened(artifact.manifest, index)
    for info in artifact.manifest.parameters:
        device.check_buffer(info.name, info.shape, info.dtype)
    return device


def _open_cuda(manifest: Manifest, index: int) -> CudaGpu:
    there = cuda_devices()
    if index >= len(there):
        names = ", ".join(map(str, there)) or "none, as the driver finds no GPU"
        raise DeviceError(f"device: found cuda:{index}; accepted: one that is there: {names}")
    found, least = there[index], manifest.target.needs.arch
    major, minor = found.capability
    if 10 * major + minor < int(least.removeprefix("sm_")):
        raise DeviceError(
            f"device: found {found}; accepted: {least}, which the artifact was compiled for, or a "
            f"later one; compile it for this GPU (target cuda:{found.arch})"
        )
    load_cuda_runtime()
    return CudaGpu(found)


def _open_metal(manifest: Manifest, index: int) -> TvmGpu:
    """Kernels ask for no more than every Mac's GPU grants: metal.py, when they were compiled."""
    return _open_of_tvm(tvm.metal(index), "for a TVM that was built with Metal")


def _open_of_tvm(device: tvm.runtime.Device, hint: str) -> TvmGpu:
    if not device.exist:
        raise DeviceError(f"device: found {device}; accepted: one that is there, {hint}")
    return TvmGpu(device)


def _open_vulkan(manifest: Manifest, index: int) -> VulkanGpu | TvmGpu:
    if tvm_has_vulkan():
        return _open_of_tvm(tvm.vulkan(index), "as TVM's own Vulkan runtime finds it")
    found = devices()
    if index >= len(found):
        there = ", ".join(map(str, found)) or "none, as no driver is installed"
        raise DeviceError(
            f"device: found vulkan:{index}; accepted: one that is there: {there} (a driver for "
            "CPUs, on Debian: apt install mesa-vulkan-drivers)"
        )
    needs, rows = manifest.target.needs, manifest.limits.prefill_chunk_size
    x, y, z = needs.grid
    check_device(
        found[index],
        features=needs.features,
        shared_memory=needs.shared_bytes,
        workgroup_invocations=needs.threads,
        workgroup_size=needs.workgroup,
        workgroup_count=(max(x, rows), max(y, rows), z),
        storage_buffers=needs.storage_buffers,
        push_constants=needs.argument_bytes,
        subgroup_size=needs.subgroup_size,
        subgroup_operations=needs.subgroup_operations,
    )
    return VulkanGpu(found[index])
