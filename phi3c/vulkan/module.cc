#include "module.h"

#include <map>
#include <memory>
#include <string>

#include "boundary.h"
#include "kernel.h"

namespace phi3c::vulkan {
namespace {

namespace ffi = tvm::ffi;

class VulkanModule final : public ffi::ModuleObj {
 public:
  explicit VulkanModule(const ffi::Bytes& bytes) : bytes_(bytes) {
    for (auto& [name, code] : parse_module(bytes.data(), bytes.size())) {
      kernels_[name] = std::make_shared<Kernel>(name, std::move(code));
    }
  }

  const char* kind() const final { return "vulkan"; }

  int GetPropertyMask() const final {
    return ffi::Module::kBinarySerializable | ffi::Module::kRunnable;
  }

  ffi::Bytes SaveToBytes() const final { return bytes_; }

  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    auto found = kernels_.find(std::string(name));
    if (found == kernels_.end()) return std::nullopt;
    return ffi::Function::FromPacked(
        [kernel = found->second](ffi::PackedArgs args, ffi::Any*) { (*kernel)(args); });
  }

 private:
  ffi::Bytes bytes_;
  std::map<std::string, std::shared_ptr<Kernel>> kernels_;  // a function outlives its module
};

}  // namespace

ffi::Module load_module(const ffi::Bytes& bytes) {
  return translated([&] { return ffi::Module(ffi::make_object<VulkanModule>(bytes)); });
}

}  // namespace phi3c::vulkan
