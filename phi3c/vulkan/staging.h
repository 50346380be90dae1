// Chunks of mapped memory, through which bytes go to and from memory that the host does not see.
#pragma once

#include <memory>
#include <vector>

#include "memory.h"

namespace phi3c::vulkan {

struct Chunk {
  Buffer* buffer = nullptr;
  uint64_t used = 0;  // bytes of it that commands use

  uint64_t left() const { return buffer->size - used; }
};

class Staging {
 public:
  explicit Staging(Memory& memory) : memory_(memory) {}

  // nullptr: all are in use. Fails where there is no memory for the first.
  Chunk* take();
  void give_back(Chunk* chunk);

 private:
  Memory& memory_;
  std::vector<std::unique_ptr<Chunk>> chunks_;
  std::vector<Chunk*> spare_;
};

}  // namespace phi3c::vulkan
