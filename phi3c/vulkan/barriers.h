// Which commands must wait for those before them: what reads a buffer that was written since the
// last barrier, and what writes one that was read or written since.
//
// A barrier is for all buffers and all commands before it, in earlier batches as well.
#pragma once

#include <cstdint>

#include "memory.h"

namespace phi3c::vulkan {

class Barriers {
 public:
  bool needed(const Buffer& buffer, bool writes) const {
    return buffer.written_in == interval_ || (writes && buffer.read_in == interval_);
  }

  void used(Buffer& buffer, bool writes) const {
    (writes ? buffer.written_in : buffer.read_in) = interval_;
  }

  void passed() { ++interval_; }

 private:
  uint64_t interval_ = 1;  // since the last barrier
};

}  // namespace phi3c::vulkan
