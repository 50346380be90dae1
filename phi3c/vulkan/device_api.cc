#include "device_api.h"

#include <cstring>
#include <vector>

#include "boundary.h"

namespace phi3c::vulkan {
namespace {

namespace ffi = tvm::ffi;
using tvm::Device;
using tvm::runtime::DeviceAttrKind;

thread_local int current = 0;

Buffer& buffer_at(Context& context, const void* pointer, uint64_t offset, uint64_t bytes) {
  Buffer* buffer = context.find(pointer);
  if (!buffer) fail(kValueError, "vulkan: a copy from or to what is no buffer of Vulkan");
  if (offset > buffer->size || bytes > buffer->size - offset) {
    fail(kValueError, "vulkan: a copy of bytes ", offset, " to ", offset + bytes,
         " of a buffer of ", buffer->size);
  }
  return *buffer;
}

void copy_between(Context& context, Buffer& from, uint64_t from_offset, Buffer& to,
                  uint64_t to_offset, uint64_t bytes) {
  if (&from == &to && from_offset < to_offset + bytes && to_offset < from_offset + bytes) {
    fail(kValueError, "vulkan: a copy within a buffer from ", from_offset, " to ", to_offset,
         " of ", bytes, " bytes, which overlap");
  }
  if (from.device == to.device) {
    context.open(from.device).stream.copy(from, from_offset, to, to_offset, bytes);
    return;
  }
  std::vector<uint8_t> host(bytes);
  context.open(from.device).stream.download(from, from_offset, host.data(), bytes);
  context.open(to.device).stream.upload(to, to_offset, host.data(), bytes);
}

class DeviceApi final : public tvm::runtime::DeviceAPI {
 public:
  void SetDevice(Device device) final { current = device.device_id; }

  void GetAttr(Device device, DeviceAttrKind kind, ffi::Any* value) final {
    if (kind == tvm::runtime::kExist) {
      *value = exists(device.device_id) ? 1 : 0;
      return;
    }
    locked([&](Context& context) {
      const auto& devices = context.instance().devices();
      if (device.device_id < 0 || static_cast<size_t>(device.device_id) >= devices.size()) return;
      get(context, devices[device.device_id], device.device_id, kind, value);
    });
  }

  // The attributes of a target of kind "vulkan", of `Target({"kind": "vulkan", "from_device": 0})`.
  void GetTargetProperty(Device device, const std::string& property, ffi::Any* value) final {
    locked([&](Context& context) {
      const auto& devices = context.instance().devices();
      if (device.device_id < 0 || static_cast<size_t>(device.device_id) >= devices.size()) return;
      get_property(devices[device.device_id], property, value);
    });
  }

  void* AllocDataSpace(Device device, size_t bytes, size_t, DLDataType) final {
    return locked([&](Context& context) -> void* {
      return context.open(device.device_id).allocate(bytes);
    });
  }

  void FreeDataSpace(Device, void* pointer) final {
    released([&](Context& context) {
      Buffer* buffer = context.find(pointer);
      if (!buffer) return;
      OpenDevice& open = *context.opened()[buffer->device];
      open.memory.owned.erase(buffer);
      open.stream.release(buffer);
    });
  }

  void* AllocWorkspace(Device device, size_t bytes, DLDataType) final {
    return locked([&](Context& context) -> void* {
      return context.open(device.device_id).allocate_workspace(bytes);
    });
  }

  void FreeWorkspace(Device, void* pointer) final {
    released([&](Context& context) {
      Buffer* buffer = context.find(pointer);
      if (!buffer) return;
      OpenDevice& open = *context.opened()[buffer->device];
      open.memory.owned.erase(buffer);
      open.workspaces.give_back(buffer);
    });
  }

  void StreamSync(Device device, TVMStreamHandle) final {
    locked([&](Context& context) {
      OpenDevice& open = context.open(device.device_id);
      open.stream.synchronize();
      open.pipelines.save_now_and_then();
    });
  }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset,
                      size_t bytes, Device from_device, Device to_device, DLDataType,
                      TVMStreamHandle) final {
    if (!bytes) return;
    locked([&](Context& context) {
      bool from_here = from_device.device_type == kDLVulkan;
      bool to_here = to_device.device_type == kDLVulkan;
      if (from_here && to_here) {
        copy_between(context, buffer_at(context, from, from_offset, bytes), from_offset,
                     buffer_at(context, to, to_offset, bytes), to_offset, bytes);
      } else if (from_here && to_device.device_type == kDLCPU) {
        Buffer& buffer = buffer_at(context, from, from_offset, bytes);
        OpenDevice& open = context.open(buffer.device);
        open.stream.download(buffer, from_offset, static_cast<char*>(to) + to_offset, bytes);
        open.pipelines.save_now_and_then();
      } else if (to_here && from_device.device_type == kDLCPU) {
        Buffer& buffer = buffer_at(context, to, to_offset, bytes);
        context.open(buffer.device)
            .stream.upload(buffer, to_offset, static_cast<const char*>(from) + from_offset, bytes);
      } else {
        fail(kValueError, "vulkan: a copy from device type ", from_device.device_type, " to ",
             to_device.device_type, "; accepted: between Vulkan devices, and from or to the CPU");
      }
    });
  }

