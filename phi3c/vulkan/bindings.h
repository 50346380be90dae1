// What a kernel does with its buffers, as its SPIR-V says.
#pragma once

#include <cstdint>
#include <vector>

namespace phi3c::vulkan {

// By binding, of set 0: whether the kernel may write that buffer. It may unless the variable, or
// every member of its block, is decorated NonWritable. The words are those of a module whose
// instructions' lengths are right (shader.h).
std::vector<bool> written_bindings(const std::vector<uint32_t>& words, uint32_t bindings);

}  // namespace phi3c::vulkan
