// How long each kernel takes, by timestamps around every dispatch.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "device.h"

namespace phi3c::vulkan {

constexpr uint32_t kMostTimed = 1024;  // dispatches of one batch

// Of one batch.
struct TimedDispatches {
  VkQueryPool queries = nullptr;   // two of each dispatch
  std::vector<std::string> names;  // of the kernels
};

struct KernelTime {
  uint64_t count = 0;
  double seconds = 0;
};

class Profile {
 public:
  explicit Profile(Device& device) : device_(device) {}

  bool active = false;
  std::map<std::string, KernelTime> kernels;

  // Fails where the queue has no timestamps.
  void require_timestamps() const;

  // To be called around the dispatch; all work before `before` must be ordered before it.
  void before(TimedDispatches& timed, VkCommandBuffer commands, const std::string& kernel);
  void after(TimedDispatches& timed, VkCommandBuffer commands);

  // Adds the times of a batch that is done, and empties it.
  void collect(TimedDispatches& timed);

 private:
  Device& device_;
};

}  // namespace phi3c::vulkan
