/* Stands in for libvulkan: forwards to the real one, and misbehaves as the environment says.
 *
 * SHIM_NO_DEVICES, SHIM_API_1_0, SHIM_NO_16BIT, SHIM_NO_NARROW (no arithmetic of 8 and 16 bits),
 * SHIM_NO_PUSH (no VK_KHR_push_descriptor),
 * SHIM_DISCRETE (device memory that the host does not see, beside mapped memory),
 * SHIM_INTEGRATED=bytes (of device memory, beside the host's), SHIM_BUDGET=bytes (are free),
 * SHIM_QUEUES (a family with graphics, then the only usable one), SHIM_NO_TIMESTAMPS,
 * SHIM_SMALL (small limits), SHIM_FEW_WORKGROUPS (100 along x),
 * SHIM_MEMORY=bytes (vkAllocateMemory fails beyond),
 * SHIM_ALLOCATIONS=n (at a time), SHIM_OOM=function (is out of memory; SHIM_OOM_FIRST=n: from the
 * n-th call on, SHIM_OOM_COUNT=n: so often), SHIM_LOST=n (vkQueueSubmit fails from the n-th on),
 * SHIM_LOST_WAIT=n (vkWaitForFences does), SHIM_NO_BARRIERS (between commands),
 * SHIM_WRONG (vkQueueSubmit is called wrongly: for the validation layer to see).
 *
 * shim_calls(function) is how often it was called.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
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

struct calls {
  const char* function;
  uint64_t count;
};
static struct calls calls[64];

static uint64_t* calls_of(const char* function) {
  struct calls* found = calls;
  while (found->function && strcmp(found->function, function)) ++found;
  found->function = found->function ? found->function : strdup(function);
  return &found->count;
}

__attribute__((visibility("default"))) uint64_t shim_calls(const char* function) {
  return *calls_of(function);
}

/* Counts a call. Whether it is to be out of memory. */
static int fails(const char* function) {
  uint64_t call = ++*calls_of(function), first = number("SHIM_OOM_FIRST");
  if (!on("SHIM_OOM") || strcmp(getenv("SHIM_OOM"), function)) return 0;
  first = first ? first : 1;
  return call >= first && (!on("SHIM_OOM_COUNT") || call < first + number("SHIM_OOM_COUNT"));
}

#define REAL(name) static PFN_vk##name real_##name;
REAL(EnumeratePhysicalDevices)
REAL(EnumerateDeviceExtensionProperties)
REAL(GetPhysicalDeviceProperties)
REAL(GetPhysicalDeviceProperties2)
REAL(GetPhysicalDeviceFeatures2)
REAL(GetPhysicalDeviceMemoryProperties)
REAL(GetPhysicalDeviceMemoryProperties2)
REAL(GetPhysicalDeviceQueueFamilyProperties)
REAL(CreateDevice)
REAL(DestroyInstance)
REAL(GetDeviceProcAddr)
REAL(DestroyDevice)
REAL(GetDeviceQueue)
REAL(CreateCommandPool)
REAL(AllocateCommandBuffers)
REAL(CreatePipelineCache)
REAL(CreateComputePipelines)
REAL(CreateDescriptorPool)
REAL(CreateBuffer)
REAL(CmdPipelineBarrier)
REAL(FreeMemory)
REAL(AllocateMemory)
REAL(QueueSubmit)
REAL(WaitForFences)
REAL(GetBufferMemoryRequirements)

static VkResult EnumeratePhysicalDevices(VkInstance instance, uint32_t* n, VkPhysicalDevice* out) {
  if (fails("EnumeratePhysicalDevices")) return VK_ERROR_OUT_OF_HOST_MEMORY;
  if (!on("SHIM_NO_DEVICES")) return real_EnumeratePhysicalDevices(instance, n, out);
  *n = 0;
  return VK_SUCCESS;
}

static VkResult EnumerateDeviceExtensionProperties(VkPhysicalDevice device, const char* layer,
                                                   uint32_t* n, VkExtensionProperties* out) {
  VkResult result = real_EnumerateDeviceExtensionProperties(device, layer, n, out);
  if (on("SHIM_BUDGET") && out && *n) { /* in the last one's place */
    strcpy(out[*n - 1].extensionName, "VK_EXT_memory_budget");
  }
  for (uint32_t i = 0; out && on("SHIM_NO_PUSH") && i < *n; ++i) {
    if (!strcmp(out[i].extensionName, "VK_KHR_push_descriptor")) out[i].extensionName[0] = 'x';
  }
  return result;
}

