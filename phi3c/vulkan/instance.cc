#include "instance.h"

#include <algorithm>
#include <cstring>

#include "failure.h"

namespace phi3c::vulkan {
namespace {

using Extensions = std::vector<VkExtensionProperties>;

void check(VkResult result, const char* call) {
  if (result != VK_SUCCESS) fail(kDeviceError, "vulkan: ", call, ": ", name_of(result));
}

// A list that may grow between the call for its length and the call for its entries.
template <typename T, typename Call>
std::vector<T> list(Call call, const char* name) {
  std::vector<T> entries;
  VkResult result;
  do {
    uint32_t count = 0;
    check(call(&count, nullptr), name);
    entries.resize(count);
    result = call(&count, entries.data());
    entries.resize(count);
  } while (result == VK_INCOMPLETE);
  check(result, name);
  return entries;
}

bool has(const Extensions& extensions, const char* name) {
  return std::any_of(extensions.begin(), extensions.end(),
                     [&](const auto& e) { return !std::strcmp(e.extensionName, name); });
}

// One without graphics if there is one: the desktop does not wait for it, and drivers are patient
// with what it does.
auto compute_family(const std::vector<VkQueueFamilyProperties>& families) {
  auto usable = [](const auto& f) { return f.queueCount && f.queueFlags & VK_QUEUE_COMPUTE_BIT; };
  auto alone = std::find_if(families.begin(), families.end(), [&](const auto& f) {
    return usable(f) && !(f.queueFlags & VK_QUEUE_GRAPHICS_BIT);
  });
  return alone != families.end() ? alone : std::find_if(families.begin(), families.end(), usable);
}

int rank(VkPhysicalDeviceType type) {
  switch (type) {
    case VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU:
      return 0;
    case VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU:
      return 1;
    case VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU:
      return 2;
    case VK_PHYSICAL_DEVICE_TYPE_CPU:
      return 3;
    default:
      return 4;
  }
}

}  // namespace

const char* PhysicalDevice::kind() const {
  static const char* const kinds[] = {"discrete", "integrated", "virtual", "cpu", "other"};
  return kinds[rank(properties.deviceType)];
}

bool PhysicalDevice::shares_memory() const {
  return properties.deviceType == VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU ||
         properties.deviceType == VK_PHYSICAL_DEVICE_TYPE_CPU;
}

uint64_t PhysicalDevice::largest_local_heap() const {
  uint64_t most = 0;
  for (uint32_t i = 0; i < memory.memoryHeapCount; ++i) {
    if (memory.memoryHeaps[i].flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) {
      most = std::max<uint64_t>(most, memory.memoryHeaps[i].size);
    }
  }
  return most;
}

std::vector<uint32_t> PhysicalDevice::heaps() const {
  std::vector<uint32_t> found;
  for (uint32_t i = 0; i < memory.memoryHeapCount; ++i) {
    bool local = memory.memoryHeaps[i].flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT;
    if (shares_memory()) {
      found.push_back(i);
    } else if (local && memory.memoryHeaps[i].size == largest_local_heap() && found.empty()) {
      found.push_back(i);
    }
  }
  return found;
}

uint64_t PhysicalDevice::memory_bytes() const {
  uint64_t sum = 0;
  for (uint32_t heap : heaps()) sum += memory.memoryHeaps[heap].size;
  return sum;
}

Instance::Instance(const std::string& library_path) : loader_(library_path) {
  const GlobalFunctions& global = loader_.global();
  auto extensions = list<VkExtensionProperties>(
      [&](uint32_t* n, VkExtensionProperties* p) {
        return global.EnumerateInstanceExtensionProperties(nullptr, n, p);
      },
      "vkEnumerateInstanceExtensionProperties");
  VkApplicationInfo application{};
  application.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO;
  application.pApplicationName = "phi3c";
  application.apiVersion = version(1, 3);  // the highest of which anything is used
  VkInstanceCreateInfo info{};
  info.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO;
  info.pApplicationInfo = &application;
  const char* portability = "VK_KHR_portability_enumeration";  // else MoltenVK is not listed
  if (has(extensions, portability)) {
    info.flags = VK_INSTANCE_CREATE_ENUMERATE_PORTABILITY_BIT_KHR;
    info.enabledExtensionCount = 1;
    info.ppEnabledExtensionNames = &portability;
  }
  VkInstance instance = nullptr;  // lives as long as the process
  VkResult result = global.CreateInstance(&info, nullptr, &instance);
  if (result == VK_ERROR_INCOMPATIBLE_DRIVER) return;  // the loader found no driver at all
  check(result, "vkCreateInstance");
  try {
    loader_.load(instance, functions_);
    list_devices(instance);
  } catch (...) {
    if (functions_.DestroyInstance) functions_.DestroyInstance(instance, nullptr);
    throw;
  }
}

void Instance::list_devices(VkInstance instance) {
  auto handles = list<VkPhysicalDevice>(
      [&](uint32_t* n, VkPhysicalDevice* p) {
        return functions_.EnumeratePhysicalDevices(instance, n, p);
      },
      "vkEnumeratePhysicalDevices");
  for (VkPhysicalDevice handle : handles) {
    uint32_t count = 0;
    functions_.GetPhysicalDeviceQueueFamilyProperties(handle, &count, nullptr);
    std::vector<VkQueueFamilyProperties> families(count);
    functions_.GetPhysicalDeviceQueueFamilyProperties(handle, &count, families.data());
    auto family = compute_family(families);
    if (family == families.end()) continue;
    PhysicalDevice device;
    device.handle = handle;
    device.queue_family = static_cast<uint32_t>(family - families.begin());
    device.timestamp_bits = family->timestampValidBits;
    describe(device);
    devices_.push_back(device);
  }
  std::stable_sort(devices_.begin(), devices_.end(), [](const auto& a, const auto& b) {
    return rank(a.properties.deviceType) < rank(b.properties.deviceType);
  });
}

void Instance::describe(PhysicalDevice& device) const {
  functions_.GetPhysicalDeviceProperties(device.handle, &device.properties);
  functions_.GetPhysicalDeviceMemoryProperties(device.handle, &device.memory);
  device.driver = "version " + version_text(device.properties.driverVersion);
  uint32_t api = device.properties.apiVersion;
  if (api < version(1, 1)) return;  // is listed, but cannot be opened: nothing more to ask
  auto extensions = list<VkExtensionProperties>(
      [&](uint32_t* n, VkExtensionProperties* p) {
        return functions_.EnumerateDeviceExtensionProperties(device.handle, nullptr, n, p);
      },
      "vkEnumerateDeviceExtensionProperties");
  // Of 1.2; an extension of 1.1, which then is to be enabled.
  auto usable = [&](const char* extension) {
    if (api >= version(1, 2)) return true;
    if (!has(extensions, extension)) return false;
    device.extensions.push_back(extension);
    return true;
  };
  bool driver_known = usable("VK_KHR_driver_properties");
  bool storage8_known = usable("VK_KHR_8bit_storage");
  bool small_types_known = usable("VK_KHR_shader_float16_int8");
  bool push = has(extensions, "VK_KHR_push_descriptor");
  if (push) device.extensions.push_back("VK_KHR_push_descriptor");
  device.memory_budget = has(extensions, "VK_EXT_memory_budget");
  if (device.memory_budget) device.extensions.push_back("VK_EXT_memory_budget");
  if (has(extensions, "VK_KHR_portability_subset")) {
    device.extensions.push_back("VK_KHR_portability_subset");  // must be, where it is there
  }

  VkPhysicalDeviceProperties2 properties{};
  properties.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2;
  auto chain = [](auto& head, auto& part, VkStructureType type) {
    part.sType = type;
    part.pNext = head.pNext;
    head.pNext = &part;
  };
  VkPhysicalDeviceIDProperties id{};
  VkPhysicalDeviceMaintenance3Properties maintenance{};
  VkPhysicalDeviceSubgroupProperties subgroup{};
  VkPhysicalDeviceDriverProperties driver{};
  VkPhysicalDevicePushDescriptorPropertiesKHR push_limits{};
  chain(properties, id, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ID_PROPERTIES);
  chain(properties, maintenance, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_3_PROPERTIES);
  chain(properties, subgroup, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES);
  if (driver_known) chain(properties, driver, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_DRIVER_PROPERTIES);
  if (push) {
    chain(properties, push_limits,
          VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PUSH_DESCRIPTOR_PROPERTIES_KHR);
  }
  functions_.GetPhysicalDeviceProperties2(device.handle, &properties);
  std::memcpy(device.uuid, id.deviceUUID, sizeof device.uuid);
  device.max_allocation = maintenance.maxMemoryAllocationSize;
  device.subgroup_size = std::max(1u, subgroup.subgroupSize);
  if (subgroup.supportedStages & VK_SHADER_STAGE_COMPUTE_BIT) {
    device.subgroup_operations = subgroup.supportedOperations;
  }
  device.max_push_descriptors = push_limits.maxPushDescriptors;
  if (driver_known) device.driver = text(driver.driverName, " ", driver.driverInfo);

  VkPhysicalDeviceFeatures2 features{};
  features.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2;
  VkPhysicalDevice16BitStorageFeatures storage16{};
  VkPhysicalDevice8BitStorageFeatures storage8{};
  VkPhysicalDeviceShaderFloat16Int8Features small_types{};
  chain(features, storage16, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES);
  if (storage8_known) {
    chain(features, storage8, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_8BIT_STORAGE_FEATURES);
  }
  if (small_types_known) {
    chain(features, small_types,
          VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES);
  }
  functions_.GetPhysicalDeviceFeatures2(device.handle, &features);
  device.features.shader_int8 = small_types.shaderInt8;
  device.features.shader_int16 = features.features.shaderInt16;
  device.features.shader_int64 = features.features.shaderInt64;
  device.features.shader_float16 = small_types.shaderFloat16;
  device.features.shader_float64 = features.features.shaderFloat64;
  device.features.storage_buffer_8bit = storage8.storageBuffer8BitAccess;
  device.features.storage_buffer_16bit = storage16.storageBuffer16BitAccess;
}

std::optional<uint64_t> Instance::free_bytes(const PhysicalDevice& device) const {
  if (!device.memory_budget) return std::nullopt;
  VkPhysicalDeviceMemoryBudgetPropertiesEXT budget{};
  budget.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT;
  VkPhysicalDeviceMemoryProperties2 memory{};
  memory.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2;
  memory.pNext = &budget;
  functions_.GetPhysicalDeviceMemoryProperties2(device.handle, &memory);
  uint64_t sum = 0;
  for (uint32_t heap : device.heaps()) {
    sum += budget.heapBudget[heap] - std::min(budget.heapBudget[heap], budget.heapUsage[heap]);
  }
  return sum;
}

}  // namespace phi3c::vulkan
