// A file that is either whole or recognised as not: a header with length and checksum, then data.
#pragma once

#include <string>

namespace phi3c::vulkan {

struct CacheFile {
  std::string data;      // empty: no such file, or damaged
  bool damaged = false;  // truncated, changed, or no such file at all
};

CacheFile read_cache_file(const std::string& path);

// To a temporary name first, so that a reader, or another writer, never meets a part of it. Makes
// the folder. false: could not, which is no error for a cache.
bool write_cache_file(const std::string& path, const std::string& data);

}  // namespace phi3c::vulkan