static void change(VkPhysicalDeviceProperties* properties) {
  if (on("SHIM_INTEGRATED")) properties->deviceType = VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU;
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
  if (on("SHIM_INTEGRATED")) { /* and two heaps */
    out->memoryTypeCount = out->memoryHeapCount = 2;
    out->memoryTypes[1] = out->memoryTypes[0];
    out->memoryTypes[1].propertyFlags &= ~VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;
    out->memoryTypes[1].heapIndex = 1;
    out->memoryHeaps[0].size = number("SHIM_INTEGRATED");
    out->memoryHeaps[1].size = 1 << 30;
    out->memoryHeaps[1].flags = 0;
  }
}

static void GetPhysicalDeviceMemoryProperties2(VkPhysicalDevice device,
                                               VkPhysicalDeviceMemoryProperties2* out) {
  VkBaseOutStructure* next = out->pNext;
  if (on("SHIM_BUDGET")) out->pNext = NULL; /* the driver need not know it */
  real_GetPhysicalDeviceMemoryProperties2(device, out);
  out->pNext = next;
  for (VkBaseOutStructure* part = next; part && on("SHIM_BUDGET"); part = part->pNext) {
    if (part->sType == VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT) {
      VkPhysicalDeviceMemoryBudgetPropertiesEXT* budget = (void*)part;
      budget->heapBudget[0] = number("SHIM_BUDGET") + 1000;
      budget->heapUsage[0] = 1000;
    }
  }
}

static void GetPhysicalDeviceQueueFamilyProperties(VkPhysicalDevice device, uint32_t* n,
                                                   VkQueueFamilyProperties* out) {
  if (on("SHIM_QUEUES")) *n = out ? 1 : 2;
  real_GetPhysicalDeviceQueueFamilyProperties(device, n, out);
  if (on("SHIM_QUEUES")) *n = 2;
  if (out && on("SHIM_QUEUES")) {
    out[1] = out[0];
    out[1].queueFlags &= ~VK_QUEUE_GRAPHICS_BIT;
  }
  for (uint32_t i = 0; out && i < *n && on("SHIM_NO_TIMESTAMPS"); ++i) out[i].timestampValidBits = 0;
}

/* Of the driver; the other one may not be asked for. */
static uint32_t family(uint32_t index) {
  if (!on("SHIM_QUEUES")) return index;
  if (index != 1) abort();
  return 0;
}

static VkResult CreateDevice(VkPhysicalDevice physical, const VkDeviceCreateInfo* info,
                             const VkAllocationCallbacks* callbacks, VkDevice* out) {
  VkDeviceCreateInfo changed = *info;
  VkDeviceQueueCreateInfo queue = *info->pQueueCreateInfos;
  queue.queueFamilyIndex = family(queue.queueFamilyIndex);
  changed.pQueueCreateInfos = &queue;
  if (on("SHIM_BUDGET")) { /* an extension that the driver need not know, by one that it does */
    static const char* names[64];
    for (uint32_t i = 0; i < info->enabledExtensionCount; ++i) {
      names[i] = strcmp(info->ppEnabledExtensionNames[i], "VK_EXT_memory_budget")
                     ? info->ppEnabledExtensionNames[i] : "VK_KHR_maintenance1";
    }
    changed.ppEnabledExtensionNames = names;
  }
  if (fails("CreateDevice")) return VK_ERROR_OUT_OF_HOST_MEMORY;
  return real_CreateDevice(physical, &changed, callbacks, out);
}

static void DestroyInstance(VkInstance instance, const VkAllocationCallbacks* callbacks) {
  fails("DestroyInstance");
  real_DestroyInstance(instance, callbacks);
}

static void DestroyDevice(VkDevice device, const VkAllocationCallbacks* callbacks) {
  fails("DestroyDevice");
  real_DestroyDevice(device, callbacks);
}

