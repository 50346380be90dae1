// What there is once in a process: the instance, the devices that are open, and the lock.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "instance.h"
#include "memory.h"
#include "pipelines.h"
#include "stream.h"
#include "workspaces.h"

namespace phi3c::vulkan {

// A device and all that belongs to it. Lives as long as the process.
struct OpenDevice {
  OpenDevice(const Instance& instance, int index, const std::string& cache_folder);

  // Waits for memory that is about to be free before it fails.
  Buffer* allocate(uint64_t bytes);
  Buffer* allocate_workspace(uint64_t bytes);

  Device device;
  Memory memory;
  Pipelines pipelines;
  Stream stream;
  Workspaces workspaces;

 private:
  Buffer* create(uint64_t bytes);
};

class Context {
 public:
  // Never destroyed: TVM may free tensors after static objects are gone.
  static Context& get();

  using Lock = std::unique_lock<std::timed_mutex>;

  // To be held around everything below. Fails in the child of a fork, and at the process's end.
  Lock enter();

  // The same, for what must not fail: nothing is held where nothing may be done.
  Lock enter_to_release() noexcept;

  // To be called before the first use of Vulkan; fails later.
  void set_library(const std::string& path);
  void set_cache_folder(const std::string& path);

  const Instance& instance();

  // Fails where there is no such device, or it was lost.
  OpenDevice& open(int index);

  // Those that have been opened, by index; nullptr for others.
  const std::vector<std::unique_ptr<OpenDevice>>& opened() const { return opened_; }

  // The buffer that TVM has been given as this pointer; nullptr if it is none.
  Buffer* find(const void* pointer) const;

 private:
  Context();
  void end();

  std::timed_mutex mutex_;
  std::string library_;
  std::string cache_folder_;
  std::unique_ptr<Instance> instance_;
  std::vector<std::unique_ptr<OpenDevice>> opened_;
};

}  // namespace phi3c::vulkan
