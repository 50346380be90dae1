// TVM's view of the devices.
#pragma once

#include <tvm/runtime/device_api.h>

namespace phi3c::vulkan {

// The one object that TVM asks; it is never destroyed.
tvm::runtime::DeviceAPI* device_api();

// The device that this thread has set last; 0 before.
int current_device();

}  // namespace phi3c::vulkan