static void GetDeviceQueue(VkDevice device, uint32_t index, uint32_t n, VkQueue* out) {
  real_GetDeviceQueue(device, family(index), n, out);
}

static VkResult CreateCommandPool(VkDevice device, const VkCommandPoolCreateInfo* info,
                                  const VkAllocationCallbacks* callbacks, VkCommandPool* out) {
  VkCommandPoolCreateInfo changed = *info;
  changed.queueFamilyIndex = family(info->queueFamilyIndex);
  if (fails("CreateCommandPool")) return VK_ERROR_OUT_OF_HOST_MEMORY;
  return real_CreateCommandPool(device, &changed, callbacks, out);
}

static VkResult AllocateCommandBuffers(VkDevice device, const VkCommandBufferAllocateInfo* info,
                                       VkCommandBuffer* out) {
  if (fails("AllocateCommandBuffers")) return VK_ERROR_OUT_OF_DEVICE_MEMORY;
  return real_AllocateCommandBuffers(device, info, out);
}

#define CREATES(function, Info, Handle, error)                                                   \
  static VkResult function(VkDevice device, const Info* info,                                    \
                           const VkAllocationCallbacks* callbacks, Handle* out) {                \
    return fails(#function) ? error : real_##function(device, info, callbacks, out);             \
  }
CREATES(CreatePipelineCache, VkPipelineCacheCreateInfo, VkPipelineCache, VK_ERROR_OUT_OF_HOST_MEMORY)
CREATES(CreateDescriptorPool, VkDescriptorPoolCreateInfo, VkDescriptorPool,
        VK_ERROR_OUT_OF_DEVICE_MEMORY)
CREATES(CreateBuffer, VkBufferCreateInfo, VkBuffer, VK_ERROR_OUT_OF_HOST_MEMORY)

static VkResult CreateComputePipelines(VkDevice device, VkPipelineCache cache, uint32_t n,
                                       const VkComputePipelineCreateInfo* infos,
                                       const VkAllocationCallbacks* callbacks, VkPipeline* out) {
  if (fails("CreateComputePipelines")) return VK_ERROR_OUT_OF_DEVICE_MEMORY;
  return real_CreateComputePipelines(device, cache, n, infos, callbacks, out);
}

static void CmdPipelineBarrier(VkCommandBuffer commands, VkFlags from, VkFlags to, VkFlags flags,
                               uint32_t n, const VkMemoryBarrier* barriers, uint32_t buffers,
                               const VkBufferMemoryBarrier* buffer, uint32_t images,
                               const VkImageMemoryBarrier* image) {
  if (to != VK_PIPELINE_STAGE_HOST_BIT) {
    fails("CmdPipelineBarrier");
    if (on("SHIM_NO_BARRIERS")) return;
  }
  real_CmdPipelineBarrier(commands, from, to, flags, n, barriers, buffers, buffer, images, image);
}

static void GetBufferMemoryRequirements(VkDevice device, VkBuffer buffer,
                                        VkMemoryRequirements* out) {
  real_GetBufferMemoryRequirements(device, buffer, out);
  if (on("SHIM_DISCRETE") || on("SHIM_INTEGRATED")) out->memoryTypeBits = 3;
}

static struct {
  VkDeviceMemory memory;
  uint64_t size;
  uint32_t type;
} allocations[8192];

static uint64_t allocated(int type) { /* bytes; -1: of any */
  uint64_t sum = 0;
  for (int i = 0; i < 8192; ++i) {
    if (type < 0 || (int)allocations[i].type == type) sum += allocations[i].size;
  }
  return sum;
}

static void FreeMemory(VkDevice device, VkDeviceMemory memory,
                       const VkAllocationCallbacks* callbacks) {
  for (int i = 0; memory && i < 8192; ++i) {
    if (allocations[i].memory == memory) memset(&allocations[i], 0, sizeof allocations[i]);
  }
  real_FreeMemory(device, memory, callbacks);
}

static VkResult AllocateMemory(VkDevice device, const VkMemoryAllocateInfo* info,
                               const VkAllocationCallbacks* callbacks, VkDeviceMemory* out) {
  VkMemoryAllocateInfo changed = *info;
  uint64_t size = info->allocationSize, live = 0;
  int slot = 0;
  if (on("SHIM_DISCRETE") || on("SHIM_INTEGRATED")) changed.memoryTypeIndex = 0;
  if (fails("AllocateMemory")) return VK_ERROR_OUT_OF_DEVICE_MEMORY;
  for (int i = 0; i < 8192; ++i) live += allocations[i].memory != NULL;
  while (allocations[slot].memory) ++slot;
  if (on("SHIM_ALLOCATIONS") && live >= number("SHIM_ALLOCATIONS")) {
    return VK_ERROR_TOO_MANY_OBJECTS;
  }
  if (on("SHIM_MEMORY") && allocated(-1) + size > number("SHIM_MEMORY")) {
    return VK_ERROR_OUT_OF_DEVICE_MEMORY;
  }
  if (on("SHIM_INTEGRATED") && info->memoryTypeIndex == 0 &&
      allocated(0) + size > number("SHIM_INTEGRATED")) {
    return VK_ERROR_OUT_OF_DEVICE_MEMORY;
  }
  VkResult result = real_AllocateMemory(device, &changed, callbacks, out);
  if (result == VK_SUCCESS) {
    allocations[slot].memory = *out;
    allocations[slot].size = size;
    allocations[slot].type = info->memoryTypeIndex;
  }
  return result;
}

static VkResult QueueSubmit(VkQueue queue, uint32_t n, const VkSubmitInfo* info, VkFence fence) {
  if (fails("QueueSubmit")) return VK_ERROR_OUT_OF_DEVICE_MEMORY;
  if (on("SHIM_LOST") && shim_calls("QueueSubmit") >= number("SHIM_LOST")) {
    return VK_ERROR_DEVICE_LOST;
  }
  VkSubmitInfo changed = *info;
  if (on("SHIM_WRONG")) changed.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO;
  return real_QueueSubmit(queue, n, &changed, fence);
}

static VkResult WaitForFences(VkDevice device, uint32_t n, const VkFence* fences, VkBool32 all,
                              uint64_t timeout) {
  fails("WaitForFences");
  if (on("SHIM_LOST_WAIT") && shim_calls("WaitForFences") >= number("SHIM_LOST_WAIT")) {
    return VK_ERROR_DEVICE_LOST;
  }
  return real_WaitForFences(device, n, fences, all, timeout);
}

/* Deletes DLManagedTensors, while the process may end. */
static struct {
  void** tensors;
  uint64_t count;
} work;

static void* free_tensors(void* unused) {
  for (uint64_t i = 0; i < work.count; ++i) {
    void (**deleter)(void*) = (void (**)(void*))((char*)work.tensors[i] + 56);
    (*deleter)(work.tensors[i]);
  }
  return unused;
}

__attribute__((visibility("default"))) void shim_free_in_thread(void** tensors, uint64_t count) {
  pthread_t thread;
  work.tensors = malloc(count * sizeof *tensors);
  memcpy(work.tensors, tensors, count * sizeof *tensors);
  work.count = count;
  pthread_create(&thread, NULL, free_tensors, NULL);
}

#define WRAP(function)                                  \
  if (found && !strcmp(name, "vk" #function)) {         \
    real_##function = (PFN_vk##function)found;          \
    return (PFN_vkVoidFunction)function;                \
  }

static PFN_vkVoidFunction GetDeviceProcAddr(VkDevice device, const char* name) {
  PFN_vkVoidFunction found = real_GetDeviceProcAddr(device, name);
  WRAP(DestroyDevice)
  WRAP(GetDeviceQueue)
  WRAP(CreateCommandPool)
  WRAP(AllocateCommandBuffers)
  WRAP(CreatePipelineCache)
  WRAP(CreateComputePipelines)
  WRAP(CreateDescriptorPool)
  WRAP(CreateBuffer)
  WRAP(CmdPipelineBarrier)
  WRAP(AllocateMemory)
  WRAP(FreeMemory)
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
  WRAP(GetPhysicalDeviceMemoryProperties2)
  WRAP(GetPhysicalDeviceQueueFamilyProperties)
  WRAP(CreateDevice)
  WRAP(DestroyInstance)
  WRAP(GetDeviceProcAddr)
  return found;
}
