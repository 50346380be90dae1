// Buffers for a kernel's temporary values, kept for the next call that asks for as much.
#pragma once

#include <map>

#include "memory.h"

namespace phi3c::vulkan {

// All commands run in order: what is given back may be taken at once, by commands that come later.
class Workspaces {
 public:
  // One of at least `bytes`; nullptr where none is kept.
  Buffer* take(uint64_t bytes);
  void give_back(Buffer* buffer) { spare_.emplace(buffer->size, buffer); }

  // Takes any; nullptr if there is none left.
  Buffer* take_any();

  // What to ask the memory for, so that slightly different sizes can share a buffer.
  static uint64_t rounded(uint64_t bytes) { return (bytes + 4095) / 4096 * 4096; }

 private:
  std::multimap<uint64_t, Buffer*> spare_;  // by size
};

}  // namespace phi3c::vulkan
