"""What makes TVM generate the code of a target's device, and what that code asks of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from . import metal
from .cuda import codegen as cuda
from .manifest import DeviceNeeds
from .spirv.codegen import collected, register
from .spirv.kernel import POD_BYTES, Kernel
from .targets import Target
from .vulkan import load_runtime


@contextmanager
def device_code(place: Target) -> Iterator[Callable[[], DeviceNeeds | None]]:
    """Inside, TVM can build for the target; then the function says what was built.

    Raises DeviceError where the part of TVM's runtime that holds the code cannot be compiled, and
    TargetError where a kernel asks for more than every device grants.
    """
    if place.device == "cuda":
        with cuda.collected(place.arch) as made:
            yield lambda: _cuda_needs(made)
    elif place.device == "metal":
        with metal.collected() as built:
            yield lambda: _metal_needs(metal.kernels_of(built))
    elif place.device == "vulkan":
        load_runtime()
        register()
        with collected() as kernels:
            yield lambda: _vulkan_needs(kernels)
    else:
        yield lambda: None


def _cuda_needs(made: cuda.Collected) -> DeviceNeeds:
    kernels = [kernel for code in made.codes for kernel in code.kernels]
    assert {kernel.name for kernel in kernels} == set(made.threads), "a kernel without bounds"
    return DeviceNeeds(
        kernels=len(kernels),
        threads=max(made.threads.values()),
        shared_bytes=max(kernel.shared_bytes for kernel in kernels),
        code_bytes=sum(len(code.fat_binary) for code in made.codes),
        arch=made.arch,
    )


def _vulkan_needs(kernels: Sequence[Kernel]) -> DeviceNeeds:
    threads = [x * y * z for x, y, z in (kernel.workgroup for kernel in kernels)]
    plain = [sum(dtype != "handle" for dtype in kernel.arguments) for kernel in kernels]
    return DeviceNeeds(
        kernels=len(kernels),
        threads=max(threads),
        shared_bytes=max(kernel.shared_bytes for kernel in kernels),
        code_bytes=sum(len(kernel.spirv) for kernel in kernels),
        argument_bytes=POD_BYTES * max(plain),
    )


def _metal_needs(kernels: Sequence[metal.MetalKernel]) -> DeviceNeeds:
    return DeviceNeeds(
        kernels=len(kernels),
        threads=max(kernel.threads for kernel in kernels),
        shared_bytes=max(kernel.shared_bytes for kernel in kernels),
        code_bytes=0,  # source: it is in the library as text
        argument_bytes=metal.PLAIN_BYTES * max(kernel.plain for kernel in kernels),
    )
