#include "memory_types.h"

#include <algorithm>
#include <utility>

namespace phi3c::vulkan {
namespace {

constexpr VkFlags kLocal = VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;
// Without a feature that nobody has enabled, or for images only.
constexpr VkFlags kUnfit = VK_MEMORY_PROPERTY_LAZILY_ALLOCATED_BIT |
                           VK_MEMORY_PROPERTY_PROTECTED_BIT |
                           VK_MEMORY_PROPERTY_DEVICE_COHERENT_BIT_AMD;
constexpr int kNever = 9;

int rank_for_host(VkFlags flags) {
  if ((flags & kMapped) != kMapped) return kNever;
  return flags & kCached ? 0 : 1;
}

// A discrete card's mapped memory may be a small window, left for the end unless it is all of its
// memory; what is not the card's own is far too slow for it.
int rank_for_device(const PhysicalDevice& device, const VkMemoryType& type, bool any_local) {
  bool mapped = (type.propertyFlags & kMapped) == kMapped;
  bool cached = type.propertyFlags & kCached;
  if (type.propertyFlags & kLocal) {
    bool all = device.memory.memoryHeaps[type.heapIndex].size == device.largest_local_heap();
    if (mapped && all) return cached ? 0 : 1;
    return mapped ? 3 : 2;
  }
  if (any_local && !device.shares_memory()) return kNever;
  return mapped && cached ? 4 : mapped ? 5 : 6;
}

}  // namespace

std::vector<uint32_t> memory_types(const PhysicalDevice& device, uint32_t allowed, Place place) {
  std::vector<uint32_t> fit;
  bool any_local = false;
  for (uint32_t i = 0; i < device.memory.memoryTypeCount; ++i) {
    VkFlags flags = device.memory.memoryTypes[i].propertyFlags;
    if (!(allowed >> i & 1) || flags & kUnfit) continue;
    fit.push_back(i);
    any_local = any_local || flags & kLocal;
  }
  std::vector<std::pair<int, uint32_t>> ranked;
  for (uint32_t i : fit) {
    const VkMemoryType& type = device.memory.memoryTypes[i];
    int rank = place == Place::host ? rank_for_host(type.propertyFlags)
                                    : rank_for_device(device, type, any_local);
    if (rank != kNever) ranked.emplace_back(rank, i);
  }
  std::sort(ranked.begin(), ranked.end());  // among equals, the driver's order
  std::vector<uint32_t> types;
  for (const auto& [rank, i] : ranked) types.push_back(i);
  return types;
}

}  // namespace phi3c::vulkan
