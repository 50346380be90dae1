// Device memory in few large blocks, of which buffers take pieces: drivers allow some thousand
// allocations, and each takes them long. Only buffers lie there, so any neighbours will do.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <vector>

#include "device.h"

namespace phi3c::vulkan {

struct Block {
  VkDeviceMemory memory = nullptr;
  uint32_t type = 0;
  uint64_t size = 0;
  uint8_t* mapped = nullptr;           // where the host sees it; nullptr: it does not
  bool whole = false;                  // made for one piece, and goes with it
  std::map<uint64_t, uint64_t> free;   // offset → bytes; no two are neighbours
};

struct Piece {
  Block* block = nullptr;
  uint64_t offset = 0;
  uint64_t size = 0;
};

class Blocks {
 public:
  explicit Blocks(Device& device) : device_(device) {}

  // Of the first of the memory types that has room, or gets a new block; nullopt: none.
  std::optional<Piece> take(const std::vector<uint32_t>& types, uint64_t bytes, uint64_t alignment,
                            bool must_be_mapped);

  // At once: nothing may use it any more. Does not fail.
  void give_back(const Piece& piece);

  // Frees blocks that are empty.
  void release_idle();

  uint64_t allocations() const { return blocks_.size(); }
  uint64_t bytes() const { return bytes_; }  // of all blocks

 private:
  uint64_t common_bytes(uint32_t type) const;  // of a block for many pieces
  std::optional<Piece> take_existing(uint32_t type, uint64_t bytes, uint64_t alignment,
                                     bool must_be_mapped);
  std::optional<Piece> take_from(Block& block, uint64_t bytes, uint64_t alignment);
  Block* create(uint32_t type, uint64_t bytes, bool whole, bool must_be_mapped);
  VkResult allocate(Block& block);
  void free(std::list<Block>::iterator block);

  Device& device_;
  std::list<Block> blocks_;
  uint64_t bytes_ = 0;
};

}  // namespace phi3c::vulkan
