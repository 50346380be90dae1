"""Whether a target's attributes grant what a kernel needs of a device."""

from __future__ import annotations

import math

from tvm.target import Target

from ..errors import TargetError
from .kernel import Kernel

# Feature → the attribute of TVM's target that grants it.
_GRANTS = {
    "shader_float64": "supports_float64",
    "shader_int64": "supports_int64",
    "storage_buffer_8bit": "supports_8bit_buffer",
    "storage_buffer_16bit": "supports_16bit_buffer",
}


def check_granted(kernel: Kernel, target: Target) -> None:
    """Raises TargetError if the kernel needs what the target's attributes do not grant; a size
    that they leave out is not limited."""
    place = f"vulkan: the kernel {kernel.name}"
    hint = "(--target vulkan:native grants what the device here has)"
    for feature in kernel.features:
        if not target.attrs.get(_GRANTS[feature], False):
            raise TargetError(
                f"{place}: found {feature}; accepted: what the target grants, and it lacks "
                f"{_GRANTS[feature]} {hint}"
            )
    operations = int(target.attrs.get("supported_subgroup_operations", 0))
    if lacking := kernel.subgroup_operations & ~operations:
        raise TargetError(
            f"{place}: found subgroup operations {kernel.subgroup_operations}; accepted: what the "
            f"target grants, and its supported_subgroup_operations lacks {lacking} {hint}"
        )
    x, y, z = kernel.workgroup
    for what, found, attribute in (
        ("threads in a workgroup", math.prod(kernel.workgroup), "max_threads_per_block"),
        ("threads in x", x, "max_block_size_x"),
        ("threads in y", y, "max_block_size_y"),
        ("threads in z", z, "max_block_size_z"),
        ("bytes of shared memory", kernel.shared_bytes, "max_shared_memory_per_block"),
        ("bytes of push constants", kernel.argument_bytes, "max_push_constants_size"),
        ("storage buffers", kernel.storage_buffers, "max_per_stage_descriptor_storage_buffer"),
    ):
        most = target.attrs.get(attribute)
        if most is not None and found > int(most):
            raise TargetError(
                f"{place}: found {found} {what}; accepted: {most}, the target's {attribute}"
            )
