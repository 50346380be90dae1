#include "module_format.h"

#include <cstring>

#include "failure.h"

namespace phi3c::vulkan {
namespace {

class Reader {
 public:
  Reader(const char* bytes, size_t size) : at_(bytes), left_(size) {}

  template <typename T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }

  std::string string() {
    uint64_t size = number<uint64_t>();
    const char* bytes = take(size);
    return std::string(bytes, size);
  }

  // One that can be shown to users, whose terminals and whose Python want text.
  std::string name() {
    std::string found = string();
    for (unsigned char c : found) {
      if (c <= ' ' || c > '~') {
        fail(kArtifactError, "vulkan: the module's bytes are damaged: a name that is no text");
      }
    }
    return found;
  }

  const char* take(uint64_t size) {
    if (size > left_) fail(kArtifactError, "vulkan: the module's bytes are damaged: truncated");
    const char* taken = at_;
    at_ += size;
    left_ -= size;
    return taken;
  }

  uint64_t left() const { return left_; }

 private:
  const char* at_;
  uint64_t left_;
};

// Counts are not trusted: what they promise is read one by one, until the bytes end.
KernelCode read_launch_information(Reader& reader) {
  KernelCode kernel;
  for (uint64_t n = reader.number<uint64_t>(); n; --n) {
    ArgumentType type{};
    type.code = reader.number<uint8_t>();
    type.bits = reader.number<uint8_t>();
    type.lanes = reader.number<uint16_t>();
    kernel.arguments.push_back(type);
  }
  for (uint64_t n = reader.number<uint64_t>(); n; --n) {
    kernel.launch_parameters.push_back(reader.name());
  }
  for (uint64_t n = reader.number<uint64_t>(); n; --n) reader.number<int32_t>();
  return kernel;
}

std::vector<uint32_t> read_words(const std::string& code, const std::string& name) {
  Reader reader(code.data(), code.size());
  reader.number<uint32_t>();  // flags
  uint64_t count = reader.number<uint64_t>();
  if (count != reader.left() / sizeof(uint32_t) || reader.left() % sizeof(uint32_t)) {
    fail(kArtifactError, "vulkan: kernel ", name, ": its code is damaged: wrong length");
  }
  std::vector<uint32_t> words(count);
  if (count) std::memcpy(words.data(), reader.take(reader.left()), count * sizeof(uint32_t));
  return words;
}

}  // namespace

std::map<std::string, KernelCode> parse_module(const char* bytes, size_t size) {
  Reader reader(bytes, size);
  std::string format = reader.name();
  if (format != "vulkan") {
    fail(kArtifactError, "vulkan: the module's bytes are of another format: found ",
         format.substr(0, 20), "; accepted: vulkan");
  }
  std::map<std::string, KernelCode> kernels;
  for (uint64_t n = reader.number<uint64_t>(); n; --n) {
    std::string name = reader.name();
    reader.string();
    if (!kernels.emplace(name, read_launch_information(reader)).second) {
      fail(kArtifactError, "vulkan: the module's bytes are damaged: two kernels ", name);
    }
  }
  size_t with_code = 0;
  for (uint64_t n = reader.number<uint64_t>(); n; --n) {
    std::string name = reader.name();
    std::string code = reader.string();
    auto found = kernels.find(name);
    if (found == kernels.end() || !found->second.shader.words.empty()) {
      fail(kArtifactError, "vulkan: the module's bytes are damaged: code of no kernel: ", name);
    }
    found->second.shader = inspect(read_words(code, name), name);
    ++with_code;
  }
  if (with_code != kernels.size()) {
    fail(kArtifactError, "vulkan: the module's bytes are damaged: kernels without code");
  }
  if (reader.left()) {
    fail(kArtifactError, "vulkan: the module's bytes are damaged: ", reader.left(),
         " bytes after the end");
  }
  return kernels;
}

}  // namespace phi3c::vulkan
