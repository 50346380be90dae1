#include "small_buffers.h"

#include <algorithm>

#include "memory.h"

namespace phi3c::vulkan {
namespace {

constexpr uint64_t kMostBytesOfSmall = 64 << 10;
constexpr uint64_t kLeastBytes = 64;
constexpr uint64_t kMostKeptBytes = 16 << 20;
constexpr uint64_t kMostKept = 1024;

}  // namespace

bool SmallBuffers::small(uint64_t bytes) { return bytes <= kMostBytesOfSmall; }

uint64_t SmallBuffers::rounded(uint64_t bytes) {
  uint64_t power = kLeastBytes;
  while (2 * power < bytes) power *= 2;
  uint64_t step = power / 4;
  return std::max(kLeastBytes, (bytes + step - 1) / step * step);
}

Buffer* SmallBuffers::take(uint64_t size) {
  auto found = kept_.find(size);
  if (found == kept_.end() || found->second.empty()) return nullptr;
  Buffer* buffer = found->second.back();
  found->second.pop_back();
  bytes_ -= size;
  --count_;
  return buffer;
}

bool SmallBuffers::give(Buffer* buffer) {
  if (count_ >= kMostKept || bytes_ + buffer->size > kMostKeptBytes) return false;
  kept_[buffer->size].push_back(buffer);
  bytes_ += buffer->size;
  ++count_;
  return true;
}

Buffer* SmallBuffers::take_any() {
  while (!kept_.empty()) {
    if (Buffer* buffer = take(kept_.begin()->first)) return buffer;
    kept_.erase(kept_.begin());
  }
  return nullptr;
}

}  // namespace phi3c::vulkan
