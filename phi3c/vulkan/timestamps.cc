#include "timestamps.h"

namespace phi3c::vulkan {

VkQueryPool create_timestamps(Device& device, uint32_t count) {
  VkQueryPoolCreateInfo info{};
  info.sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO;
  info.queryType = VK_QUERY_TYPE_TIMESTAMP;
  info.queryCount = count;
  VkQueryPool pool = nullptr;
  device.check(device.vk.CreateQueryPool(device.handle, &info, nullptr, &pool),
               "vkCreateQueryPool");
  return pool;
}

void write_timestamp(const Device& device, VkCommandBuffer commands, VkQueryPool pool,
                     uint32_t index) {
  // At the bottom of the pipe: once the kernels before have ended.
  device.vk.CmdWriteTimestamp(commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, pool, index);
}

bool read_timestamps(const Device& device, VkQueryPool pool, uint32_t count, uint64_t* ticks) {
  return device.vk.GetQueryPoolResults(device.handle, pool, 0, count, count * sizeof(uint64_t),
                                       ticks, sizeof(uint64_t),
                                       VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT) ==
         VK_SUCCESS;
}

double seconds_between(const PhysicalDevice& device, uint64_t begin, uint64_t end) {
  uint32_t bits = device.timestamp_bits;
  uint64_t mask = bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  // Unsigned, so that a counter that wrapped around once is right as well.
  return static_cast<double>((end - begin) & mask) *
         device.properties.limits.timestampPeriod * 1e-9;
}

}  // namespace phi3c::vulkan
