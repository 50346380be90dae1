// The Vulkan loader: the system's library that finds the drivers.
#pragma once

#include <string>

#include "functions.h"

namespace phi3c::vulkan {

class Loader {
 public:
  // `path`: the library; empty: the system's, by its usual names. Fails where there is none, or
  // where it knows Vulkan 1.0 only.
  explicit Loader(const std::string& path);

  const GlobalFunctions& global() const { return global_; }

  // Those of an instance, in their order. Fails at the first that it lacks.
  void load(VkInstance instance, InstanceFunctions& functions) const;

 private:
  std::string name_;
  PFN_vkGetInstanceProcAddr get_ = nullptr;
  GlobalFunctions global_;
};

}  // namespace phi3c::vulkan
