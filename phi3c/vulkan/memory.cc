#include "memory.h"

#include <algorithm>
#include <memory>

namespace phi3c::vulkan {
namespace {

constexpr VkFlags kLocal = VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;
// Coherent, so that nothing is to be flushed or invalidated.
constexpr VkFlags kMapped =
    VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
constexpr VkFlags kCached = VK_MEMORY_PROPERTY_HOST_CACHED_BIT;

bool out_of_memory(VkResult result) {
  return result == VK_ERROR_OUT_OF_HOST_MEMORY || result == VK_ERROR_OUT_OF_DEVICE_MEMORY;
}

}  // namespace

Memory::Memory(Device& device) : device_(device) {}

std::optional<uint32_t> Memory::type(uint32_t allowed, VkFlags properties) const {
  const auto& memory = device_.physical.memory;
  for (uint32_t i = 0; i < memory.memoryTypeCount; ++i) {
    const VkMemoryType& type = memory.memoryTypes[i];
    if (allowed >> i & 1 && (type.propertyFlags & properties) == properties) return i;
  }
  return std::nullopt;
}

std::optional<uint32_t> Memory::type(uint32_t allowed, Place place) const {
  if (place == Place::host) {
    auto cached = type(allowed, kMapped | kCached);
    return cached ? cached : type(allowed, kMapped);
  }
  // A discrete card's mapped memory may be a small window: only where it is all of its memory.
  const auto& memory = device_.physical.memory;
  for (VkFlags more : {kCached, VkFlags{0}}) {
    auto both = type(allowed, kLocal | kMapped | more);
    if (both && memory.memoryHeaps[memory.memoryTypes[*both].heapIndex].size ==
                    device_.physical.memory_bytes()) {
      return both;
    }
  }
  auto local = type(allowed, kLocal);
  return local ? local : type(allowed, 0);
}

uint64_t Memory::largest() const {
  return std::min<uint64_t>(device_.physical.properties.limits.maxStorageBufferRange,
                            device_.physical.max_allocation);
}

Buffer* Memory::create(uint64_t bytes, Place place) {
  // Sizes that are no multiple of 4 have room for the whole word of the last bytes.
  uint64_t size = std::max<uint64_t>(16, (bytes + 15) / 16 * 16);
  const auto& limits = device_.physical.properties.limits;
  if (size < bytes || size > limits.maxStorageBufferRange) {
    fail(kOutOfMemoryError, "vulkan: a buffer of ", bytes, " bytes; ", device_.physical.name(),
         " accepts at most ", limits.maxStorageBufferRange, " (maxStorageBufferRange)");
  }
  if (size > device_.physical.max_allocation) {
    fail(kOutOfMemoryError, "vulkan: a buffer of ", bytes, " bytes; ", device_.physical.name(),
         " accepts at most ", device_.physical.max_allocation, " (maxMemoryAllocationSize)");
  }
  auto buffer = std::make_unique<Buffer>();
  buffer->size = size;
  buffer->device = device_.index;
  VkBufferCreateInfo info{};
  info.sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO;
  info.size = size;
  info.usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_TRANSFER_SRC_BIT |
               VK_BUFFER_USAGE_TRANSFER_DST_BIT;
  info.sharingMode = VK_SHARING_MODE_EXCLUSIVE;
  const DeviceFunctions& vk = device_.vk;
  VkResult result = vk.CreateBuffer(device_.handle, &info, nullptr, &buffer->handle);
  if (out_of_memory(result)) return nullptr;
  device_.check(result, "vkCreateBuffer");
  struct Undo {  // until all is well
    const Device& device;
    Buffer* buffer;
    ~Undo() {
      if (!buffer) return;
      device.vk.DestroyBuffer(device.handle, buffer->handle, nullptr);
      device.vk.FreeMemory(device.handle, buffer->memory, nullptr);
    }
  } undo{device_, buffer.get()};

  VkMemoryRequirements needs{};
  vk.GetBufferMemoryRequirements(device_.handle, buffer->handle, &needs);
  auto chosen = type(needs.memoryTypeBits, place);
  if (!chosen) {
    fail(kDeviceError, "vulkan: ", device_.physical.described(), ": no memory type for buffers");
  }
  VkMemoryAllocateInfo allocate{};
  allocate.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO;
  allocate.allocationSize = needs.size;
  allocate.memoryTypeIndex = *chosen;
  result = vk.AllocateMemory(device_.handle, &allocate, nullptr, &buffer->memory);
  if (out_of_memory(result)) return nullptr;
  device_.check(result, "vkAllocateMemory");
  device_.check(vk.BindBufferMemory(device_.handle, buffer->handle, buffer->memory, 0),
                "vkBindBufferMemory");
  VkFlags properties = device_.physical.memory.memoryTypes[*chosen].propertyFlags;
  if ((properties & kMapped) == kMapped) {
    void* mapped = nullptr;
    result = vk.MapMemory(device_.handle, buffer->memory, 0, kWholeSize, 0, &mapped);
    // Where the address space is too full to map it, it is copied to as one that is not mapped.
    if (place == Place::host) device_.check(result, "vkMapMemory");
    if (result == VK_SUCCESS) buffer->mapped = static_cast<uint8_t*>(mapped);
    buffer->cached = properties & kCached;
  }
  undo.buffer = nullptr;
  in_use_ += size;
  peak_ = std::max(peak_, in_use_);
  return buffer.release();
}

void Memory::destroy(Buffer* buffer) {
  if (!device_.lost()) {  // else the driver is left alone
    device_.vk.DestroyBuffer(device_.handle, buffer->handle, nullptr);
    device_.vk.FreeMemory(device_.handle, buffer->memory, nullptr);
  }
  in_use_ -= buffer->size;
  delete buffer;
}

void Memory::fail_out_of_memory(uint64_t bytes) const {
  fail(kOutOfMemoryError, "vulkan: out of memory: asked for ", bytes, " bytes with ", in_use_,
       " bytes in use; ", device_.physical.name(), " has ", device_.physical.memory_bytes(),
       " bytes of memory");
}

}  // namespace phi3c::vulkan
