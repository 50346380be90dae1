#include "profile.h"

namespace phi3c::vulkan {

void Profile::require_timestamps() const {
  if (device_.physical.timestamp_bits) return;
  fail(kDeviceError, "vulkan: ", device_.physical.described(),
       ": its compute queue has no timestamps, so kernels cannot be timed");
}

void Profile::before(TimedDispatches& timed, VkCommandBuffer commands, const std::string& kernel) {
  const DeviceFunctions& vk = device_.vk;
  if (!timed.queries) {
    VkQueryPoolCreateInfo info{};
    info.sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO;
    info.queryType = VK_QUERY_TYPE_TIMESTAMP;
    info.queryCount = 2 * kMostTimed;
    device_.check(vk.CreateQueryPool(device_.handle, &info, nullptr, &timed.queries),
                  "vkCreateQueryPool");
  }
  uint32_t first = 2 * static_cast<uint32_t>(timed.names.size());
  timed.names.push_back(kernel);
  vk.CmdResetQueryPool(commands, timed.queries, first, 2);
  // At the bottom of the pipe: once the kernels before have ended.
  vk.CmdWriteTimestamp(commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, timed.queries, first);
}

void Profile::after(TimedDispatches& timed, VkCommandBuffer commands) {
  uint32_t last = 2 * static_cast<uint32_t>(timed.names.size()) - 1;
  device_.vk.CmdWriteTimestamp(commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, timed.queries, last);
}

void Profile::collect(TimedDispatches& timed) {
  if (timed.names.empty()) return;
  std::vector<std::string> names;
  names.swap(timed.names);
  std::vector<uint64_t> ticks(2 * names.size());
  device_.check(
      device_.vk.GetQueryPoolResults(device_.handle, timed.queries, 0,
                                     static_cast<uint32_t>(ticks.size()),
                                     ticks.size() * sizeof(uint64_t), ticks.data(),
                                     sizeof(uint64_t),
                                     VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT),
      "vkGetQueryPoolResults");
  uint32_t bits = device_.physical.timestamp_bits;
  uint64_t mask = bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  double seconds_of_a_tick = device_.physical.properties.limits.timestampPeriod * 1e-9;
  for (size_t i = 0; i < names.size(); ++i) {
    KernelTime& time = kernels[names[i]];
    time.count += 1;
    // Unsigned, so that a counter that wrapped around once is right as well.
    time.seconds += static_cast<double>((ticks[2 * i + 1] - ticks[2 * i]) & mask) *
                    seconds_of_a_tick;
  }
}

}  // namespace phi3c::vulkan
