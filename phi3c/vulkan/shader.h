// A kernel's SPIR-V, and what it needs of a device, as its own instructions say.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace phi3c::vulkan {

struct Shader {
  std::vector<uint32_t> words;
  std::vector<uint32_t> capabilities;
  uint32_t version = 0;                    // 0x00010300 is 1.3
  uint32_t local_size[3] = {0, 0, 0};      // threads of a workgroup; 0: it does not say
};

// Fails (ArtifactError) unless the words are a SPIR-V module, as far as its instructions' lengths
// go, with a compute entry point of that name. What is inside of them is the driver's to judge.
Shader inspect(std::vector<uint32_t> words, const std::string& entry);

}  // namespace phi3c::vulkan
