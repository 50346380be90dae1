#include "pace.h"

#include <algorithm>

#include "timestamps.h"

namespace phi3c::vulkan {
namespace {

constexpr double kBatchSeconds = 0.1;
constexpr double kSecondsOfByte = 1e-9;      // copied; devices are faster
constexpr uint64_t kMostCopied = 1 << 20;    // in a batch whose time still says much of its kernels
constexpr double kUntimed = kBatchSeconds / 16;  // of a dispatch, where the queue has no timestamps
// In a pipeline's first batches the driver may still translate it.
constexpr uint32_t kUnsettled = 3;
constexpr double kFallOfSettled = 0.5;

double estimate(const PacedBatch::Use& use) {
  return static_cast<double>(use.groups) * use.pipeline->seconds_of_group;
}

}  // namespace

void Pace::prepare(PacedBatch& batch) {
  if (device_.physical.timestamp_bits && !batch.queries) {
    batch.queries = create_timestamps(device_, 2);
  }
}

void Pace::begin(PacedBatch& batch, VkCommandBuffer commands) {
  if (!batch.queries) return;
  device_.vk.CmdResetQueryPool(commands, batch.queries, 0, 2);
  write_timestamp(device_, commands, batch.queries, 0);
}

void Pace::end(PacedBatch& batch, VkCommandBuffer commands) {
  if (batch.queries) write_timestamp(device_, commands, batch.queries, 1);
}

void Pace::add(PacedBatch& batch, Pipeline& pipeline, uint64_t groups) {
  PacedBatch::Use use{&pipeline, groups};
  if (!batch.queries) {
    batch.estimate += kUntimed;
    return;
  }
  batch.estimate += pipeline.batches_timed ? estimate(use) : kBatchSeconds;
  auto same = std::find_if(batch.uses.begin(), batch.uses.end(),
                           [&](const auto& other) { return other.pipeline == &pipeline; });
  if (same == batch.uses.end()) {
    batch.uses.push_back(use);
  } else {
    same->groups += groups;
  }
}

void Pace::add_copy(PacedBatch& batch, uint64_t bytes) {
  batch.copied += bytes;
  batch.estimate += kSecondsOfByte * static_cast<double>(bytes);
}

bool Pace::full(const PacedBatch& batch) { return batch.estimate >= kBatchSeconds; }

double Pace::seconds(const PacedBatch& batch) const {
  if (batch.uses.empty() || batch.copied > kMostCopied) return 0;
  uint64_t ticks[2];
  if (!read_timestamps(device_, batch.queries, 2, ticks)) return 0;
  return std::max(1e-7, seconds_between(device_.physical, ticks[0], ticks[1]));
}

void Pace::learn(PacedBatch& batch) {
  if (double spent = seconds(batch)) {
    double expected = 0;
    PacedBatch::Use* unknown = nullptr;  // at most one: it has filled the batch
    for (auto& use : batch.uses) {
      if (use.pipeline->batches_timed) {
        expected += estimate(use);
      } else {
        unknown = &use;
      }
    }
    if (unknown) {
      double rest = std::max(spent - expected, spent / static_cast<double>(batch.uses.size()));
      unknown->pipeline->seconds_of_group = rest / static_cast<double>(unknown->groups);
      unknown->pipeline->batches_timed = 1;
    } else {
      double ratio = spent / expected;
      for (auto& use : batch.uses) {
        // At once where it takes longer: attention over a longer context.
        bool settled = use.pipeline->batches_timed >= kUnsettled;
        use.pipeline->seconds_of_group *= settled ? std::max(ratio, kFallOfSettled) : ratio;
        ++use.pipeline->batches_timed;
      }
    }
  }
  batch.uses.clear();
  batch.copied = 0;
  batch.estimate = 0;
}

}  // namespace phi3c::vulkan
