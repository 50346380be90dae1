#include "loader.h"

#include <dlfcn.h>

#include <vector>

#include "failure.h"

namespace phi3c::vulkan {
namespace {

std::vector<std::string> names(const std::string& path) {
  if (!path.empty()) return {path};
#ifdef __APPLE__
  return {"libvulkan.1.dylib", "libvulkan.dylib", "libMoltenVK.dylib"};
#else
  return {"libvulkan.so.1"};
#endif
}

constexpr const char* kInstall =
#ifdef __APPLE__
    " (macOS: brew install molten-vk vulkan-loader)";
#else
    " (Debian: apt install libvulkan1 mesa-vulkan-drivers)";
#endif

}  // namespace

Loader::Loader(const std::string& path) {
  void* library = nullptr;  // stays open: drivers do not expect to be unloaded
  std::string tried;
  for (const std::string& name : names(path)) {
    if ((library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL))) {
      name_ = name;
      break;
    }
    tried += (tried.empty() ? "" : ", ") + name;
  }
  if (!library) {
    fail(kDeviceError, "vulkan: found no Vulkan loader (", tried, ")", kInstall);
  }
  get_ = reinterpret_cast<PFN_vkGetInstanceProcAddr>(dlsym(library, "vkGetInstanceProcAddr"));
  if (!get_) fail(kDeviceError, "vulkan: ", name_, ": not a Vulkan loader (no vkGetInstanceProcAddr)");
#define PHI3C_LOAD(name)                                                                   \
  global_.name = reinterpret_cast<PFN_vk##name>(get_(nullptr, "vk" #name));                \
  if (!global_.name) fail(kDeviceError, "vulkan: ", name_, ": the loader has no vk" #name);
  PHI3C_VULKAN_GLOBAL(PHI3C_LOAD)
#undef PHI3C_LOAD
  // A loader of 1.0 has no such function, and would refuse the instance below.
  auto instance_version = reinterpret_cast<PFN_vkEnumerateInstanceVersion>(
      get_(nullptr, "vkEnumerateInstanceVersion"));
  uint32_t found = version(1, 0);
  if (instance_version && instance_version(&found) != VK_SUCCESS) found = version(1, 0);
  if (found < version(1, 1)) {
    fail(kDeviceError, "vulkan: ", name_, ": the loader knows Vulkan ", version_text(found),
         "; needed: 1.1 or later", kInstall);
  }
}

void Loader::load(VkInstance instance, InstanceFunctions& functions) const {
#define PHI3C_LOAD(name)                                                           \
  functions.name = reinterpret_cast<PFN_vk##name>(get_(instance, "vk" #name));     \
  if (!functions.name) fail(kDeviceError, "vulkan: ", name_, ": the instance has no vk" #name);
  PHI3C_VULKAN_INSTANCE(PHI3C_LOAD)
#undef PHI3C_LOAD
}

}  // namespace phi3c::vulkan
