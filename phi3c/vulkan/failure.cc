#include "failure.h"

namespace phi3c::vulkan {

std::string name_of(VkResult result) {
#define PHI3C_NAME(name) \
  case name:             \
    return #name;
  switch (result) {
    PHI3C_NAME(VK_SUCCESS)
    PHI3C_NAME(VK_NOT_READY)
    PHI3C_NAME(VK_TIMEOUT)
    PHI3C_NAME(VK_INCOMPLETE)
    PHI3C_NAME(VK_ERROR_OUT_OF_HOST_MEMORY)
    PHI3C_NAME(VK_ERROR_OUT_OF_DEVICE_MEMORY)
    PHI3C_NAME(VK_ERROR_INITIALIZATION_FAILED)
    PHI3C_NAME(VK_ERROR_DEVICE_LOST)
    PHI3C_NAME(VK_ERROR_MEMORY_MAP_FAILED)
    PHI3C_NAME(VK_ERROR_LAYER_NOT_PRESENT)
    PHI3C_NAME(VK_ERROR_EXTENSION_NOT_PRESENT)
    PHI3C_NAME(VK_ERROR_FEATURE_NOT_PRESENT)
    PHI3C_NAME(VK_ERROR_INCOMPATIBLE_DRIVER)
    PHI3C_NAME(VK_ERROR_TOO_MANY_OBJECTS)
    PHI3C_NAME(VK_ERROR_FRAGMENTED_POOL)
    PHI3C_NAME(VK_ERROR_UNKNOWN)
    PHI3C_NAME(VK_ERROR_OUT_OF_POOL_MEMORY)
    PHI3C_NAME(VK_ERROR_INVALID_SHADER_NV)
    PHI3C_NAME(VK_ERROR_VALIDATION_FAILED_EXT)
    default:
      return text("VkResult ", static_cast<int>(result));
  }
#undef PHI3C_NAME
}

bool is_out_of_memory(VkResult result) {
  return result == VK_ERROR_OUT_OF_HOST_MEMORY || result == VK_ERROR_OUT_OF_DEVICE_MEMORY ||
         result == VK_ERROR_TOO_MANY_OBJECTS || result == VK_ERROR_OUT_OF_POOL_MEMORY;
}

std::string version_text(uint32_t version) {
  return text(major_of(version), ".", minor_of(version), ".", patch_of(version));
}

}  // namespace phi3c::vulkan
