// What TVM and Python find by name, once this library is loaded.

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>

#include "boundary.h"
#include "device_api.h"
#include "module.h"

namespace phi3c::vulkan {
namespace {

namespace ffi = tvm::ffi;
using Values = ffi::Map<ffi::String, ffi::Any>;

Values description(const PhysicalDevice& device) {
  const VkPhysicalDeviceLimits& limits = device.properties.limits;
  const Features& f = device.features;
  Values values;
  auto number = [&](const char* name, uint64_t value) {
    values.Set(name, static_cast<int64_t>(std::min<uint64_t>(value, INT64_MAX)));
  };
  auto array = [&](const char* name, const uint32_t* value) {
    values.Set(name, ffi::Array<int64_t>{value[0], value[1], value[2]});
  };
  values.Set("name", ffi::String(device.name()));
  values.Set("driver", ffi::String(device.driver));
  values.Set("api_version", ffi::String(version_text(device.properties.apiVersion)));
  values.Set("kind", ffi::String(device.kind()));
  values.Set("shader_int8", f.shader_int8);
  values.Set("shader_int16", f.shader_int16);
  values.Set("shader_int64", f.shader_int64);
  values.Set("shader_float16", f.shader_float16);
  values.Set("shader_float64", f.shader_float64);
  values.Set("storage_buffer_8bit", f.storage_buffer_8bit);
  values.Set("storage_buffer_16bit", f.storage_buffer_16bit);
  values.Set("push_descriptors", device.max_push_descriptors > 0);
  values.Set("timestamps", device.timestamp_bits > 0);
  number("subgroup_size", device.subgroup_size);
  number("subgroup_operations", device.subgroup_operations);
  number("max_storage_buffer_range", limits.maxStorageBufferRange);
  number("max_allocation", device.max_allocation);
  number("max_storage_buffers", limits.maxPerStageDescriptorStorageBuffers);
  number("max_shared_memory", limits.maxComputeSharedMemorySize);
  number("max_workgroup_invocations", limits.maxComputeWorkGroupInvocations);
  number("max_push_constants", limits.maxPushConstantsSize);
  number("memory_bytes", device.memory_bytes());
  array("max_workgroup_size", limits.maxComputeWorkGroupSize);
  array("max_workgroup_count", limits.maxComputeWorkGroupCount);
  return values;
}

ffi::Array<Values> devices() {
  return locked([](Context& context) {
    ffi::Array<Values> found;
    for (const PhysicalDevice& device : context.instance().devices()) {
      found.push_back(description(device));
    }
    return found;
  });
}

ffi::Map<ffi::String, int64_t> statistics(int64_t device) {
  return locked([&](Context& context) {
    OpenDevice& open = context.open(static_cast<int>(device));
    return ffi::Map<ffi::String, int64_t>{
        {"dispatches", static_cast<int64_t>(open.stream.dispatches)},
        {"submissions", static_cast<int64_t>(open.stream.submissions)},
        {"bytes_in_use", static_cast<int64_t>(open.memory.in_use())},
        {"peak_bytes", static_cast<int64_t>(open.memory.peak())},
        {"allocations", static_cast<int64_t>(open.memory.allocations())},
    };
  });
}

void profile_begin(int64_t device) {
  locked([&](Context& context) {
    Stream& stream = context.open(static_cast<int>(device)).stream;
    stream.profile.require_timestamps();
    stream.synchronize();
    stream.profile.kernels.clear();
    stream.profile.active = true;
  });
}

// Kernel → (number of dispatches, seconds).
ffi::Map<ffi::String, ffi::Array<ffi::Any>> profile_end(int64_t device) {
  return locked([&](Context& context) {
    Stream& stream = context.open(static_cast<int>(device)).stream;
    stream.profile.active = false;
    stream.synchronize();
    ffi::Map<ffi::String, ffi::Array<ffi::Any>> found;
    for (const auto& [name, time] : stream.profile.kernels) {
      found.Set(name, ffi::Array<ffi::Any>{static_cast<int64_t>(time.count), time.seconds});
    }
    return found;
  });
}

void save_pipelines() {
  locked([](Context& context) {
    for (const auto& open : context.opened()) {
      if (open) open->pipelines.save();
    }
  });
}

}  // namespace

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def_packed("device_api.vulkan",
                  [](ffi::PackedArgs, ffi::Any* value) {
                    *value = static_cast<void*>(device_api());
                  })
      .def("ffi.Module.load_from_bytes.vulkan", load_module)
      .def("phi3c.vulkan.set_library",
           [](const ffi::String& path) {
             locked([&](Context& context) { context.set_library(path); });
           })
      .def("phi3c.vulkan.set_cache_folder",
           [](const ffi::String& path) {
             locked([&](Context& context) { context.set_cache_folder(path); });
           })
      .def("phi3c.vulkan.devices", devices)
      .def("phi3c.vulkan.statistics", statistics)
      .def("phi3c.vulkan.profile_begin", profile_begin)
      .def("phi3c.vulkan.profile_end", profile_end)
      .def("phi3c.vulkan.save_pipelines", save_pipelines);
}

}  // namespace phi3c::vulkan
