// The types of Vulkan, as the header in the PyPI package `vulkan` declares them.
//
// That header was made for cffi: it has no include guard, no extern "C", and none of the macros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cwchar>

// It declares a va_list of its own, and window systems' types: hence the name and the namespace.
#define va_list va_list_of_the_header
namespace phi3c::vulkan {
extern "C" {
#include "vulkan.cdef.h"
}
}  // namespace phi3c::vulkan
#undef va_list

namespace phi3c::vulkan {

static_assert(sizeof(void*) == 8, "the header's handles are pointers, which is right on 64 bits");

constexpr uint32_t version(uint32_t major, uint32_t minor) { return major << 22 | minor << 12; }
constexpr uint32_t major_of(uint32_t version) { return version >> 22 & 0x7F; }
constexpr uint32_t minor_of(uint32_t version) { return version >> 12 & 0x3FF; }
constexpr uint32_t patch_of(uint32_t version) { return version & 0xFFF; }

constexpr VkDeviceSize kWholeSize = ~VkDeviceSize{0};

}  // namespace phi3c::vulkan
