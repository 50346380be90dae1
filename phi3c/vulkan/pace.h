// How much work goes into a batch: about a tenth of a second. Drivers take a batch of seconds for
// one that hangs, and reset the device. What a kernel takes is learned from the batches before.
#pragma once

#include <cstdint>
#include <vector>

#include "pipelines.h"

namespace phi3c::vulkan {

// Of one batch.
struct PacedBatch {
  struct Use {
    Pipeline* pipeline;
    uint64_t groups;
  };
  VkQueryPool queries = nullptr;  // timestamps of its begin and end
  std::vector<Use> uses;  // of each pipeline, one
  uint64_t copied = 0;     // bytes
  double estimate = 0;     // seconds
};

class Pace {
 public:
  explicit Pace(Device& device) : device_(device) {}

  // To be called before a batch's commands are begun. Fails where there is no memory.
  void prepare(PacedBatch& batch);

  // To be called before the first command of a batch and after the last.
  void begin(PacedBatch& batch, VkCommandBuffer commands);
  void end(PacedBatch& batch, VkCommandBuffer commands);

  void add(PacedBatch& batch, Pipeline& pipeline, uint64_t groups);
  void add_copy(PacedBatch& batch, uint64_t bytes);

  // Whether the batch is to be submitted. A kernel that has never run fills one.
  static bool full(const PacedBatch& batch);

  // Once the batch is done, and before any of its pipelines goes; empties it.
  void learn(PacedBatch& batch);

 private:
  double seconds(const PacedBatch& batch) const;  // 0: not known

  Device& device_;
};

}  // namespace phi3c::vulkan
