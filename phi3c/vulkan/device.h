// A logical device with its one compute queue, and whether it still works.
#pragma once

#include <string>

#include "failure.h"
#include "instance.h"

namespace phi3c::vulkan {

class Device {
 public:
  // Fails where the device knows Vulkan 1.0 only.
  Device(const Instance& instance, int index);
  ~Device();  // only where opening it has failed
  Device(const Device&) = delete;

  // Fails on anything but VK_SUCCESS, with the call's name: out of memory as such, after which all
  // is as before the call. A lost device stays lost.
  void check(VkResult result, const char* call);

  // The same, where any failure leaves commands undone: no later result could be trusted.
  void check_fatal(VkResult result, const char* call);

  // The same, of a call that can be repeated after it was out of memory.
  void check_fatal_unless_memory(VkResult result, const char* call);

  // Fails if the device was lost. To be called before any work.
  void require_alive() const;

  bool lost() const { return !lost_.empty(); }

  const int index;
  const PhysicalDevice& physical;
  DeviceFunctions vk;
  VkDevice handle = nullptr;
  VkQueue queue = nullptr;

 private:
  void load(const InstanceFunctions& functions);

  std::string lost_;  // by what
};

}  // namespace phi3c::vulkan
