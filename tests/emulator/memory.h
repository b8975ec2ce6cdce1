#pragma once
// Tensors between guard pages.

#include <cstdint>
#include <string>

namespace emulator {

struct Shadow;

struct Block {
  uintptr_t begin, bytes;
  Shadow* shadow = nullptr;  // made at the first access
};

Block* find_block(uintptr_t address);  // of a tensor in or beside whose memory an address lies; null where there is none
std::string describe_address(uintptr_t address);
void forget_shadow(Block& block);

}  // namespace emulator
