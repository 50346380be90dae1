// The device's clock, as its commands read it.
#pragma once

#include <cstdint>

#include "device.h"

namespace phi3c::vulkan {

// Fails where there is no memory for them. The queue must have timestamps.
VkQueryPool create_timestamps(Device& device, uint32_t count);

// Once all commands before have ended, as far as they are ordered before.
void write_timestamp(const Device& device, VkCommandBuffer commands, VkQueryPool pool,
                     uint32_t index);

// Of commands that have ended. false: they could not be read.
bool read_timestamps(const Device& device, VkQueryPool pool, uint32_t count, uint64_t* ticks);

double seconds_between(const PhysicalDevice& device, uint64_t begin, uint64_t end);

}  // namespace phi3c::vulkan
