// A kernel as a function: it takes its arguments apart and dispatches them.
#pragma once

#include <tvm/ffi/function.h>

#include <string>
#include <vector>

#include "context.h"
#include "module_format.h"

namespace phi3c::vulkan {

class Kernel {
 public:
  // Fails (ArtifactError) on an argument's type that no kernel can have.
  Kernel(std::string name, KernelCode code);
  ~Kernel();
  Kernel(const Kernel&) = delete;

  // The arguments, then the extents of the launch. Asynchronous. Vulkan is not touched before.
  void operator()(tvm::ffi::PackedArgs args);

 private:
  std::vector<uint64_t> constants(tvm::ffi::PackedArgs args) const;
  std::vector<Buffer*> buffers(const Context& context, tvm::ffi::PackedArgs args) const;
  // false: there is nothing to do.
  bool extents(tvm::ffi::PackedArgs args, int64_t found[6]) const;
  void check_extents(const PhysicalDevice& device, const int64_t found[6]) const;

  std::string name_;
  KernelCode code_;
  std::vector<size_t> handles_, values_;  // positions of the arguments
  std::vector<int> axes_;                 // 0 to 2: groups, 3 to 5: threads; -1: is ignored
  std::vector<Pipeline*> pipelines_;      // by device; made when first used
};

}  // namespace phi3c::vulkan
