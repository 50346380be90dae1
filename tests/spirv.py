"""Builds lowered TIR as the emitter meets it, and asks Khronos' validator about what it makes."""

from __future__ import annotations

import shutil
import subprocess

import tvm
from tvm import tirx
from vulkan_device import found_device

from phi3c.kernels.root import hand_scheduled
from phi3c.pipeline import kernel_lowering
from phi3c.spirv.codegen import emit
from phi3c.spirv.kernel import Kernel
from phi3c.targets import parse_target

VALIDATOR = shutil.which("spirv-val")


def lowered(function: tirx.PrimFunc, target: tvm.target.Target | None = None) -> tvm.IRModule:
    """The device functions that TVM's passes make of a kernel; None: for a portable device."""
    target = target or parse_target("vulkan").tvm_target
    function = hand_scheduled(function).with_attr("global_symbol", "main")
    module = tvm.IRModule({"main": function})
    module = tirx.transform.BindTarget(target)(module)
    pipeline, _, finalize = tvm.s_tir.pipeline.default_s_tir_pipeline()
    with target, kernel_lowering("vulkan"):
        module = pipeline(module)
        on_device = tirx.transform.Filter(lambda f: f.attrs["target"].kind.name == "vulkan")
        return finalize()(on_device(module))


def emitted(function: tirx.PrimFunc) -> list[Kernel]:
    """Its kernels for the device that is here or a portable one, all of them valid. Raises
    TargetError."""
    here = parse_target("vulkan:native").tvm_target if found_device() else None
    kernels = emit(lowered(function, here))
    for kernel in kernels:
        validate(kernel)
    return kernels


def validate(kernel: Kernel) -> None:
    command = [VALIDATOR, "--target-env", "vulkan1.1", "-"]
    done = subprocess.run(command, input=kernel.spirv, capture_output=True)
    assert done.returncode == 0, (kernel.name, done.stdout + done.stderr)
