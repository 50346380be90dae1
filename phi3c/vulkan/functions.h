// The functions of Vulkan that are used, by the handle they belong to: none is linked.
#pragma once

#include "headers.h"

namespace phi3c::vulkan {

#define PHI3C_VULKAN_GLOBAL(F) \
  F(CreateInstance)            \
  F(EnumerateInstanceExtensionProperties)

#define PHI3C_VULKAN_INSTANCE(F)              \
  F(DestroyInstance)                          \
  F(EnumeratePhysicalDevices)                 \
  F(EnumerateDeviceExtensionProperties)       \
  F(GetPhysicalDeviceProperties)              \
  F(GetPhysicalDeviceProperties2)             \
  F(GetPhysicalDeviceFeatures2)               \
  F(GetPhysicalDeviceMemoryProperties)        \
  F(GetPhysicalDeviceMemoryProperties2)       \
  F(GetPhysicalDeviceQueueFamilyProperties)   \
  F(CreateDevice)                             \
  F(GetDeviceProcAddr)

#define PHI3C_VULKAN_DEVICE(F)  \
  F(DestroyDevice)              \
  F(GetDeviceQueue)             \
  F(DeviceWaitIdle)             \
  F(QueueSubmit)                \
  F(AllocateMemory)             \
  F(FreeMemory)                 \
  F(MapMemory)                  \
  F(CreateBuffer)               \
  F(DestroyBuffer)              \
  F(GetBufferMemoryRequirements) \
  F(BindBufferMemory)           \
  F(CreateFence)                \
  F(ResetFences)                \
  F(GetFenceStatus)             \
  F(WaitForFences)              \
  F(CreateCommandPool)          \
  F(DestroyCommandPool)         \
  F(AllocateCommandBuffers)     \
  F(BeginCommandBuffer)         \
  F(EndCommandBuffer)           \
  F(CmdPipelineBarrier)         \
  F(CmdUpdateBuffer)            \
  F(CmdCopyBuffer)              \
  F(CmdBindPipeline)            \
  F(CmdBindDescriptorSets)      \
  F(CmdPushConstants)           \
  F(CmdDispatch)                \
  F(CreateQueryPool)            \
  F(CmdResetQueryPool)          \
  F(CmdWriteTimestamp)          \
  F(GetQueryPoolResults)        \
  F(CreateShaderModule)         \
  F(DestroyShaderModule)        \
  F(CreateDescriptorSetLayout)  \
  F(DestroyDescriptorSetLayout) \
  F(CreatePipelineLayout)       \
  F(DestroyPipelineLayout)      \
  F(CreateComputePipelines)     \
  F(DestroyPipeline)            \
  F(CreatePipelineCache)        \
  F(DestroyPipelineCache)       \
  F(GetPipelineCacheData)       \
  F(CreateDescriptorPool)       \
  F(ResetDescriptorPool)        \
  F(DestroyDescriptorPool)      \
  F(AllocateDescriptorSets)     \
  F(UpdateDescriptorSets)

#define PHI3C_MEMBER(name) PFN_vk##name name = nullptr;

struct GlobalFunctions {
  PHI3C_VULKAN_GLOBAL(PHI3C_MEMBER)
};

struct InstanceFunctions {
  PHI3C_VULKAN_INSTANCE(PHI3C_MEMBER)
};

struct DeviceFunctions {
  PHI3C_VULKAN_DEVICE(PHI3C_MEMBER)
  PFN_vkCmdPushDescriptorSetKHR CmdPushDescriptorSetKHR = nullptr;  // of an extension
};

#undef PHI3C_MEMBER

}  // namespace phi3c::vulkan
