"""Runs kernels on Vulkan devices, for a TVM that was built without Vulkan.

The runtime is a C++ library (the .cc files here) that is compiled when first used. TVM finds it by
name: `tvm.vulkan(0)`, and modules of kind "vulkan" in an artifact's library.
"""

from .devices import VulkanDevice, check_device, devices
from .library import load_runtime, module_from_bytes, save_pipelines, tvm_has_vulkan
from .measure import KernelTime, Statistics, profiled, statistics

__all__ = [
    "KernelTime",
    "Statistics",
    "VulkanDevice",
    "check_device",
    "devices",
    "load_runtime",
    "module_from_bytes",
    "profiled",
    "save_pipelines",
    "statistics",
    "tvm_has_vulkan",
]
