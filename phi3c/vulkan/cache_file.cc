#include "cache_file.h"

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace phi3c::vulkan {
namespace {

struct Header {
  char magic[8];
  uint64_t length;
  uint64_t checksum;
};
constexpr char kFileMagic[8] = {'P', 'H', 'I', '3', 'C', 'V', 'K', '1'};

uint64_t checksum(const std::string& data) {  // FNV-1a
  uint64_t hash = 0xCBF29CE484222325;
  for (unsigned char byte : data) hash = (hash ^ byte) * 0x100000001B3;
  return hash;
}

}  // namespace

CacheFile read_cache_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) return {};
  std::stringstream all;
  all << stream.rdbuf();
  std::string content = all.str();
  Header header;
  if (content.size() < sizeof header) return {"", true};
  std::memcpy(&header, content.data(), sizeof header);
  std::string data = content.substr(sizeof header);
  if (std::memcmp(header.magic, kFileMagic, sizeof kFileMagic) || header.length != data.size() ||
      header.checksum != checksum(data)) {
    return {"", true};
  }
  return {data, false};
}

bool write_cache_file(const std::string& path, const std::string& data) {
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), error);
  std::string temporary = path + "." + std::to_string(getpid()) + ".tmp";
  {
    std::ofstream stream(temporary, std::ios::binary | std::ios::trunc);
    Header header;
    std::memcpy(header.magic, kFileMagic, sizeof kFileMagic);
    header.length = data.size();
    header.checksum = checksum(data);
    stream.write(reinterpret_cast<const char*>(&header), sizeof header);
    stream.write(data.data(), static_cast<std::streamsize>(data.size()));
    stream.close();
    if (stream) std::filesystem::rename(temporary, path, error);
    if (stream && !error) return true;
  }
  std::filesystem::remove(temporary, error);
  return false;
}

}  // namespace phi3c::vulkan
