// The one stream of a device: commands are recorded, submitted in batches, and run in order.
#pragma once

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "barriers.h"
#include "memory.h"
#include "pace.h"
#include "pipelines.h"
#include "profile.h"
#include "staging.h"

namespace phi3c::vulkan {

class Stream {
 public:
  Stream(Device& device, Memory& memory);

  // `constants`: the pipeline's push constants. `groups`: workgroups along x, y, z; none is 0.
  void dispatch(Pipeline& pipeline, const std::vector<Buffer*>& buffers,
                const void* constants, const uint32_t groups[3]);

  // From and to the host's memory; `offset` and `bytes` may be odd. The host's bytes have been
  // taken when `upload` returns, and are there when `download` returns.
  void upload(Buffer& to, uint64_t offset, const void* from, uint64_t bytes);
  void download(Buffer& from, uint64_t offset, void* to, uint64_t bytes);
  void copy(Buffer& from, uint64_t from_offset, Buffer& to, uint64_t to_offset, uint64_t bytes);

  // Sends what is recorded to the device. Where it has no memory for that, what is recorded stays.
  void submit();

  // Submits, and waits until all is done.
  void synchronize();

  // Destroys what has no later use, once what has been recorded or submitted so far is done.
  // These do not fail.
  void release(Buffer* buffer);
  void release(Pipeline* pipeline, Pipelines& owner);

  Profile profile;
  uint64_t dispatches = 0;
  uint64_t submissions = 0;

 private:
  // Where there is no memory to submit, says so when the next command comes: this one is recorded.
  void submit_or_later();

  // One batch. Its objects are used again after it is done.
  struct Submission {
    uint64_t serial = 0;
    VkCommandBuffer commands = nullptr;
    VkFence fence = nullptr;
    bool ended = false;  // nothing can be recorded any more
    uint32_t dispatches = 0;
    PacedBatch paced;
    std::vector<VkDescriptorPool> pools;
    std::vector<Chunk*> chunks;
    TimedDispatches timed;
    std::vector<Buffer*> buffers;  // to destroy
    uint64_t buffer_bytes = 0;     // of those
    std::vector<std::pair<Pipeline*, Pipelines*>> pipelines;
  };

  struct Access {
    Buffer* buffer;
    bool writes;
  };

  // The batch being recorded.
  Submission& record();
  void begin(Submission& submission);
  // To be called before each command, with its buffers: puts a barrier where it needs one.
  void order(Submission& submission, std::initializer_list<Access> accesses);
  void order(Submission& submission, const Pipeline& pipeline, const std::vector<Buffer*>& buffers);
  void order(Submission& submission, bool wait);
  void copy(Submission& submission, Buffer& from, Buffer& to, const VkBufferCopy& region);
  VkDescriptorSet descriptor_set(Submission& submission, const Pipeline& pipeline);
  VkDescriptorPool new_pool(uint32_t buffers);
  // Some of a staging chunk, that this batch will use: at most `bytes`, at least 1.
  Chunk& chunk_for(uint64_t bytes);

  // Ends what is done; waits for the batch of that serial first.
  void poll() { wait(0); }
  void wait(uint64_t serial);
  void finish(std::unique_ptr<Submission> submission);
  bool idle(const Buffer& buffer);
  Submission* latest();

  Device& device_;
  Memory& memory_;
  Staging staging_;
  Pace pace_;
  Barriers barriers_;
  VkCommandPool command_pool_ = nullptr;
  uint64_t serial_ = 0;     // of the batch that was begun last
  uint64_t completed_ = 0;  // all up to it are done
  std::unique_ptr<Submission> recording_;
  std::deque<std::unique_ptr<Submission>> in_flight_;
  std::vector<std::unique_ptr<Submission>> spare_;
  std::vector<VkDescriptorPool> spare_pools_;
};

}  // namespace phi3c::vulkan
