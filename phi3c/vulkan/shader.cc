#include "shader.h"

#include <cstring>

#include "failure.h"

namespace phi3c::vulkan {
namespace {

constexpr uint32_t kSpirvMagic = 0x07230203;
constexpr size_t kHeaderWords = 5;
constexpr uint32_t kOpEntryPoint = 15, kOpExecutionMode = 16, kOpCapability = 17;
constexpr uint32_t kGLCompute = 5;   // an execution model
constexpr uint32_t kLocalSize = 17;  // an execution mode

// A literal string: bytes from the lowest of each word, up to a zero byte.
std::string literal(const uint32_t* words, size_t count) {
  std::string found;
  for (size_t i = 0; i < count * 4; ++i) {
    char c = static_cast<char>(words[i / 4] >> i % 4 * 8 & 0xFF);
    if (!c) break;
    found += c;
  }
  return found;
}

}  // namespace

Shader inspect(std::vector<uint32_t> words, const std::string& entry) {
  auto bad = [&](const char* what) {
    fail(kArtifactError, "vulkan: kernel ", entry, ": its code is damaged: ", what);
  };
  if (words.size() < kHeaderWords || words[0] != kSpirvMagic) bad("not SPIR-V");
  Shader shader;
  shader.version = words[1];
  bool found = false;
  uint32_t entry_id = 0;
  for (size_t i = kHeaderWords; i < words.size();) {
    size_t length = words[i] >> 16;
    uint32_t op = words[i] & 0xFFFF;
    if (length == 0 || length > words.size() - i) bad("an instruction runs past its end");
    const uint32_t* operands = &words[i] + 1;
    if (op == kOpCapability && length == 2) shader.capabilities.push_back(operands[0]);
    if (op == kOpEntryPoint && length >= 4 && operands[0] == kGLCompute &&
        literal(operands + 2, length - 3) == entry) {
      found = true;
      entry_id = operands[1];
    }
    if (op == kOpExecutionMode && length == 6 && operands[1] == kLocalSize && found &&
        operands[0] == entry_id) {
      std::memcpy(shader.local_size, operands + 2, sizeof shader.local_size);
    }
    i += length;
  }
  if (!found) bad("no compute entry point of that name");
  shader.words = std::move(words);
  return shader;
}

}  // namespace phi3c::vulkan
