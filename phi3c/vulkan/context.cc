#include "context.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>

#include "failure.h"

namespace phi3c::vulkan {
namespace {

std::atomic<bool> ended{false};   // the process is about to end
std::atomic<bool> used{false};    // there is an instance
std::atomic<bool> forked{false};  // this process is the child of one that had opened Vulkan

constexpr const char* kNoDevice =
    "vulkan: found no Vulkan device with a compute queue (Debian: apt install "
    "mesa-vulkan-drivers, or the driver of the graphics card)";

}  // namespace

OpenDevice::OpenDevice(const Instance& instance, int index, const std::string& cache_folder)
    : device(instance, index),
      memory(device),
      pipelines(device, cache_folder),
      stream(device, memory) {}

Buffer* OpenDevice::create(uint64_t bytes) {
  if (Buffer* buffer = memory.create(bytes, Place::device)) return buffer;
  // Freed buffers may wait for the commands that use them; spare workspaces for nothing.
  while (Buffer* spare = workspaces.take_any()) stream.release(spare);
  stream.synchronize();
  memory.release_idle();
  if (Buffer* buffer = memory.create(bytes, Place::device)) return buffer;
  memory.fail_out_of_memory(bytes);
}

Buffer* OpenDevice::allocate(uint64_t bytes) {
  Buffer* buffer = create(bytes);
  memory.owned.insert(buffer);
  return buffer;
}

Buffer* OpenDevice::allocate_workspace(uint64_t bytes) {
  Buffer* buffer = workspaces.take(bytes);
  if (!buffer) buffer = create(std::max(bytes, std::min(Workspaces::rounded(bytes), memory.largest())));
  memory.owned.insert(buffer);
  return buffer;
}

Context& Context::get() {
  static Context* context = new Context();
  return *context;
}

Context::Context() {
  pthread_atfork(nullptr, nullptr, [] { forked = forked || used; });
}

Context::Lock Context::enter() {
  if (forked) {
    fail(kDeviceError, "vulkan: this process is the child of a fork; Vulkan works only in the "
                       "process that first used it (start children with spawn)");
  }
  Lock lock(mutex_, std::defer_lock);
  if (!ended) lock.lock();
  // Again: `end` may have had the lock meanwhile.
  if (ended) fail(kDeviceError, "vulkan: the process is about to end");
  return lock;
}

Context::Lock Context::enter_to_release() noexcept {
  Lock lock(mutex_, std::defer_lock);
  if (forked || ended) return lock;
  lock.lock();
  if (ended) lock.unlock();  // `end` has had it meanwhile
  return lock;
}

void Context::set_library(const std::string& path) {
  if (instance_ && path != library_) {
    fail(kDeviceError, "vulkan: the loader is in use already: its library cannot be changed to ",
         path);
  }
  library_ = path;
}

void Context::set_cache_folder(const std::string& path) { cache_folder_ = path; }

const Instance& Context::instance() {
  if (!instance_) instance_ = std::make_unique<Instance>(library_);
  used = true;
  return *instance_;
}

OpenDevice& Context::open(int index) {
  int count = static_cast<int>(instance().devices().size());
  if (!count) fail(kDeviceError, kNoDevice);
  if (index < 0 || index >= count) {
    fail(kDeviceError, "vulkan: device ", index, ": accepted: 0 to ", count - 1);
  }
  opened_.resize(count);
  if (!opened_[index]) {
    opened_[index] = std::make_unique<OpenDevice>(*instance_, index, cache_folder_);
    // After the driver has registered its own, so that this runs before them.
    std::atexit([] { Context::get().end(); });
  }
  opened_[index]->device.require_alive();
  return *opened_[index];
}

Buffer* Context::find(const void* pointer) const {
  for (const auto& open : opened_) {
    if (open && open->memory.owned.count(pointer)) {
      return static_cast<Buffer*>(const_cast<void*>(pointer));
    }
  }
  return nullptr;
}

void Context::end() {
  if (forked) return;
  // A thread that still waits for the device must not keep the process.
  Lock lock(mutex_, std::chrono::seconds(10));
  ended = true;
  if (!lock) return;
  for (const auto& open : opened_) {
    if (!open || open->device.lost()) continue;
    try {
      open->stream.synchronize();  // else the driver's threads run into its own end
      open->pipelines.save();
    } catch (const std::exception&) {  // nobody is left to tell
    }
  }
}

}  // namespace phi3c::vulkan
