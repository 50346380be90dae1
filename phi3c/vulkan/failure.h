// The errors of this library, without TVM: the boundary (boundary.h) turns them into TVM's.
#pragma once

#include <exception>
#include <sstream>
#include <string>
#include <utility>

#include "headers.h"

namespace phi3c::vulkan {

// The names under which Python has registered the classes (library.py).
constexpr const char* kDeviceError = "phi3c.DeviceError";
constexpr const char* kOutOfMemoryError = "phi3c.OutOfMemoryError";
constexpr const char* kArtifactError = "phi3c.ArtifactError";
constexpr const char* kValueError = "ValueError";

class Failure : public std::exception {
 public:
  Failure(const char* kind, std::string message) : kind_(kind), message_(std::move(message)) {}
  const char* kind() const { return kind_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  const char* kind_;
  std::string message_;
};

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

template <typename... Parts>
[[noreturn]] void fail(const char* kind, const Parts&... parts) {
  throw Failure(kind, text(parts...));
}

// VK_ERROR_DEVICE_LOST and the like; the number where it has no name here.
std::string name_of(VkResult result);

// Of the host or the device; drivers that allow so many allocations and no more say it like that.
bool is_out_of_memory(VkResult result);

// "1.3.230"
std::string version_text(uint32_t version);

}  // namespace phi3c::vulkan
