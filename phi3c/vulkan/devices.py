"""What there is of Vulkan devices, and whether one suffices."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields

from ..errors import DeviceError
from ..memory import in_units
from .library import load_runtime, runtime_function


@dataclass(frozen=True)
class VulkanDevice:
    """A physical device with a compute queue; sizes are in bytes."""

    index: int  # as in tvm.vulkan(index)
    name: str
    driver: str  # name and version
    api_version: tuple[int, int, int]
    kind: str  # discrete, integrated, virtual, cpu, other

    shader_int8: bool
    shader_int16: bool
    shader_int64: bool
    shader_float16: bool
    shader_float64: bool
    storage_buffer_8bit: bool
    storage_buffer_16bit: bool
    push_descriptors: bool
    timestamps: bool  # whether kernels can be timed

    subgroup_size: int
    subgroup_operations: int  # VkSubgroupFeatureFlags, of compute shaders
    max_storage_buffer_range: int
    max_allocation: int
    max_storage_buffers: int  # of a kernel
    max_shared_memory: int
    max_workgroup_invocations: int
    max_workgroup_size: tuple[int, int, int]
    max_workgroup_count: tuple[int, int, int]
    max_push_constants: int
    memory_bytes: int

    def __str__(self) -> str:
        return f"vulkan:{self.index} ({self.name}, driver {self.driver})"


def devices() -> list[VulkanDevice]:
    """In the order of TVM's device ids: discrete, integrated, virtual, CPU.

    Empty where there is no driver. Raises DeviceError where there is no Vulkan loader; also what
    `load_runtime` raises.
    """
    load_runtime()
    return [
        _device(index, dict(found)) for index, found in enumerate(runtime_function("devices")())
    ]


def _device(index: int, found: dict) -> VulkanDevice:
    found["api_version"] = [int(part) for part in str(found["api_version"]).split(".")]
    values = {}
    for field in fields(VulkanDevice):
        if field.name == "index":
            continue
        value = found[field.name]
        if field.type == "str":
            value = str(value)
        elif field.type == "bool":
            value = bool(value)
        elif field.type == "int":
            value = int(value)
        else:
            value = tuple(int(part) for part in value)
        values[field.name] = value
    return VulkanDevice(index=index, **values)


_FEATURES = {
    "shader_int8": "8-bit integers (shaderInt8)",
    "shader_int16": "16-bit integers (shaderInt16)",
    "shader_int64": "64-bit integers (shaderInt64)",
    "shader_float16": "16-bit floats (shaderFloat16)",
    "shader_float64": "64-bit floats (shaderFloat64)",
    "storage_buffer_8bit": "8-bit storage (storageBuffer8BitAccess)",
    "storage_buffer_16bit": "16-bit storage (storageBuffer16BitAccess)",
}


def check_device(
    device: VulkanDevice,
    *,
    features: Collection[str] = (),
    storage_buffer_range: int = 0,
    shared_memory: int = 0,
    workgroup_invocations: int = 0,
    workgroup_size: tuple[int, int, int] = (0, 0, 0),
    workgroup_count: tuple[int, int, int] = (0, 0, 0),
    storage_buffers: int = 0,
    push_constants: int = 0,
    subgroup_size: int = 0,
    subgroup_operations: int = 0,
    memory: int = 0,
) -> None:
    """Raises DeviceError if kernels that need so much (sizes in bytes) cannot run on the device.

    features: of VulkanDevice, by name; subgroup_size: exactly, if not 0. Every kernel needs
    Vulkan 1.1.
    """
    if device.api_version < (1, 1):
        found = ".".join(map(str, device.api_version))
        raise DeviceError(f"{device}: knows Vulkan {found}; needed: 1.1 or later")
    for feature in features:
        if not getattr(device, feature):
            raise DeviceError(f"{device}: has no {_FEATURES[feature]}, which kernels need")
    if subgroup_size not in (0, device.subgroup_size):
        raise DeviceError(
            f"{device}: kernels need subgroups of {subgroup_size} threads; it has "
            f"{device.subgroup_size}"
        )
    if lacking := subgroup_operations & ~device.subgroup_operations:
        raise DeviceError(
            f"{device}: kernels need subgroup operations {subgroup_operations} "
            f"(VkSubgroupFeatureFlags); it lacks {lacking}"
        )
    for what, needed, found in (
        ("bytes of one buffer", storage_buffer_range, device.max_storage_buffer_range),
        ("bytes of shared memory", shared_memory, device.max_shared_memory),
        ("threads in a workgroup", workgroup_invocations, device.max_workgroup_invocations),
        ("bytes of push constants", push_constants, device.max_push_constants),
        ("storage buffers", storage_buffers, device.max_storage_buffers),
    ):
        if needed > found:
            raise DeviceError(f"{device}: kernels need {needed} {what}; it accepts {found}")
    for what, wanted, limits in (
        ("workgroups of {} threads", workgroup_size, device.max_workgroup_size),
        ("{} workgroups", workgroup_count, device.max_workgroup_count),
    ):
        if any(n > f for n, f in zip(wanted, limits, strict=True)):
            raise DeviceError(f"{device}: kernels need {what.format(wanted)}; it accepts {limits}")
    if memory > device.memory_bytes:
        raise DeviceError(
            f"{device}: {in_units(memory)} of memory are needed; it has "
            f"{in_units(device.memory_bytes)}"
        )
