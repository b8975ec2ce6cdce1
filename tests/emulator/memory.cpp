// Memory for torch's CPU tensors that ends at a page which nobody may touch, and begins after one.

#include "memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <sys/mman.h>

namespace emulator {
namespace {

constexpr uintptr_t PAGE = 4096;

std::map<uintptr_t, Block> blocks;  // by the begin of the first guard page
std::mutex mutex;                   // a tensor may be freed on any thread

uintptr_t whole_pages(uintptr_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

void release(void* pointer) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = --blocks.upper_bound(reinterpret_cast<uintptr_t>(pointer));
  Block& block = found->second;
  forget_shadow(block);
  munmap(reinterpret_cast<void*>(found->first), whole_pages(block.bytes) + 2 * PAGE);
  blocks.erase(found);
}

// The end of a tensor is that of its last page, but for what a multiple of 16 bytes asks; so it begins at one, as less than CUDA promises.
struct Guarded final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    void* const base = mmap(nullptr, whole_pages(bytes) + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::runtime_error("emulator: no memory");
    char* const first = static_cast<char*>(base) + PAGE;
    mprotect(first, whole_pages(bytes), PROT_READ | PROT_WRITE);
    char* const begin = first + whole_pages(bytes) - (bytes + 15) / 16 * 16;
    const std::lock_guard<std::mutex> lock(mutex);
    blocks[reinterpret_cast<uintptr_t>(base)] = {reinterpret_cast<uintptr_t>(begin), bytes};
    return {begin, begin, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

Block* find_block(uintptr_t address) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.upper_bound(address);
  if (found == blocks.begin()) return nullptr;
  --found;
  return address < found->first + whole_pages(found->second.bytes) + 2 * PAGE ? &found->second : nullptr;
}

std::string describe_address(uintptr_t address) {
  const Block* const block = find_block(address);
  if (block == nullptr) return "memory that belongs to no tensor";
  return "byte " + std::to_string(static_cast<intptr_t>(address - block->begin)) + " of a tensor of " + std::to_string(block->bytes) + " bytes";
}

}  // namespace emulator

extern "C" __attribute__((visibility("default"))) void emulator_guard(bool guard) {
  static c10::Allocator* const before = c10::GetCPUAllocator();
  static emulator::Guarded guarded;
  c10::SetCPUAllocator(guard ? static_cast<c10::Allocator*>(&guarded) : before, 255);
}
