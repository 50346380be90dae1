// Buffers, each with memory of its own, and how much of it is in use.
#pragma once

#include <cstdint>
#include <optional>
#include <unordered_set>

#include "device.h"

namespace phi3c::vulkan {

struct Buffer {
  VkBuffer handle = nullptr;
  VkDeviceMemory memory = nullptr;
  uint64_t size = 0;         // bytes, padded
  uint8_t* mapped = nullptr;  // where the host sees it; nullptr: it does not
  bool cached = false;       // the host reads it at the speed of its own memory
  int device = 0;
  uint64_t last_use = 0;  // serial of the last submission that uses it (stream.h)
};

enum class Place {
  device,  // fast for kernels; mapped as well where that costs nothing
  host,    // always mapped: staging
};

class Memory {
 public:
  explicit Memory(Device& device);

  // A storage buffer of at least `bytes`; nullptr where there is no memory left.
  // Fails where the device's limits do not allow such a buffer.
  Buffer* create(uint64_t bytes, Place place);

  // Bytes that the device's limits allow a buffer to have.
  uint64_t largest() const;

  // At once: nothing may use it any more. Does not fail.
  void destroy(Buffer* buffer);

  // What is said when `create` has found no memory.
  [[noreturn]] void fail_out_of_memory(uint64_t bytes) const;

  // Data spaces and workspaces that TVM may hand back as a pointer.
  std::unordered_set<const void*> owned;

  uint64_t in_use() const { return in_use_; }
  uint64_t peak() const { return peak_; }

 private:
  std::optional<uint32_t> type(uint32_t allowed, VkFlags properties) const;
  std::optional<uint32_t> type(uint32_t allowed, Place place) const;

  Device& device_;
  uint64_t in_use_ = 0;
  uint64_t peak_ = 0;
};

}  // namespace phi3c::vulkan
