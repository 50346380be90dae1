"""SPIR-V for Vulkan out of lowered TIR, which TVM's wheel has no code generator for."""
