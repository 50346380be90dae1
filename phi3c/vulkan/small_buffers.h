// Small buffers that are no longer used, kept for the next tensor of their size: those of a step's
// inputs come and go with every step.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace phi3c::vulkan {

struct Buffer;

class SmallBuffers {
 public:
  // Whether buffers of so many bytes are kept.
  static bool small(uint64_t bytes);

  // The size of the class of so many bytes: four to each power of two.
  static uint64_t rounded(uint64_t bytes);

  // One of exactly that size; nullptr where none is kept.
  Buffer* take(uint64_t size);

  // false: there are enough already.
  bool give(Buffer* buffer);

  // Takes any; nullptr if there is none left.
  Buffer* take_any();

 private:
  std::map<uint64_t, std::vector<Buffer*>> kept_;  // by size
  uint64_t bytes_ = 0;
  uint64_t count_ = 0;
};

}  // namespace phi3c::vulkan
