#include "memory.h"

#include <algorithm>
#include <memory>

namespace phi3c::vulkan {

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
  Buffer* buffer = nullptr;
  if (place == Place::device && SmallBuffers::small(size)) {
    size = SmallBuffers::rounded(size);
    buffer = small_.take(size);
  }
  if (!buffer) buffer = make(size, place);
  if (!buffer) return nullptr;
  in_use_ += size;
  peak_ = std::max(peak_, in_use_);
  return buffer;
}

Buffer* Memory::make(uint64_t size, Place place) {
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
  if (is_out_of_memory(result)) return nullptr;
  device_.check(result, "vkCreateBuffer");
  struct Undo {  // until all is well
    Memory& memory;
    Buffer* buffer;
    ~Undo() {
      if (buffer) memory.unmake(buffer);
    }
  } undo{*this, buffer.get()};

  VkMemoryRequirements needs{};
  vk.GetBufferMemoryRequirements(device_.handle, buffer->handle, &needs);
  auto types = memory_types(device_.physical, needs.memoryTypeBits, place);
  if (types.empty()) {
    fail(kDeviceError, "vulkan: ", device_.physical.described(), ": no memory type for buffers");
  }
  auto piece = blocks_.take(types, needs.size, needs.alignment, place == Place::host);
  if (!piece) return nullptr;
  buffer->piece = *piece;
  const Block& block = *piece->block;
  result = vk.BindBufferMemory(device_.handle, buffer->handle, block.memory, piece->offset);
  if (is_out_of_memory(result)) return nullptr;
  device_.check(result, "vkBindBufferMemory");
  if (block.mapped) {
    buffer->mapped = block.mapped + piece->offset;
    buffer->cached = device_.physical.memory.memoryTypes[block.type].propertyFlags & kCached;
  }
  undo.buffer = nullptr;
  return buffer.release();
}

void Memory::unmake(Buffer* buffer) {
  // Of a lost device the driver is left alone.
  if (!device_.lost()) device_.vk.DestroyBuffer(device_.handle, buffer->handle, nullptr);
  if (buffer->piece.block) blocks_.give_back(buffer->piece);
}

void Memory::destroy(Buffer* buffer) {
  in_use_ -= buffer->size;
  if (SmallBuffers::small(buffer->size) && small_.give(buffer)) return;
  unmake(buffer);
  delete buffer;
}

void Memory::release_idle() {
  while (Buffer* buffer = small_.take_any()) {
    unmake(buffer);
    delete buffer;
  }
  blocks_.release_idle();
}

void Memory::fail_out_of_memory(uint64_t bytes) const {
  fail(kOutOfMemoryError, "vulkan: out of memory: asked for ", bytes, " bytes with ", in_use_,
       " bytes in use; ", device_.physical.name(), " has ", device_.physical.memory_bytes(),
       " bytes of memory");
}

}  // namespace phi3c::vulkan
