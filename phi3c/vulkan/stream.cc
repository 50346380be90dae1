#include "stream.h"

#include <algorithm>
#include <cstring>

namespace phi3c::vulkan {
namespace {

// Enough that a submission costs little beside them, few enough that the device starts early.
constexpr uint32_t kBatch = 256;
constexpr uint32_t kBatchOfIdleDevice = 16;
constexpr size_t kMostInFlight = 8;
constexpr uint64_t kMostReleasedBytes = 256 << 20;  // that wait for a batch not yet submitted
constexpr uint64_t kMostUpdateBytes = 65536;        // of vkCmdUpdateBuffer, by the specification
constexpr uint32_t kSetsOfPool = 256;
constexpr uint32_t kBuffersOfSet = 8;  // on average
static_assert(kBatch <= kMostTimed);

constexpr VkFlags kWork = VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT;
constexpr VkFlags kWrites = VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT;
constexpr VkFlags kReads = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_TRANSFER_READ_BIT;

void barrier(const DeviceFunctions& vk, VkCommandBuffer commands, VkFlags stages, VkFlags access) {
  VkMemoryBarrier memory{};
  memory.sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER;
  memory.srcAccessMask = kWrites;
  memory.dstAccessMask = access;
  vk.CmdPipelineBarrier(commands, kWork, stages, 0, 1, &memory, 0, nullptr, 0, nullptr);
}

}  // namespace

Stream::Stream(Device& device, Memory& memory)
    : profile(device), device_(device), memory_(memory), staging_(memory), pace_(device) {
  VkCommandPoolCreateInfo info{};
  info.sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO;
  info.flags = VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT;
  info.queueFamilyIndex = device.physical.queue_family;
  device.check(device.vk.CreateCommandPool(device.handle, &info, nullptr, &command_pool_),
               "vkCreateCommandPool");
}

void Stream::begin(Submission& submission) {
  const DeviceFunctions& vk = device_.vk;
  if (!submission.commands) {
    VkCommandBufferAllocateInfo info{};
    info.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO;
    info.commandPool = command_pool_;
    info.level = VK_COMMAND_BUFFER_LEVEL_PRIMARY;
    info.commandBufferCount = 1;
    device_.check(vk.AllocateCommandBuffers(device_.handle, &info, &submission.commands),
                  "vkAllocateCommandBuffers");
  }
  if (!submission.fence) {
    VkFenceCreateInfo info{};
    info.sType = VK_STRUCTURE_TYPE_FENCE_CREATE_INFO;
    device_.check(vk.CreateFence(device_.handle, &info, nullptr, &submission.fence),
                  "vkCreateFence");
  }
  pace_.prepare(submission.paced);
  VkCommandBufferBeginInfo info{};
  info.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO;
  info.flags = VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT;
  device_.check(vk.BeginCommandBuffer(submission.commands, &info), "vkBeginCommandBuffer");
  pace_.begin(submission.paced, submission.commands);
}

Stream::Submission& Stream::record() {
  if (recording_ && recording_->ended) submit();  // there was no memory for it before
  if (!recording_) {
    poll();
    if (spare_.empty()) spare_.push_back(std::make_unique<Submission>());
    begin(*spare_.back());
    recording_ = std::move(spare_.back());
    spare_.pop_back();
    recording_->serial = ++serial_;
  }
  return *recording_;
}

void Stream::order(Submission& submission, bool wait) {
  if (!wait) return;
  barrier(device_.vk, submission.commands, kWork, kReads | kWrites);
  barriers_.passed();
}

void Stream::order(Submission& submission, std::initializer_list<Access> accesses) {
  bool wait = false;
  for (const Access& access : accesses) {
    wait = wait || barriers_.needed(*access.buffer, access.writes);
  }
  order(submission, wait);
  for (const Access& access : accesses) {
    barriers_.used(*access.buffer, access.writes);
    access.buffer->last_use = submission.serial;
  }
}

void Stream::order(Submission& submission, const Pipeline& pipeline,
                   const std::vector<Buffer*>& buffers) {
  bool wait = profile.active;  // a kernel's time is its own
  for (size_t i = 0; i < buffers.size(); ++i) {
    wait = wait || barriers_.needed(*buffers[i], pipeline.writes[i]);
  }
  order(submission, wait);
  for (size_t i = 0; i < buffers.size(); ++i) {
    barriers_.used(*buffers[i], pipeline.writes[i]);
    buffers[i]->last_use = submission.serial;
  }
}

void Stream::dispatch(Pipeline& pipeline, const std::vector<Buffer*>& buffers,
                      const void* constants, const uint32_t groups[3]) {
  const DeviceFunctions& vk = device_.vk;
  Submission& submission = record();
  VkCommandBuffer commands = submission.commands;
  std::vector<VkDescriptorBufferInfo> infos(buffers.size());
  std::vector<VkWriteDescriptorSet> writes(buffers.size());
  VkDescriptorSet set = nullptr;
  if (!buffers.empty() && !pipeline.pushes_descriptors) set = descriptor_set(submission, pipeline);
  for (size_t i = 0; i < buffers.size(); ++i) {
    infos[i].buffer = buffers[i]->handle;
    infos[i].range = kWholeSize;
    writes[i].sType = VK_STRUCTURE_TYPE_WRITE_DESCRIPTOR_SET;
    writes[i].dstSet = set;
    writes[i].dstBinding = static_cast<uint32_t>(i);
    writes[i].descriptorCount = 1;
    writes[i].descriptorType = VK_DESCRIPTOR_TYPE_STORAGE_BUFFER;
    writes[i].pBufferInfo = &infos[i];
  }
  order(submission, pipeline, buffers);
  if (profile.active) profile.before(submission.timed, commands, pipeline.name);
  uint32_t count = static_cast<uint32_t>(writes.size());
  constexpr auto kCompute = VK_PIPELINE_BIND_POINT_COMPUTE;
  vk.CmdBindPipeline(commands, kCompute, pipeline.handle);
  if (set) {
    vk.UpdateDescriptorSets(device_.handle, count, writes.data(), 0, nullptr);
    vk.CmdBindDescriptorSets(commands, kCompute, pipeline.layout, 0, 1, &set, 0, nullptr);
  } else if (count) {
    vk.CmdPushDescriptorSetKHR(commands, kCompute, pipeline.layout, 0, count, writes.data());
  }
  if (pipeline.constant_bytes) {
    vk.CmdPushConstants(commands, pipeline.layout, VK_SHADER_STAGE_COMPUTE_BIT, 0,
                        pipeline.constant_bytes, constants);
  }
  vk.CmdDispatch(commands, groups[0], groups[1], groups[2]);
  if (profile.active) profile.after(submission.timed, commands);
  ++dispatches;
  ++submission.dispatches;
  pace_.add(submission.paced, pipeline, uint64_t{groups[0]} * groups[1] * groups[2]);
  if (submission.dispatches >= kBatch || Pace::full(submission.paced) ||
      (in_flight_.empty() && submission.dispatches >= kBatchOfIdleDevice)) {
    submit_or_later();
  }
}

VkDescriptorPool Stream::new_pool(uint32_t buffers) {
  VkDescriptorPoolSize size{VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
                            std::max(kSetsOfPool * kBuffersOfSet, buffers)};
  VkDescriptorPoolCreateInfo info{};
  info.sType = VK_STRUCTURE_TYPE_DESCRIPTOR_POOL_CREATE_INFO;
  info.maxSets = kSetsOfPool;
  info.poolSizeCount = 1;
  info.pPoolSizes = &size;
  VkDescriptorPool pool = nullptr;
  device_.check(device_.vk.CreateDescriptorPool(device_.handle, &info, nullptr, &pool),
                "vkCreateDescriptorPool");
  return pool;
}

VkDescriptorSet Stream::descriptor_set(Submission& submission, const Pipeline& pipeline) {
  VkDescriptorSet set = nullptr;
  VkDescriptorSetAllocateInfo info{};
  info.sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_ALLOCATE_INFO;
  info.descriptorSetCount = 1;
  info.pSetLayouts = &pipeline.set_layout;
  if (!submission.pools.empty()) {
    info.descriptorPool = submission.pools.back();
    VkResult result = device_.vk.AllocateDescriptorSets(device_.handle, &info, &set);
    if (result == VK_SUCCESS) return set;
    if (result != VK_ERROR_OUT_OF_POOL_MEMORY && result != VK_ERROR_FRAGMENTED_POOL) {
      device_.check(result, "vkAllocateDescriptorSets");
    }
  }
  // A spare one may be too small for very many buffers; a pool of its own is not.
  bool common = pipeline.buffers <= kSetsOfPool * kBuffersOfSet;
  if (common && !spare_pools_.empty()) {
    submission.pools.push_back(spare_pools_.back());
    spare_pools_.pop_back();
  } else {
    submission.pools.push_back(new_pool(pipeline.buffers));
  }
  info.descriptorPool = submission.pools.back();
  device_.check(device_.vk.AllocateDescriptorSets(device_.handle, &info, &set),
                "vkAllocateDescriptorSets");
  return set;
}

Chunk& Stream::chunk_for(uint64_t bytes) {
  if (recording_ && !recording_->ended && !recording_->chunks.empty()) {
    Chunk& last = *recording_->chunks.back();
    if (last.left() >= bytes) return last;
  }
  Chunk* chunk = staging_.take();
  while (!chunk) {  // all are in use: by this batch or by those before it
    submit();
    if (in_flight_.empty()) memory_.fail_out_of_memory(bytes);
    wait(in_flight_.front()->serial);
    chunk = staging_.take();
  }
  try {
    record().chunks.push_back(chunk);
  } catch (...) {
    staging_.give_back(chunk);
    throw;
  }
  return *chunk;
}

void Stream::upload(Buffer& to, uint64_t offset, const void* from, uint64_t bytes) {
  if (to.mapped && idle(to)) {
    std::memcpy(to.mapped + offset, from, bytes);
    return;
  }
  const DeviceFunctions& vk = device_.vk;
  if (offset % 4 == 0 && bytes % 4 == 0 && bytes <= kMostUpdateBytes) {
    Submission& submission = record();
    order(submission, {{&to, true}});
    vk.CmdUpdateBuffer(submission.commands, to.handle, offset, bytes, from);
    return;
  }
  const auto* source = static_cast<const uint8_t*>(from);
  while (bytes) {
    Chunk& chunk = chunk_for(std::min(bytes, kMostUpdateBytes));
    Submission& submission = record();
    uint64_t part = std::min(bytes, chunk.left());
    std::memcpy(chunk.buffer->mapped + chunk.used, source, part);
    copy(submission, *chunk.buffer, to, {chunk.used, offset, part});
    chunk.used = std::min(chunk.buffer->size, (chunk.used + part + 15) / 16 * 16);
    source += part;
    offset += part;
    bytes -= part;
  }
}

void Stream::download(Buffer& from, uint64_t offset, void* to, uint64_t bytes) {
  if (from.mapped && from.cached) {
    if (!idle(from)) {
      submit();
      wait(from.last_use);
    }
    std::memcpy(to, from.mapped + offset, bytes);
    return;
  }
  auto* target = static_cast<uint8_t*>(to);
  while (bytes) {
    Chunk& chunk = chunk_for(std::min(bytes, kMostUpdateBytes));
    Submission& submission = record();
    uint64_t begin = chunk.used;
    uint64_t part = std::min(bytes, chunk.left());
    copy(submission, from, *chunk.buffer, {offset, begin, part});
    chunk.used += part;
    const uint8_t* mapped = chunk.buffer->mapped + begin;
    uint64_t serial = submission.serial;
    submit();
    wait(serial);  // the chunk is spare then, but nobody else can take it before the next line
    std::memcpy(target, mapped, part);
    target += part;
    offset += part;
    bytes -= part;
  }
}

void Stream::copy(Buffer& from, uint64_t from_offset, Buffer& to, uint64_t to_offset,
                  uint64_t bytes) {
  copy(record(), from, to, {from_offset, to_offset, bytes});
  if (Pace::full(recording_->paced)) submit_or_later();
}

void Stream::copy(Submission& submission, Buffer& from, Buffer& to, const VkBufferCopy& region) {
  order(submission, {{&from, false}, {&to, true}});
  device_.vk.CmdCopyBuffer(submission.commands, from.handle, to.handle, 1, &region);
  pace_.add_copy(submission.paced, region.size);
}

void Stream::submit() {
  if (!recording_) return;
  const DeviceFunctions& vk = device_.vk;
  Submission& submission = *recording_;
  if (!submission.ended) {
    pace_.end(submission.paced, submission.commands);
    // The fence alone does not make what the kernels wrote visible to the host.
    barrier(vk, submission.commands, VK_PIPELINE_STAGE_HOST_BIT, VK_ACCESS_HOST_READ_BIT);
    device_.check_fatal(vk.EndCommandBuffer(submission.commands), "vkEndCommandBuffer");
    submission.ended = true;
  }
  VkSubmitInfo info{};
  info.sType = VK_STRUCTURE_TYPE_SUBMIT_INFO;
  info.commandBufferCount = 1;
  info.pCommandBuffers = &submission.commands;
  VkResult result = vk.QueueSubmit(device_.queue, 1, &info, submission.fence);
  if (is_out_of_memory(result)) {  // what is done gives some back
    wait(serial_);
    memory_.release_idle();
    result = vk.QueueSubmit(device_.queue, 1, &info, submission.fence);
  }
  device_.check_fatal_unless_memory(result, "vkQueueSubmit");
  in_flight_.push_back(std::move(recording_));
  ++submissions;
  if (in_flight_.size() > kMostInFlight) wait(in_flight_.front()->serial);
}

void Stream::submit_or_later() {
  try {
    submit();
  } catch (const Failure&) {
    if (device_.lost()) throw;
  }
}

void Stream::wait(uint64_t serial) {
  const DeviceFunctions& vk = device_.vk;
  while (!in_flight_.empty()) {
    Submission& oldest = *in_flight_.front();
    if (oldest.serial <= serial) {
      device_.check_fatal_unless_memory(
          vk.WaitForFences(device_.handle, 1, &oldest.fence, true, UINT64_MAX), "vkWaitForFences");
    } else {
      VkResult result = vk.GetFenceStatus(device_.handle, oldest.fence);
      if (result == VK_NOT_READY) return;
      device_.check_fatal_unless_memory(result, "vkGetFenceStatus");
    }
    auto done = std::move(in_flight_.front());
    in_flight_.pop_front();
    completed_ = done->serial;
    finish(std::move(done));
  }
}

void Stream::finish(std::unique_ptr<Submission> submission) {
  const DeviceFunctions& vk = device_.vk;
  pace_.learn(submission->paced);
  for (Chunk* chunk : submission->chunks) staging_.give_back(chunk);
  for (Buffer* buffer : submission->buffers) memory_.destroy(buffer);
  for (auto& [pipeline, owner] : submission->pipelines) owner->destroy(pipeline);
  for (VkDescriptorPool pool : submission->pools) {
    device_.check(vk.ResetDescriptorPool(device_.handle, pool, 0), "vkResetDescriptorPool");
    spare_pools_.push_back(pool);
  }
  submission->chunks.clear();
  submission->buffers.clear();
  submission->buffer_bytes = 0;
  submission->pipelines.clear();
  submission->pools.clear();
  submission->dispatches = 0;
  submission->ended = false;
  profile.collect(submission->timed);
  device_.check(vk.ResetFences(device_.handle, 1, &submission->fence), "vkResetFences");
  spare_.push_back(std::move(submission));
}

void Stream::synchronize() {
  submit();
  wait(serial_);
}

bool Stream::idle(const Buffer& buffer) {
  if (buffer.last_use > completed_) poll();
  return buffer.last_use <= completed_;
}

Stream::Submission* Stream::latest() {
  if (recording_) return recording_.get();
  return in_flight_.empty() ? nullptr : in_flight_.back().get();
}

void Stream::release(Buffer* buffer) {
  Submission* last = latest();
  if (!last || buffer->last_use <= completed_) {
    memory_.destroy(buffer);
    return;
  }
  last->buffers.push_back(buffer);
  last->buffer_bytes += buffer->size;
  if (last == recording_.get() && last->buffer_bytes > kMostReleasedBytes && !device_.lost()) {
    try {
      submit();
    } catch (const Failure&) {  // the next call that may fail says it
    }
  }
}

void Stream::release(Pipeline* pipeline, Pipelines& owner) {
  if (Submission* last = latest()) {
    last->pipelines.push_back({pipeline, &owner});
  } else {
    owner.destroy(pipeline);
  }
}

}  // namespace phi3c::vulkan
