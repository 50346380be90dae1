#include "profile.h"

#include "timestamps.h"

namespace phi3c::vulkan {

void Profile::require_timestamps() const {
  if (device_.physical.timestamp_bits) return;
  fail(kDeviceError, "vulkan: ", device_.physical.described(),
       ": its compute queue has no timestamps, so kernels cannot be timed");
}

void Profile::before(TimedDispatches& timed, VkCommandBuffer commands, const std::string& kernel) {
  const DeviceFunctions& vk = device_.vk;
  if (!timed.queries) timed.queries = create_timestamps(device_, 2 * kMostTimed);
  uint32_t first = 2 * static_cast<uint32_t>(timed.names.size());
  timed.names.push_back(kernel);
  vk.CmdResetQueryPool(commands, timed.queries, first, 2);
  write_timestamp(device_, commands, timed.queries, first);
}

void Profile::after(TimedDispatches& timed, VkCommandBuffer commands) {
  uint32_t last = 2 * static_cast<uint32_t>(timed.names.size()) - 1;
  write_timestamp(device_, commands, timed.queries, last);
}

void Profile::collect(TimedDispatches& timed) {
  if (timed.names.empty()) return;
  std::vector<std::string> names;
  names.swap(timed.names);
  std::vector<uint64_t> ticks(2 * names.size());
  uint32_t count = static_cast<uint32_t>(ticks.size());
  if (!read_timestamps(device_, timed.queries, count, ticks.data())) {
    fail(kDeviceError, "vulkan: ", device_.physical.described(), ": its timestamps cannot be read");
  }
  for (size_t i = 0; i < names.size(); ++i) {
    KernelTime& time = kernels[names[i]];
    time.count += 1;
    time.seconds += seconds_between(device_.physical, ticks[2 * i], ticks[2 * i + 1]);
  }
}

}  // namespace phi3c::vulkan
