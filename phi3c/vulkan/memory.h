// Buffers in device memory, and how much of it is in use.
#pragma once

#include <cstdint>
#include <unordered_set>

#include "blocks.h"
#include "device.h"
#include "memory_types.h"
#include "small_buffers.h"

namespace phi3c::vulkan {

struct Buffer {
  VkBuffer handle = nullptr;
  Piece piece;               // of memory, where it lies
  uint64_t size = 0;         // bytes, padded
  uint8_t* mapped = nullptr;  // where the host sees it; nullptr: it does not
  bool cached = false;       // the host reads it at the speed of its own memory
  int device = 0;
  uint64_t last_use = 0;  // serial of the last submission that uses it (stream.h)
  uint64_t read_in = 0;   // the intervals of the last commands that read and wrote it (barriers.h)
  uint64_t written_in = 0;
};

class Memory {
 public:
  explicit Memory(Device& device) : device_(device), blocks_(device) {}

  // A storage buffer of at least `bytes`; nullptr where there is no memory left.
  // Fails where the device's limits do not allow such a buffer.
  Buffer* create(uint64_t bytes, Place place);

  // Bytes that the device's limits allow a buffer to have.
  uint64_t largest() const;

  // At once: nothing may use it any more. Does not fail.
  void destroy(Buffer* buffer);

  // Gives the driver what is kept for later.
  void release_idle();

  // What is said when `create` has found no memory.
  [[noreturn]] void fail_out_of_memory(uint64_t bytes) const;

  // Data spaces and workspaces that TVM may hand back as a pointer.
  std::unordered_set<const void*> owned;

  uint64_t in_use() const { return in_use_; }
  uint64_t peak() const { return peak_; }
  uint64_t allocations() const { return blocks_.allocations(); }
  uint64_t idle() const { return blocks_.bytes() - in_use_; }  // the driver's, but not in use

 private:
  Buffer* make(uint64_t size, Place place);
  void unmake(Buffer* buffer);

  Device& device_;
  Blocks blocks_;
  SmallBuffers small_;
  uint64_t in_use_ = 0;
  uint64_t peak_ = 0;
};

}  // namespace phi3c::vulkan
