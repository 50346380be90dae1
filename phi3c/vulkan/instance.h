// The Vulkan instance, and what it says of each physical device.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "loader.h"

namespace phi3c::vulkan {

// Features that kernels may use; each is enabled where the device has it.
struct Features {
  bool shader_int8 = false;
  bool shader_int16 = false;
  bool shader_int64 = false;
  bool shader_float16 = false;
  bool shader_float64 = false;
  bool storage_buffer_8bit = false;
  bool storage_buffer_16bit = false;
};

struct PhysicalDevice {
  VkPhysicalDevice handle = nullptr;
  VkPhysicalDeviceProperties properties{};
  VkPhysicalDeviceMemoryProperties memory{};
  std::string driver;  // "llvmpipe Mesa 22.3.6 (LLVM 15.0.6)"
  uint8_t uuid[16] = {};
  Features features;
  uint32_t subgroup_size = 1;
  VkFlags subgroup_operations = 0;  // those of compute shaders
  uint64_t max_allocation = 0;      // bytes of one vkAllocateMemory
  uint32_t max_push_descriptors = 0;  // 0: no VK_KHR_push_descriptor
  uint32_t queue_family = 0;
  bool memory_budget = false;          // VK_EXT_memory_budget
  uint32_t timestamp_bits = 0;         // 0: that queue has no timestamps
  std::vector<const char*> extensions;  // those to enable

  std::string name() const { return properties.deviceName; }
  // "llvmpipe (LLVM 15.0.6, 256 bits), driver llvmpipe Mesa 22.3.6 (LLVM 15.0.6)"
  std::string described() const { return name() + ", driver " + driver; }
  const char* kind() const;  // discrete, integrated, virtual, cpu, other
  bool shares_memory() const;     // with the host
  uint64_t largest_local_heap() const;
  // Heaps for tensors, an index each: the largest device-local one; where the host's memory is the
  // device's as well, all.
  std::vector<uint32_t> heaps() const;
  uint64_t memory_bytes() const;  // of those heaps
};

class Instance {
 public:
  explicit Instance(const std::string& library_path);

  const InstanceFunctions& functions() const { return functions_; }

  // Those with a compute queue: discrete, integrated, virtual, CPU; else in the loader's order.
  const std::vector<PhysicalDevice>& devices() const { return devices_; }

  // Of the device's memory, what no process uses; nullopt: the driver does not say.
  std::optional<uint64_t> free_bytes(const PhysicalDevice& device) const;

 private:
  void list_devices(VkInstance instance);
  void describe(PhysicalDevice& device) const;

  Loader loader_;
  InstanceFunctions functions_;
  std::vector<PhysicalDevice> devices_;
};

}  // namespace phi3c::vulkan
