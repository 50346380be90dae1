#include "staging.h"

#include <algorithm>

namespace phi3c::vulkan {
namespace {

constexpr uint64_t kChunkBytes = 4 << 20;  // a copy of it takes far longer than a submission
constexpr size_t kMostChunks = 8;

}  // namespace

Chunk* Staging::take() {
  if (spare_.empty() && chunks_.size() < kMostChunks) {
    uint64_t bytes = std::min(kChunkBytes, memory_.largest() / 16 * 16);
    Buffer* buffer = memory_.create(bytes, Place::host);
    if (!buffer && chunks_.empty()) {
      memory_.release_idle();
      buffer = memory_.create(bytes, Place::host);
    }
    if (!buffer && chunks_.empty()) memory_.fail_out_of_memory(bytes);
    if (!buffer) return nullptr;
    chunks_.push_back(std::make_unique<Chunk>());
    chunks_.back()->buffer = buffer;
    spare_.push_back(chunks_.back().get());
  }
  if (spare_.empty()) return nullptr;
  Chunk* chunk = spare_.back();
  spare_.pop_back();
  return chunk;
}

void Staging::give_back(Chunk* chunk) {
  chunk->used = 0;
  spare_.push_back(chunk);
}

}  // namespace phi3c::vulkan
