#include "pipelines.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "bindings.h"
#include "cache_file.h"

namespace phi3c::vulkan {
namespace {

// A capability that a kernel may declare, and what it is called where the device has it not.
struct Need {
  bool met;
  const char* feature;
};

Need need(uint32_t capability, const PhysicalDevice& device) {
  const Features& f = device.features;
  auto subgroup = [&](VkFlags bit, const char* name) {
    return Need{(device.subgroup_operations & bit) != 0, name};
  };
  switch (capability) {  // numbers: the SPIR-V specification, 3.31
    case 0:  // Matrix
    case 1:  // Shader
      return {true, ""};
    case 9:
      return {f.shader_float16, "shaderFloat16"};
    case 10:
      return {f.shader_float64, "shaderFloat64"};
    case 11:
      return {f.shader_int64, "shaderInt64"};
    case 22:
      return {f.shader_int16, "shaderInt16"};
    case 39:
      return {f.shader_int8, "shaderInt8"};
    case 4433:
      return {f.storage_buffer_16bit, "storageBuffer16BitAccess"};
    case 4448:
      return {f.storage_buffer_8bit, "storageBuffer8BitAccess"};
    case 61:
      return subgroup(VK_SUBGROUP_FEATURE_BASIC_BIT, "basic subgroup operations");
    case 62:
      return subgroup(VK_SUBGROUP_FEATURE_VOTE_BIT, "subgroup votes");
    case 63:
      return subgroup(VK_SUBGROUP_FEATURE_ARITHMETIC_BIT, "subgroup arithmetic");
    case 64:
      return subgroup(VK_SUBGROUP_FEATURE_BALLOT_BIT, "subgroup ballots");
    case 65:
      return subgroup(VK_SUBGROUP_FEATURE_SHUFFLE_BIT, "subgroup shuffles");
    case 66:
      return subgroup(VK_SUBGROUP_FEATURE_SHUFFLE_RELATIVE_BIT, "relative subgroup shuffles");
    case 67:
      return subgroup(VK_SUBGROUP_FEATURE_CLUSTERED_BIT, "clustered subgroup operations");
    case 68:
      return subgroup(VK_SUBGROUP_FEATURE_QUAD_BIT, "quad operations");
    default:
      return {false, nullptr};
  }
}

uint32_t newest_spirv(uint32_t api) {
  return api >= version(1, 3) ? 0x00010600 : api >= version(1, 2) ? 0x00010500 : 0x00010300;
}

}  // namespace

Pipelines::Pipelines(Device& device, std::string folder)
    : device_(device), folder_(std::move(folder)), saved_(std::chrono::steady_clock::now()) {
  std::string data = read();
  VkPipelineCacheCreateInfo info{};
  info.sType = VK_STRUCTURE_TYPE_PIPELINE_CACHE_CREATE_INFO;
  info.initialDataSize = data.size();
  info.pInitialData = data.data();
  device_.check(device_.vk.CreatePipelineCache(device_.handle, &info, nullptr, &cache_),
                "vkCreatePipelineCache");
}

Pipelines::~Pipelines() { device_.vk.DestroyPipelineCache(device_.handle, cache_, nullptr); }

void Pipelines::require(const std::string& name, const Shader& shader, uint32_t buffers,
                        uint32_t constant_bytes) const {
  const PhysicalDevice& device = device_.physical;
  const VkPhysicalDeviceLimits& limits = device.properties.limits;
  auto at_most = [&](const char* what, uint64_t found, uint64_t limit, const char* limit_name) {
    if (found <= limit) return;
    fail(kDeviceError, "vulkan: kernel ", name, ": ", found, " ", what, "; ", device.name(),
         " accepts at most ", limit, " (", limit_name, ")");
  };
  at_most("bytes of push constants", constant_bytes, limits.maxPushConstantsSize,
          "maxPushConstantsSize");
  at_most("buffers", buffers,
          std::min(limits.maxPerStageDescriptorStorageBuffers,
                   limits.maxDescriptorSetStorageBuffers),
          "maxPerStageDescriptorStorageBuffers");
  uint64_t threads = 1;
  for (int axis = 0; axis < 3; ++axis) {
    at_most("threads along an axis of a workgroup", shader.local_size[axis],
            limits.maxComputeWorkGroupSize[axis], "maxComputeWorkGroupSize");
    threads *= std::max(1u, shader.local_size[axis]);
  }
  at_most("threads in a workgroup", threads, limits.maxComputeWorkGroupInvocations,
          "maxComputeWorkGroupInvocations");
  for (uint32_t capability : shader.capabilities) {
    Need found = need(capability, device);
    if (found.met) continue;
    fail(kDeviceError, "vulkan: kernel ", name, ": needs ",
         found.feature ? found.feature : text("SPIR-V capability ", capability), ", which ",
         device.described(), found.feature ? " has not" : " is not asked for by this runtime");
  }
  uint32_t newest = newest_spirv(device.properties.apiVersion);
  if (shader.version > newest) {
    fail(kDeviceError, "vulkan: kernel ", name, ": is SPIR-V ", shader.version >> 16, ".",
         shader.version >> 8 & 0xFF, "; ", device.described(), " reads up to ", newest >> 16, ".",
         newest >> 8 & 0xFF);
  }
}

Pipeline* Pipelines::create(const std::string& name, const Shader& shader, uint32_t buffers,
                            uint32_t constant_bytes) {
  require(name, shader, buffers, constant_bytes);
  const DeviceFunctions& vk = device_.vk;
  auto pipeline = std::make_unique<Pipeline>();
  struct Undo {  // until all is well
    Pipelines& pipelines;
    Pipeline* pipeline;
    VkShaderModule module = nullptr;  // not needed any more in any case
    ~Undo() {
      const Device& device = pipelines.device_;
      device.vk.DestroyShaderModule(device.handle, module, nullptr);
      if (pipeline) {
        device.vk.DestroyPipelineLayout(device.handle, pipeline->layout, nullptr);
        device.vk.DestroyDescriptorSetLayout(device.handle, pipeline->set_layout, nullptr);
      }
    }
  } undo{*this, pipeline.get()};
  pipeline->name = name;
  pipeline->buffers = buffers;
  pipeline->constant_bytes = constant_bytes;
  pipeline->writes = written_bindings(shader.words, buffers);
  pipeline->pushes_descriptors = buffers <= device_.physical.max_push_descriptors;
  create_layouts(*pipeline);

  VkShaderModuleCreateInfo module{};
  module.sType = VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO;
  module.codeSize = shader.words.size() * sizeof(uint32_t);
  module.pCode = shader.words.data();
  device_.check(vk.CreateShaderModule(device_.handle, &module, nullptr, &undo.module),
                "vkCreateShaderModule");
  VkComputePipelineCreateInfo info{};
  info.sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO;
  info.stage.sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO;
  info.stage.stage = VK_SHADER_STAGE_COMPUTE_BIT;
  info.stage.module = undo.module;
  info.stage.pName = name.c_str();
  info.layout = pipeline->layout;
  device_.check(
      vk.CreateComputePipelines(device_.handle, cache_, 1, &info, nullptr, &pipeline->handle),
      text("kernel ", name, ": vkCreateComputePipelines").c_str());
  changed_ = true;
  undo.pipeline = nullptr;
  return pipeline.release();
}

void Pipelines::create_layouts(Pipeline& pipeline) {
  std::vector<VkDescriptorSetLayoutBinding> bindings(pipeline.buffers);
  for (uint32_t i = 0; i < pipeline.buffers; ++i) {
    bindings[i].binding = i;
    bindings[i].descriptorType = VK_DESCRIPTOR_TYPE_STORAGE_BUFFER;
    bindings[i].descriptorCount = 1;
    bindings[i].stageFlags = VK_SHADER_STAGE_COMPUTE_BIT;
  }
  VkDescriptorSetLayoutCreateInfo set{};
  set.sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO;
  if (pipeline.pushes_descriptors && pipeline.buffers) {
    set.flags = VK_DESCRIPTOR_SET_LAYOUT_CREATE_PUSH_DESCRIPTOR_BIT_KHR;
  }
  set.bindingCount = pipeline.buffers;
  set.pBindings = bindings.data();
  device_.check(
      device_.vk.CreateDescriptorSetLayout(device_.handle, &set, nullptr, &pipeline.set_layout),
      "vkCreateDescriptorSetLayout");
  VkPushConstantRange range{VK_SHADER_STAGE_COMPUTE_BIT, 0, pipeline.constant_bytes};
  VkPipelineLayoutCreateInfo layout{};
  layout.sType = VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO;
  layout.setLayoutCount = 1;
  layout.pSetLayouts = &pipeline.set_layout;
  layout.pushConstantRangeCount = pipeline.constant_bytes ? 1 : 0;
  layout.pPushConstantRanges = &range;
  device_.check(
      device_.vk.CreatePipelineLayout(device_.handle, &layout, nullptr, &pipeline.layout),
      "vkCreatePipelineLayout");
}

void Pipelines::destroy(Pipeline* pipeline) {
  if (!device_.lost()) {
    device_.vk.DestroyPipeline(device_.handle, pipeline->handle, nullptr);
    device_.vk.DestroyPipelineLayout(device_.handle, pipeline->layout, nullptr);
    device_.vk.DestroyDescriptorSetLayout(device_.handle, pipeline->set_layout, nullptr);
  }
  delete pipeline;
}

std::string Pipelines::path() const {
  std::string name;
  for (uint8_t byte : device_.physical.uuid) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", byte);
    name += digits;
  }
  return text(folder_, "/", name, "-", device_.physical.properties.driverVersion, ".pipelines");
}