 private:
  // Asked of machines without Vulkan as well: does not fail.
  static bool exists(int index) {
    try {
      return locked([&](Context& context) {
        const auto& devices = context.instance().devices();
        return index >= 0 && static_cast<size_t>(index) < devices.size() &&
               devices[index].properties.apiVersion >= version(1, 1);
      });
    } catch (const std::exception&) {
      return false;
    }
  }

  static void get(Context& context, const PhysicalDevice& device, int index, DeviceAttrKind kind,
                  ffi::Any* value) {
    const VkPhysicalDeviceLimits& limits = device.properties.limits;
    const uint32_t* size = limits.maxComputeWorkGroupSize;
    switch (kind) {
      case tvm::runtime::kMaxThreadsPerBlock:
        *value = static_cast<int64_t>(limits.maxComputeWorkGroupInvocations);
        break;
      case tvm::runtime::kWarpSize:
        *value = static_cast<int64_t>(device.subgroup_size);
        break;
      case tvm::runtime::kMaxSharedMemoryPerBlock:
        *value = static_cast<int64_t>(limits.maxComputeSharedMemorySize);
        break;
      case tvm::runtime::kComputeVersion:
        *value = ffi::String(version_text(device.properties.apiVersion));
        break;
      case tvm::runtime::kDeviceName:
        *value = ffi::String(device.name());
        break;
      case tvm::runtime::kMaxThreadDimensions:
        *value = ffi::String(text("[", size[0], ", ", size[1], ", ", size[2], "]"));
        break;
      case tvm::runtime::kApiVersion:
        *value = static_cast<int64_t>(device.properties.apiVersion);
        break;
      case tvm::runtime::kDriverVersion:
        *value = ffi::String(device.driver);
        break;
      case tvm::runtime::kTotalGlobalMemory:
        *value = static_cast<int64_t>(device.memory_bytes());
        break;
      case tvm::runtime::kAvailableGlobalMemory: {
        const auto& opened = context.opened();
        bool open = static_cast<size_t>(index) < opened.size() && opened[index];
        uint64_t used = open ? opened[index]->memory.in_use() : 0;
        uint64_t left = device.memory_bytes() - std::min(used, device.memory_bytes());
        if (auto free = context.instance().free_bytes(device)) {
          left = std::min(left, *free + (open ? opened[index]->memory.idle() : 0));
        }
        *value = static_cast<int64_t>(left);
        break;
      }
      default:
        break;  // what Vulkan does not say stays None
    }
  }

  static void get_property(const PhysicalDevice& device, const std::string& property,
                           ffi::Any* value) {
    const VkPhysicalDeviceLimits& limits = device.properties.limits;
    const Features& f = device.features;
    const std::pair<const char*, bool> flags[] = {
        {"supports_float16", f.shader_float16},
        {"supports_float32", true},
        {"supports_float64", f.shader_float64},
        {"supports_int8", f.shader_int8},
        {"supports_int16", f.shader_int16},
        {"supports_int32", true},
        {"supports_int64", f.shader_int64},
        {"supports_8bit_buffer", f.storage_buffer_8bit},
        {"supports_16bit_buffer", f.storage_buffer_16bit},
        {"supports_storage_buffer_storage_class", true},  // of 1.1
        {"supports_push_descriptor", device.max_push_descriptors > 0},
    };
    for (const auto& [name, has] : flags) {
      if (property == name) *value = has;
    }
    const std::pair<const char*, int64_t> numbers[] = {
        {"supported_subgroup_operations", device.subgroup_operations},
        {"max_num_threads", limits.maxComputeWorkGroupInvocations},
        {"max_threads_per_block", limits.maxComputeWorkGroupInvocations},
        {"thread_warp_size", device.subgroup_size},
        {"max_block_size_x", limits.maxComputeWorkGroupSize[0]},
        {"max_block_size_y", limits.maxComputeWorkGroupSize[1]},
        {"max_block_size_z", limits.maxComputeWorkGroupSize[2]},
        {"max_push_constants_size", limits.maxPushConstantsSize},
        {"max_uniform_buffer_range", limits.maxUniformBufferRange},
        {"max_storage_buffer_range", limits.maxStorageBufferRange},
        {"max_per_stage_descriptor_storage_buffer", limits.maxPerStageDescriptorStorageBuffers},
        {"max_shared_memory_per_block", limits.maxComputeSharedMemorySize},
        {"vulkan_api_version", device.properties.apiVersion},
    };
    for (const auto& [name, number] : numbers) {
      if (property == name) *value = number;
    }
    const std::pair<const char*, std::string> texts[] = {
        {"device_type", device.kind()},
        {"device_name", device.name()},
        {"driver_name", device.driver},
    };
    for (const auto& [name, words] : texts) {
      if (property == name) *value = ffi::String(words);
    }
  }
};

}  // namespace

tvm::runtime::DeviceAPI* device_api() {
  static DeviceApi* api = new DeviceApi();
  return api;
}

int current_device() { return current; }

}  // namespace phi3c::vulkan
