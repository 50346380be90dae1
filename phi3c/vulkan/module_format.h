// The bytes of a module of kind "vulkan", as TVM's own Vulkan code generator writes them.
//
//   string                            "vulkan"
//   u64, then of each kernel:         its launch information
//     string, string                  name, name again
//     u64, (u8, u8, u16) …            dtypes of the arguments: code, bits, lanes
//     u64, string …                   launch parameters, "blockIdx.x" …
//     u64, i32 …                      tags of the arguments, of no use here
//   u64, then of each kernel:         its code
//     string                          name
//     string of (u32, u64, u32 …)     flags, number of words, SPIR-V
//
// All are little-endian; a string is a u64 length and its bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "shader.h"

namespace phi3c::vulkan {

struct ArgumentType {
  uint8_t code;  // of DLDataTypeCode
  uint8_t bits;
  uint16_t lanes;
};

struct KernelCode {
  std::vector<ArgumentType> arguments;
  std::vector<std::string> launch_parameters;
  Shader shader;
};

// Kernels by name. Fails (ArtifactError) on bytes that are anything else.
std::map<std::string, KernelCode> parse_module(const char* bytes, size_t size);

}  // namespace phi3c::vulkan