std::string Pipelines::read() const {
  if (folder_.empty()) return "";
  CacheFile file = read_cache_file(path());
  // Vulkan's own header: drivers should check it, and not all do.
  const VkPhysicalDeviceProperties& properties = device_.physical.properties;
  if (!file.damaged && !file.data.empty()) {
    uint32_t head[4];
    if (file.data.size() < 32) {
      file.damaged = true;
    } else {
      std::memcpy(head, file.data.data(), sizeof head);
      if (head[0] < 32 || head[1] != VK_PIPELINE_CACHE_HEADER_VERSION_ONE ||
          head[2] != properties.vendorID || head[3] != properties.deviceID ||
          std::memcmp(file.data.data() + 16, properties.pipelineCacheUUID, 16)) {
        return "";  // of another driver: no harm done, and nothing to say
      }
    }
  }
  if (file.damaged) {
    std::fprintf(stderr, "phi3c: vulkan: %s: the pipeline cache is damaged; it is made anew\n",
                 path().c_str());
    return "";
  }
  return file.data;
}

void Pipelines::save_now_and_then() {
  if (changed_ && std::chrono::steady_clock::now() - saved_ > std::chrono::seconds(5)) save();
}

void Pipelines::save() {
  if (folder_.empty() || !changed_ || device_.lost()) return;
  changed_ = false;
  saved_ = std::chrono::steady_clock::now();
  size_t size = 0;
  if (device_.vk.GetPipelineCacheData(device_.handle, cache_, &size, nullptr) != VK_SUCCESS) return;
  std::string data(size, '\0');
  if (device_.vk.GetPipelineCacheData(device_.handle, cache_, &size, data.data()) != VK_SUCCESS) {
    return;
  }
  data.resize(size);
  write_cache_file(path(), data);
}

}  // namespace phi3c::vulkan
