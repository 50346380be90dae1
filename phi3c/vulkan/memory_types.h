// Which of a device's kinds of memory a buffer may lie in, and which of them is best.
#pragma once

#include <cstdint>
#include <vector>

#include "instance.h"

namespace phi3c::vulkan {

enum class Place {
  device,  // fast for kernels; mapped as well where that costs nothing
  host,    // always mapped: staging
};

// Coherent, so that nothing is to be flushed or invalidated.
constexpr VkFlags kMapped =
    VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
constexpr VkFlags kCached = VK_MEMORY_PROPERTY_HOST_CACHED_BIT;

// Indices of memory types among those `allowed` (a bit each), the best first.
std::vector<uint32_t> memory_types(const PhysicalDevice& device, uint32_t allowed, Place place);

}  // namespace phi3c::vulkan
