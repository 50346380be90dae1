/* Stands in for libvulkan: forwards to the real one, and misbehaves as the environment says.
 *
 * SHIM_NO_DEVICES, SHIM_API_1_0, SHIM_NO_16BIT, SHIM_NO_NARROW (no arithmetic of 8 and 16 bits),
 * SHIM_NO_PUSH (no VK_KHR_push_descriptor),
 * SHIM_DISCRETE (device memory that the host does not see, beside mapped memory),
 * SHIM_SMALL (small limits), SHIM_FEW_WORKGROUPS (100 along x),
 * SHIM_MEMORY=bytes (vkAllocateMemory fails beyond), SHIM_LOST=n
 * (vkQueueSubmit fails from the n-th on), SHIM_LOST_WAIT=n (vkWaitForFences does),
 * SHIM_WRONG (vkQueueSubmit is called wrongly: for the validation layer to see).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <wchar.h>
#include "vulkan.cdef.h"

static int on(const char* name) { return getenv(name) != NULL; }
static uint64_t number(const char* name) { return getenv(name) ? strtoull(getenv(name), 0, 10) : 0; }

static PFN_vkGetInstanceProcAddr real_instance(void) {
  void* library = dlopen("libvulkan.so.1", RTLD_NOW | RTLD_LOCAL);
  return (PFN_vkGetInstanceProcAddr)dlsym(library, "vkGetInstanceProcAddr");
}

#define REAL(name) static PFN_vk##name real_##name;
REAL(EnumeratePhysicalDevices)
REAL(EnumerateDeviceExtensionProperties)
REAL(GetPhysicalDeviceProperties)
REAL(GetPhysicalDeviceProperties2)
REAL(GetPhysicalDeviceFeatures2)
REAL(GetPhysicalDeviceMemoryProperties)
REAL(GetDeviceProcAddr)
REAL(AllocateMemory)
REAL(QueueSubmit)
REAL(WaitForFences)
REAL(GetBufferMemoryRequirements)

static VkResult EnumeratePhysicalDevices(VkInstance instance, uint32_t* n, VkPhysicalDevice* out) {
  if (!on("SHIM_NO_DEVICES")) return real_EnumeratePhysicalDevices(instance, n, out);
  *n = 0;
  return VK_SUCCESS;
}

static VkResult EnumerateDeviceExtensionProperties(VkPhysicalDevice device, const char* layer,
                                                   uint32_t* n, VkExtensionProperties* out) {
  VkResult result = real_EnumerateDeviceExtensionProperties(device, layer, n, out);
  for (uint32_t i = 0; out && on("SHIM_NO_PUSH") && i < *n; ++i) {
    if (!strcmp(out[i].extensionName, "VK_KHR_push_descriptor")) out[i].extensionName[0] = 'x';
  }
  return result;
}

static void change(VkPhysicalDeviceProperties* properties) {
  if (on("SHIM_API_1_0")) properties->apiVersion = 1u << 22;
  if (on("SHIM_FEW_WORKGROUPS")) properties->limits.maxComputeWorkGroupCount[0] = 100;
  if (on("SHIM_SMALL")) {
    properties->limits.maxStorageBufferRange = 1 << 20;
    properties->limits.maxComputeWorkGroupCount[0] = 100;
    properties->limits.maxPushConstantsSize = 32;
    properties->limits.maxComputeWorkGroupInvocations = 63;
  }
}

static void GetPhysicalDeviceProperties(VkPhysicalDevice device, VkPhysicalDeviceProperties* out) {
  real_GetPhysicalDeviceProperties(device, out);
  change(out);
}

static void GetPhysicalDeviceProperties2(VkPhysicalDevice device,
                                         VkPhysicalDeviceProperties2* out) {
  real_GetPhysicalDeviceProperties2(device, out);
  change(&out->properties);
}

static void GetPhysicalDeviceFeatures2(VkPhysicalDevice device, VkPhysicalDeviceFeatures2* out) {
  real_GetPhysicalDeviceFeatures2(device, out);
  if (on("SHIM_NO_NARROW")) out->features.shaderInt16 = 0;
  for (VkBaseOutStructure* part = out->pNext; part; part = part->pNext) {
    if (part->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES &&
        on("SHIM_NO_16BIT")) {
      ((VkPhysicalDevice16BitStorageFeatures*)part)->storageBuffer16BitAccess = 0;
    }
    if (part->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES &&
        on("SHIM_NO_NARROW")) {
      ((VkPhysicalDeviceShaderFloat16Int8Features*)part)->shaderFloat16 = 0;
      ((VkPhysicalDeviceShaderFloat16Int8Features*)part)->shaderInt8 = 0;
    }
  }
}

static void GetPhysicalDeviceMemoryProperties(VkPhysicalDevice device,
                                              VkPhysicalDeviceMemoryProperties* out) {
  real_GetPhysicalDeviceMemoryProperties(device, out);
  if (on("SHIM_DISCRETE")) { /* of one type make two */
    out->memoryTypeCount = 2;
    out->memoryTypes[1] = out->memoryTypes[0];
    out->memoryTypes[0].propertyFlags = VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;
    out->memoryTypes[1].propertyFlags &= ~VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;
  }
}

