"""One lowered device function → one SPIR-V module, with what a launch has to know of it.

Pointers are storage buffers of descriptor set 0, in their order; other arguments are push
constants, eight bytes each: the interface of TVM's own Vulkan runtime.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tvm import tirx

from ..errors import TargetError
from .expressions import Memory, dtype_of
from .module import INT32, DType, EmitError
from .opcodes import Capability, Decoration, Op, Storage
from .statements import Statements

_STORAGE_CAPABILITY = {8: Capability.STORAGE_BUFFER_8_BIT, 16: Capability.STORAGE_BUFFER_16_BIT}
# By VulkanDevice's names, as in phi3c/vulkan/devices.py.
_FEATURES = {
    Capability.FLOAT64: "shader_float64",
    Capability.INT64: "shader_int64",
    Capability.STORAGE_BUFFER_8_BIT: "storage_buffer_8bit",
    Capability.STORAGE_BUFFER_16_BIT: "storage_buffer_16bit",
}
_SUBGROUP_OPERATIONS = {  # Vulkan's VkSubgroupFeatureFlagBits
    Capability.GROUP_NON_UNIFORM: 1,
    Capability.GROUP_NON_UNIFORM_SHUFFLE: 16,
    Capability.GROUP_NON_UNIFORM_SHUFFLE_RELATIVE: 32,
}
POD_BYTES = 8


@dataclass(frozen=True)
class Kernel:
    """arguments: the dtype of each, `handle` for a buffer; launch: TVM's tags of the grid's axes,
    which follow the arguments of a call; spirv: the words, little-endian.

    What it needs of a device: workgroup, shared_bytes; grid: workgroups in x, y and z, 0 where
    their number depends on arguments; features: VulkanDevice's that must be there; subgroup_size,
    subgroup_operations (Vulkan's flags): 0 where it relies on none.
    """

    name: str
    arguments: tuple[str, ...]
    launch: tuple[str, ...]
    workgroup: tuple[int, int, int]
    grid: tuple[int, int, int]
    shared_bytes: int
    features: tuple[str, ...]
    subgroup_size: int
    subgroup_operations: int
    spirv: bytes

    @property
    def storage_buffers(self) -> int:
        return self.arguments.count("handle")

    @property
    def argument_bytes(self) -> int:
        """Of those that are no buffers."""
        return POD_BYTES * (len(self.arguments) - self.storage_buffers)


def emit_kernel(function: tirx.PrimFunc) -> Kernel:
    """A device function as TVM's passes leave it, for its target. Raises TargetError, naming the
    kernel and the node for which there is no SPIR-V."""
    name, target = str(function.attrs["global_symbol"]), function.attrs["target"]
    emitter = Statements(int(target.attrs.get("thread_warp_size", 1)))
    try:
        arguments = _declare(emitter, function.params)
        emitter.statement(function.body)
        _mark_what_is_only_read(emitter)
    except EmitError as err:
        raise TargetError(f"vulkan: the kernel {name}: no SPIR-V for {err}") from None
    workgroup = tuple(emitter.workgroup)
    words = emitter.module.assemble(name, workgroup)
    capabilities = emitter.module.capabilities
    return Kernel(
        name,
        arguments,
        launch=tuple(str(tag) for tag in function.attrs["tirx.kernel_launch_params"]),
        workgroup=workgroup,
        grid=tuple(emitter.grid),
        shared_bytes=emitter.shared_bytes,
        features=tuple(_FEATURES[one] for one in capabilities if one in _FEATURES),
        subgroup_size=emitter.subgroup_size,
        subgroup_operations=sum(_SUBGROUP_OPERATIONS.get(one, 0) for one in capabilities),
        spirv=struct.pack(f"<{len(words)}I", *words),
    )


def _declare(emitter: Statements, params) -> tuple[str, ...]:
    arguments, pods = [], []
    for param in params:
        if type(param.ty).__name__ == "PointerType":
            binding = arguments.count("handle")
            emitter.buffers[hash(param)] = _storage_buffer(emitter, param, binding)
            arguments.append("handle")
        else:
            pods.append(param)
            arguments.append(str(param.ty.dtype))
    if pods:
        _push_constants(emitter, pods)
    return tuple(arguments)


def _storage_buffer(emitter: Statements, param, binding: int) -> Memory:
    module, dtype = emitter.module, DType.parse(str(param.ty.element_type.dtype))
    if dtype.kind == "bool" or dtype.lanes != 1:
        raise EmitError(f"the argument {param.name}, a buffer of {param.ty.element_type.dtype}")
    if dtype.bits in _STORAGE_CAPABILITY:
        module.need(_STORAGE_CAPABILITY[dtype.bits])
    array = module.new_type(Op.TYPE_RUNTIME_ARRAY, module.type(dtype))
    module.decorate(array, Decoration.ARRAY_STRIDE, dtype.bits // 8)
    block = module.new_type(Op.TYPE_STRUCT, array)
    module.decorate(block, Decoration.BLOCK)
    module.decorate_member(block, 0, Decoration.OFFSET, 0)
    variable = module.global_variable(Storage.STORAGE_BUFFER, block)
    module.decorate(variable, Decoration.DESCRIPTOR_SET, 0)
    module.decorate(variable, Decoration.BINDING, binding)
    return Memory(variable, Storage.STORAGE_BUFFER, dtype, True)


def _mark_what_is_only_read(emitter: Statements) -> None:
    """So our runtime knows, and a driver may, that kernels that read it need no barrier between."""
    variables = {memory.variable for memory in emitter.buffers.values() if memory.in_block}
    for variable in sorted(variables - emitter.written):
        emitter.module.decorate(variable, Decoration.NON_WRITABLE)


def _push_constants(emitter: Statements, pods) -> None:
    module = emitter.module
    dtypes = [dtype_of(pod) for pod in pods]
    for pod, dtype in zip(pods, dtypes, strict=True):
        if dtype.bits < 32 or dtype.lanes != 1:
            raise EmitError(f"the argument {pod.name}, a {dtype}, not of 32 or 64 bits")
    block = module.new_type(Op.TYPE_STRUCT, *(module.type(dtype) for dtype in dtypes))
    module.decorate(block, Decoration.BLOCK)
    variable = module.global_variable(Storage.PUSH_CONSTANT, block)
    for i, (pod, dtype) in enumerate(zip(pods, dtypes, strict=True)):
        module.decorate_member(block, i, Decoration.OFFSET, POD_BYTES * i)
        result = module.type(dtype)
        pointer = module.pointer(Storage.PUSH_CONSTANT, result)
        member = module.constant(INT32, i)
        found = module.entry_value(Op.ACCESS_CHAIN, pointer, variable, member)
        emitter.values[hash(pod)] = module.entry_value(Op.LOAD, result, found)
