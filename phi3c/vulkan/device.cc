#include "device.h"

namespace phi3c::vulkan {

Device::Device(const Instance& instance, int index)
    : index(index), physical(instance.devices().at(index)) {
  if (physical.properties.apiVersion < version(1, 1)) {
    fail(kDeviceError, "vulkan: ", physical.described(), ": knows Vulkan ",
         version_text(physical.properties.apiVersion), "; needed: 1.1 or later");
  }
  const Features& have = physical.features;
  VkPhysicalDeviceFeatures2 features{};
  features.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2;
  features.features.shaderInt16 = have.shader_int16;
  features.features.shaderInt64 = have.shader_int64;
  features.features.shaderFloat64 = have.shader_float64;
  VkPhysicalDevice16BitStorageFeatures storage16{};
  storage16.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES;
  storage16.storageBuffer16BitAccess = have.storage_buffer_16bit;
  features.pNext = &storage16;
  VkPhysicalDevice8BitStorageFeatures storage8{};
  storage8.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_8BIT_STORAGE_FEATURES;
  storage8.storageBuffer8BitAccess = true;
  if (have.storage_buffer_8bit) {
    storage8.pNext = features.pNext;
    features.pNext = &storage8;
  }
  VkPhysicalDeviceShaderFloat16Int8Features small_types{};
  small_types.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES;
  small_types.shaderFloat16 = have.shader_float16;
  small_types.shaderInt8 = have.shader_int8;
  if (have.shader_float16 || have.shader_int8) {
    small_types.pNext = features.pNext;
    features.pNext = &small_types;
  }

  float priority = 1.0f;
  VkDeviceQueueCreateInfo queue_info{};
  queue_info.sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO;
  queue_info.queueFamilyIndex = physical.queue_family;
  queue_info.queueCount = 1;
  queue_info.pQueuePriorities = &priority;
  VkDeviceCreateInfo info{};
  info.sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO;
  info.pNext = &features;
  info.queueCreateInfoCount = 1;
  info.pQueueCreateInfos = &queue_info;
  info.enabledExtensionCount = static_cast<uint32_t>(physical.extensions.size());
  info.ppEnabledExtensionNames = physical.extensions.data();
  const InstanceFunctions& functions = instance.functions();
  check(functions.CreateDevice(physical.handle, &info, nullptr, &handle), "vkCreateDevice");
  try {
    load(functions);
  } catch (...) {
    if (vk.DestroyDevice) vk.DestroyDevice(handle, nullptr);
    throw;
  }
}

Device::~Device() { vk.DestroyDevice(handle, nullptr); }

void Device::load(const InstanceFunctions& functions) {
#define PHI3C_LOAD(name)                                                                        \
  vk.name = reinterpret_cast<PFN_vk##name>(functions.GetDeviceProcAddr(handle, "vk" #name));    \
  if (!vk.name) fail(kDeviceError, "vulkan: ", physical.described(), ": has no vk" #name);
  PHI3C_VULKAN_DEVICE(PHI3C_LOAD)
  if (physical.max_push_descriptors) {
    PHI3C_LOAD(CmdPushDescriptorSetKHR)
  }
#undef PHI3C_LOAD
  vk.GetDeviceQueue(handle, physical.queue_family, 0, &queue);
}

void Device::check(VkResult result, const char* call) {
  if (result == VK_ERROR_DEVICE_LOST) check_fatal(result, call);
  if (result != VK_SUCCESS) {
    fail(is_out_of_memory(result) ? kOutOfMemoryError : kDeviceError, "vulkan: ", call, ": ", name_of(result), " (", physical.described(), ")");
  }
}

void Device::check_fatal(VkResult result, const char* call) {
  if (result == VK_SUCCESS) return;
  lost_ = text(call, ": ", name_of(result));
  require_alive();
}

void Device::check_fatal_unless_memory(VkResult result, const char* call) {
  if (is_out_of_memory(result)) {
    check(result, call);
  } else {
    check_fatal(result, call);
  }
}

void Device::require_alive() const {
  if (!lost()) return;
  fail(kDeviceError, "vulkan: the device was lost (", lost_, "; ", physical.described(),
       "); what was on it is gone: restart the process");
}

}  // namespace phi3c::vulkan
