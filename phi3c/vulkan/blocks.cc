#include "blocks.h"

#include <algorithm>
#include <iterator>

#include "memory_types.h"

namespace phi3c::vulkan {
namespace {

constexpr uint64_t kBlockBytes = 64 << 20;
constexpr uint64_t kBlocksOfHeap = 16;  // that a small heap is worth

bool empty(const Block& block) {
  return block.free.size() == 1 && block.free.begin()->second == block.size;
}

}  // namespace

std::optional<Piece> Blocks::take(const std::vector<uint32_t>& types, uint64_t bytes,
                                  uint64_t alignment, bool must_be_mapped) {
  for (uint32_t type : types) {
    bool whole = bytes >= common_bytes(type) / 2;
    std::optional<Piece> piece;
    if (!whole && (piece = take_existing(type, bytes, alignment, must_be_mapped))) return piece;
    if (Block* block = create(type, bytes, whole, must_be_mapped)) {
      return take_from(*block, bytes, alignment);
    }
    if (whole && (piece = take_existing(type, bytes, alignment, must_be_mapped))) return piece;
  }
  return std::nullopt;
}

std::optional<Piece> Blocks::take_existing(uint32_t type, uint64_t bytes, uint64_t alignment,
                                           bool must_be_mapped) {
  for (Block& block : blocks_) {
    if (block.type != type || block.whole || (must_be_mapped && !block.mapped)) continue;
    if (auto piece = take_from(block, bytes, alignment)) return piece;
  }
  return std::nullopt;
}

uint64_t Blocks::common_bytes(uint32_t type) const {
  const auto& memory = device_.physical.memory;
  uint64_t heap = memory.memoryHeaps[memory.memoryTypes[type].heapIndex].size;
  return std::min({kBlockBytes, heap / kBlocksOfHeap, device_.physical.max_allocation});
}

std::optional<Piece> Blocks::take_from(Block& block, uint64_t bytes, uint64_t alignment) {
  for (auto range = block.free.begin(); range != block.free.end(); ++range) {
    auto [begin, length] = *range;
    uint64_t offset = (begin + alignment - 1) / alignment * alignment;
    uint64_t before = offset - begin;
    if (before > length || bytes > length - before) continue;
    uint64_t after = length - before - bytes;
    if (after) block.free.emplace(offset + bytes, after);
    if (before) {
      range->second = before;
    } else {
      block.free.erase(range);
    }
    return Piece{&block, offset, bytes};
  }
  return std::nullopt;
}

Block* Blocks::create(uint32_t type, uint64_t bytes, bool whole, bool must_be_mapped) {
  Block made;
  made.type = type;
  made.whole = whole;
  made.size = whole ? bytes : common_bytes(type);
  VkResult result;
  // Where there is no room for a block, there may be for a smaller one.
  while ((result = allocate(made)) != VK_SUCCESS) {
    if (!is_out_of_memory(result)) device_.check(result, "vkAllocateMemory");
    if (made.size == bytes || result == VK_ERROR_TOO_MANY_OBJECTS) return nullptr;
    made.size = std::max(bytes, made.size / 2);
  }
  if ((device_.physical.memory.memoryTypes[type].propertyFlags & kMapped) == kMapped) {
    void* mapped = nullptr;
    // Where the address space is too full to map it, it is copied to as one that is not mapped.
    result = device_.vk.MapMemory(device_.handle, made.memory, 0, kWholeSize, 0, &mapped);
    if (result == VK_SUCCESS) made.mapped = static_cast<uint8_t*>(mapped);
  }
  if (must_be_mapped && !made.mapped) {
    device_.vk.FreeMemory(device_.handle, made.memory, nullptr);
    return nullptr;
  }
  made.free.emplace(0, made.size);
  bytes_ += made.size;
  blocks_.push_back(std::move(made));
  return &blocks_.back();
}

VkResult Blocks::allocate(Block& block) {
  VkMemoryAllocateInfo info{};
  info.sType = VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO;
  info.allocationSize = block.size;
  info.memoryTypeIndex = block.type;
  return device_.vk.AllocateMemory(device_.handle, &info, nullptr, &block.memory);
}

void Blocks::give_back(const Piece& piece) {
  Block& block = *piece.block;
  auto range = block.free.emplace(piece.offset, piece.size).first;
  auto next = std::next(range);
  if (next != block.free.end() && range->first + range->second == next->first) {
    range->second += next->second;
    block.free.erase(next);
  }
  if (range != block.free.begin()) {
    auto before = std::prev(range);
    if (before->first + before->second == range->first) {
      before->second += range->second;
      block.free.erase(range);
    }
  }
  if (!empty(block)) return;
  auto same = [&](const Block& other) { return &other == &block; };
  // One is kept, so that a tensor that comes and goes does not take a block with it.
  auto spare = [&](const Block& other) {
    return &other != &block && other.type == block.type && empty(other);
  };
  if (block.whole || std::any_of(blocks_.begin(), blocks_.end(), spare)) {
    free(std::find_if(blocks_.begin(), blocks_.end(), same));
  }
}

void Blocks::release_idle() {
  for (auto block = blocks_.begin(); block != blocks_.end();) {
    auto next = std::next(block);
    if (empty(*block)) free(block);
    block = next;
  }
}

void Blocks::free(std::list<Block>::iterator block) {
  // Of a lost device the driver is left alone.
  if (!device_.lost()) device_.vk.FreeMemory(device_.handle, block->memory, nullptr);
  bytes_ -= block->size;
  blocks_.erase(block);
}

}  // namespace phi3c::vulkan
