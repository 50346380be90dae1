"""What makes TVM generate the code of a target's device, and what that code asks of the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import metal
from .cuda import codegen as cuda
from .cuda.packing import pack_imports
from .errors import TargetError
from .manifest import DeviceNeeds
from .spirv.codegen import collected, register
from .spirv.kernel import Kernel
from .targets import Target
from .vulkan import load_runtime


@dataclass(frozen=True)
class DeviceBuild:
    """To be asked when TVM has built. needs: of the device; options: how `export_library` packs
    what was built for it."""

    needs: Callable[[], DeviceNeeds | None] = lambda: None
    options: Callable[[], dict[str, Any]] = dict


@contextmanager
def device_code(place: Target) -> Iterator[DeviceBuild]:
    """Inside, TVM can build for the target.

    Raises DeviceError where the part of TVM's runtime that holds the code cannot be compiled, and
    TargetError where a kernel cannot be compiled or does not fit the device.
    """
    if place.device == "cuda":
        with cuda.collected(place.arch) as made:
            yield DeviceBuild(lambda: _cuda_needs(made), lambda: _cuda_options(made))
    elif place.device == "metal":
        with metal.collected() as built:
            yield DeviceBuild(lambda: _metal_needs(metal.kernels_of(built)))
    elif place.device == "vulkan":
        load_runtime()
        register()
        with collected() as kernels:
            yield DeviceBuild(lambda: _vulkan_needs(kernels))
    else:
        yield DeviceBuild()


def _cuda_options(made: cuda.Collected) -> dict[str, Any]:
    codes = {source: code.fat_binary for source, code in made.codes.items()}
    return {"fpack_imports": pack_imports(codes)}


def _cuda_needs(made: cuda.Collected) -> DeviceNeeds:
    codes = made.codes.values()
    kernels = [kernel for code in codes for kernel in code.kernels]
    return DeviceNeeds(
        kernels=len(kernels),
        threads=max(made.threads.values()),
        shared_bytes=max(kernel.shared_bytes for kernel in kernels),
        arch=made.arch,
    )


def _vulkan_needs(kernels: Sequence[Kernel]) -> DeviceNeeds:
    sizes = {kernel.subgroup_size for kernel in kernels} - {0}
    if len(sizes) > 1:
        raise TargetError(f"vulkan: found kernels for subgroups of {sorted(sizes)}; accepted: one")
    operations = 0
    for kernel in kernels:
        operations |= kernel.subgroup_operations
    return DeviceNeeds(
        kernels=len(kernels),
        threads=max(math.prod(kernel.workgroup) for kernel in kernels),
        shared_bytes=max(kernel.shared_bytes for kernel in kernels),
        argument_bytes=max(kernel.argument_bytes for kernel in kernels),
        features=tuple(sorted({feature for kernel in kernels for feature in kernel.features})),
        storage_buffers=max(kernel.storage_buffers for kernel in kernels),
        workgroup=_most(kernel.workgroup for kernel in kernels),
        grid=_most(kernel.grid for kernel in kernels),
        subgroup_size=max(sizes, default=0),
        subgroup_operations=operations,
    )


def _most(extents: Iterable[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Along each axis."""
    x, y, z = zip(*extents, strict=True)
    return max(x), max(y), max(z)


def _metal_needs(kernels: Sequence[metal.MetalKernel]) -> DeviceNeeds:
    return DeviceNeeds(
        kernels=len(kernels),
        threads=max(kernel.threads for kernel in kernels),
        shared_bytes=max(kernel.shared_bytes for kernel in kernels),
        argument_bytes=metal.PLAIN_BYTES * max(kernel.plain for kernel in kernels),
    )
