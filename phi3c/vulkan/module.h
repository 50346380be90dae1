// A module of kind "vulkan": kernels as functions, and back to the bytes it was made of.
#pragma once

#include <tvm/ffi/extra/module.h>

namespace phi3c::vulkan {

// Fails on damaged bytes. Does not touch Vulkan, so that a compiler without a device can make one.
tvm::ffi::Module load_module(const tvm::ffi::Bytes& bytes);

}  // namespace phi3c::vulkan
