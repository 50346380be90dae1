#include "workspaces.h"

namespace phi3c::vulkan {

Buffer* Workspaces::take(uint64_t bytes) {
  auto found = spare_.lower_bound(bytes);
  // A far larger one would be missing where it is needed.
  if (found == spare_.end() || found->first > 2 * rounded(bytes)) return nullptr;
  Buffer* buffer = found->second;
  spare_.erase(found);
  return buffer;
}

Buffer* Workspaces::take_any() {
  if (spare_.empty()) return nullptr;
  Buffer* buffer = spare_.begin()->second;
  spare_.erase(spare_.begin());
  return buffer;
}

}  // namespace phi3c::vulkan