static void GetBufferMemoryRequirements(VkDevice device, VkBuffer buffer,
                                        VkMemoryRequirements* out) {
  real_GetBufferMemoryRequirements(device, buffer, out);
  if (on("SHIM_DISCRETE")) out->memoryTypeBits = 3;
}

static uint64_t allocated;

static VkResult AllocateMemory(VkDevice device, const VkMemoryAllocateInfo* info,
                               const VkAllocationCallbacks* callbacks, VkDeviceMemory* out) {
  VkMemoryAllocateInfo changed = *info;
  if (on("SHIM_DISCRETE")) changed.memoryTypeIndex = 0;
  if (on("SHIM_MEMORY") && allocated + info->allocationSize > number("SHIM_MEMORY")) {
    return VK_ERROR_OUT_OF_DEVICE_MEMORY;
  }
  allocated += info->allocationSize;
  return real_AllocateMemory(device, &changed, callbacks, out);
}

static VkResult QueueSubmit(VkQueue queue, uint32_t n, const VkSubmitInfo* info, VkFence fence) {
  static uint64_t calls;
  if (on("SHIM_LOST") && ++calls >= number("SHIM_LOST")) return VK_ERROR_DEVICE_LOST;
  VkSubmitInfo changed = *info;
  if (on("SHIM_WRONG")) changed.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO;
  return real_QueueSubmit(queue, n, &changed, fence);
}

static VkResult WaitForFences(VkDevice device, uint32_t n, const VkFence* fences, VkBool32 all,
                              uint64_t timeout) {
  static uint64_t calls;
  if (on("SHIM_LOST_WAIT") && ++calls >= number("SHIM_LOST_WAIT")) return VK_ERROR_DEVICE_LOST;
  return real_WaitForFences(device, n, fences, all, timeout);
}

#define WRAP(function)                                  \
  if (found && !strcmp(name, "vk" #function)) {         \
    real_##function = (PFN_vk##function)found;          \
    return (PFN_vkVoidFunction)function;                \
  }

static PFN_vkVoidFunction GetDeviceProcAddr(VkDevice device, const char* name) {
  PFN_vkVoidFunction found = real_GetDeviceProcAddr(device, name);
  WRAP(AllocateMemory)
  WRAP(QueueSubmit)
  WRAP(WaitForFences)
  WRAP(GetBufferMemoryRequirements)
  return found;
}

__attribute__((visibility("default"))) PFN_vkVoidFunction vkGetInstanceProcAddr(
    VkInstance instance, const char* name) {
  PFN_vkVoidFunction found = real_instance()(instance, name);
  WRAP(EnumeratePhysicalDevices)
  WRAP(EnumerateDeviceExtensionProperties)
  WRAP(GetPhysicalDeviceProperties)
  WRAP(GetPhysicalDeviceProperties2)
  WRAP(GetPhysicalDeviceFeatures2)
  WRAP(GetPhysicalDeviceMemoryProperties)
  WRAP(GetDeviceProcAddr)
  return found;
}
