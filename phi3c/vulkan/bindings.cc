#include "bindings.h"

#include <cstddef>
#include <map>
#include <set>

namespace phi3c::vulkan {
namespace {

constexpr size_t kFirstInstruction = 5;
constexpr uint32_t kOpTypeStruct = 30, kOpTypePointer = 32, kOpVariable = 59;
constexpr uint32_t kOpDecorate = 71, kOpMemberDecorate = 72;
constexpr uint32_t kNonWritable = 24, kBinding = 33;  // decorations

}  // namespace

std::vector<bool> written_bindings(const std::vector<uint32_t>& words, uint32_t bindings) {
  std::set<uint32_t> read_only;                      // variables
  std::map<uint32_t, std::set<uint32_t>> members;    // of a struct, that are read only
  std::map<uint32_t, uint32_t> members_of;           // a struct → how many it has
  std::map<uint32_t, uint32_t> pointee, type_of;     // of pointer types; of variables
  std::map<uint32_t, uint32_t> binding_of;           // of variables
  for (size_t i = kFirstInstruction; i < words.size(); i += words[i] >> 16) {
    size_t operands = (words[i] >> 16) - 1;
    const uint32_t* operand = &words[i] + 1;
    switch (words[i] & 0xFFFF) {
      case kOpDecorate:
        if (operands == 2 && operand[1] == kNonWritable) read_only.insert(operand[0]);
        if (operands == 3 && operand[1] == kBinding) binding_of[operand[0]] = operand[2];
        break;
      case kOpMemberDecorate:
        if (operands == 3 && operand[2] == kNonWritable) members[operand[0]].insert(operand[1]);
        break;
      case kOpTypeStruct:
        if (operands >= 1) members_of[operand[0]] = static_cast<uint32_t>(operands - 1);
        break;
      case kOpTypePointer:
        if (operands == 3) pointee[operand[0]] = operand[2];
        break;
      case kOpVariable:
        if (operands >= 3) type_of[operand[1]] = operand[0];
        break;
      default:
        break;
    }
  }
  std::vector<bool> written(bindings, false);
  std::vector<bool> known(bindings, false);
  for (auto [variable, binding] : binding_of) {
    if (binding >= bindings) continue;
    uint32_t block = pointee[type_of[variable]];
    bool whole = members_of[block] && members[block].size() == members_of[block];
    known[binding] = true;
    // Several variables may be the same buffer.
    if (!read_only.count(variable) && !whole) written[binding] = true;
  }
  for (uint32_t i = 0; i < bindings; ++i) {
    if (!known[i]) written[i] = true;
  }
  return written;
}

}  // namespace phi3c::vulkan
