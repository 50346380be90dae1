// Compute pipelines, and the driver's cache of them, on disk as well.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "shader.h"

namespace phi3c::vulkan {

struct Pipeline {
  std::string name;
  VkDescriptorSetLayout set_layout = nullptr;
  VkPipelineLayout layout = nullptr;
  VkPipeline handle = nullptr;
  uint32_t buffers = 0;         // storage buffers at set 0, bindings 0 …
  uint32_t constant_bytes = 0;  // push constants
  bool pushes_descriptors = false;
  std::vector<bool> writes;      // by buffer: it may be written
  double seconds_of_group = 0;   // of the device, for one workgroup (pace.h)
  uint32_t batches_timed = 0;    // from which that is known
};

class Pipelines {
 public:
  // `folder`: of the cache's file; empty: none is kept.
  Pipelines(Device& device, std::string folder);
  ~Pipelines();  // only where opening the device has failed

  // Fails if the kernel needs what the device has not.
  Pipeline* create(const std::string& name, const Shader& shader, uint32_t buffers,
                   uint32_t constant_bytes);

  // At once: nothing may use it any more.
  void destroy(Pipeline* pipeline);

  // Writes the cache's file if there are new pipelines. Does not fail: it is only a cache.
  void save();

  // The same, but not more often than every few seconds.
  void save_now_and_then();

 private:
  void require(const std::string& name, const Shader& shader, uint32_t buffers,
               uint32_t constant_bytes) const;
  void create_layouts(Pipeline& pipeline);
  std::string path() const;
  std::string read() const;

  Device& device_;
  std::string folder_;
  VkPipelineCache cache_ = nullptr;
  bool changed_ = false;
  std::chrono::steady_clock::time_point saved_;
};

}  // namespace phi3c::vulkan
