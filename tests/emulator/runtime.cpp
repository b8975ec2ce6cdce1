// The emulator itself: fibers, barriers, shared memory, warp instructions, what is checked and what is counted.
//
// The rewritten kernels are compiled with -fsanitize=thread, but linked with the hooks at the end of this file instead of that sanitizer's
// library: so every load and store of a kernel comes by here with its address and size.

#include "emulator.h"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <dlfcn.h>
#include <map>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <unordered_map>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "memory.h"

namespace emulator {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr unsigned MAX_THREADS = 1024, WARP = 32;
constexpr size_t STACK = 256 << 10, PAGE = 4096, STATIC_LIMIT = 48 << 10, GAP = 256;
constexpr size_t STATIC_ROOM = 256 << 10, DYNAMIC_ROOM = 256 << 10;  // of the window of shared memory, the second behind the first

struct Settings {
  uint64_t seed = 0;
  bool tracking = false, counting = false;
  int device = 0;
  size_t shared_limit = 227 << 10;  // of a block, as the device would say
  int planted = 0;
} settings;

struct Counts {
  uint64_t launches = 0, blocks = 0, barriers = 0, mma = 0, ldmatrix = 0, shuffles = 0;
  uint64_t wavefronts = 0, conflicts = 0;     // of shared memory: passes it takes, and how many of them are due to banks
  uint64_t global_read = 0, global_write = 0;  // bytes
  uint64_t shared_bytes = 0;                   // of a block, the most
};
std::map<std::string, Counts> counts;
uint64_t attribute_calls = 0;

// When, and by whom, memory was accessed.
struct Stamp {
  uint32_t launch = 0, block = 0, epoch = 0;
  uint16_t warp_epoch = 0, thread = 0;
  bool several_threads = false, several_blocks = false;  // of the readers
};

constexpr size_t GRAIN = 2;  // bytes that share a shadow: the smallest type of the kernels

}  // namespace

struct Shadow {
  Stamp write, read;
};

namespace {

// A copy from global to shared memory that has begun.
struct Copy {
  uint32_t to;
  const void* from;
  uint32_t bytes;  // of 16; the others are zeros
};

struct Thread {
  void* stack_pointer = nullptr;
  unsigned index = 0;
  const char* waits_for = nullptr;  // null while it runs
  int line = 0;
  bool left = false;
  std::vector<std::vector<Copy>> groups = {{}};  // of copies on their way, the last of them not yet ended
};

struct Warp {
  uint32_t arrived = 0, mask = 0;
  const char* what = nullptr;
  int line = 0;
  uint16_t epoch = 0;
  void* operands[WARP] = {};
};

// The shared-memory accesses of a warp since the last barrier: by instruction, of each lane in turn.
using Accesses = std::unordered_map<uintptr_t, std::vector<std::pair<uint32_t, uint32_t>>[WARP]>;

struct Array {
  const void* key;
  const char* name;
  size_t offset, bytes;
};

struct State {
  const Launch* launch = nullptr;
  const std::function<void()>* body = nullptr;
  const char* kernel = nullptr;
  Counts* counts = nullptr;
  uint64_t random = 1;
  uint32_t number = 0, block = 0, epoch = 0;
  unsigned arrived = 0, left = 0;
  int barrier_line = 0;
  Thread threads[MAX_THREADS];
  Warp warps[MAX_THREADS / WARP];
  Accesses accesses[MAX_THREADS / WARP];
  std::vector<unsigned> runnable;
  std::vector<Array> arrays;
  Thread* current = nullptr;  // null outside of kernels
  void* main_stack = nullptr;
  sigjmp_buf abandon;
  std::string message;
  char *window = nullptr, *dynamic = nullptr, *stacks = nullptr;
  std::vector<Shadow> shadow;
} state;

std::string where() {
  std::string name = state.kernel ? state.kernel : state.launch->text;
  if (state.current == nullptr) return name;
  char place[96];
  std::snprintf(place, sizeof place, ", block %u, thread %u", state.block, state.current->index);
  return name + place;
}

// Ends the launch: the other fibers are left where they are.
[[noreturn]] void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  state.message = where() + ": " + text;
  if (state.current == nullptr) throw std::runtime_error(state.message);
  siglongjmp(state.abandon, 1);
}

// "[+1a2b]", which emulator.py turns into a line of the source.
std::string code_place(uintptr_t pc) {
  Dl_info info;
  if (pc == 0 || !dladdr(reinterpret_cast<void*>(pc), &info)) return "";
  char text[32];
  std::snprintf(text, sizeof text, " [+%lx]", static_cast<unsigned long>(pc - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase)));
  return text;
}

uint64_t draw(uint64_t below) {
  state.random ^= state.random << 13;
  state.random ^= state.random >> 7;
  state.random ^= state.random << 17;
  return state.random % below;
}

// Fibers

extern "C" void emulator_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "the emulator switches fibers on x86-64 alone"
#endif

void resume_any();

void fiber() {
  (*state.body)();
  for (const auto& group : state.current->groups) {
    if (!group.empty()) fail("leaves the kernel with copies on their way to shared memory");
  }
  state.current->left = true;
  ++state.left;
  resume_any();
}

void make_fiber(unsigned i) {
  void** top = reinterpret_cast<void**>(state.stacks + (i + 1) * STACK);
  *--top = nullptr;                            // the return address of fiber(), which has none
  *--top = reinterpret_cast<void*>(&fiber);    // 16-byte aligned as at a call
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  state.threads[i] = Thread{top, i};
}

// Why nobody can go on.
[[noreturn]] void deadlock() {
  std::string text = "deadlock:";
  std::map<std::string, std::pair<unsigned, unsigned>> waiting;  // how many, and the first
  for (unsigned i = 0; i < block_size.x; ++i) {
    const Thread& thread = state.threads[i];
    const std::string at = thread.left ? "left the kernel" : std::string("wait at ") + thread.waits_for + ", line " + std::to_string(thread.line);
    auto& [number, first] = waiting.try_emplace(at, 0u, i).first->second;
    ++number;
  }
  for (const auto& [at, who] : waiting) text += " " + std::to_string(who.first) + " threads " + at + " (first: " + std::to_string(who.second) + ");";
  text.pop_back();
  fail("%s", text.c_str());
}

// Goes on with any thread that can, the current one among them if it is.
void resume_any() {
  Thread* const from = state.current;
  if (state.runnable.empty()) {
    if (state.left < block_size.x) deadlock();
    state.current = nullptr;
    emulator_switch(&from->stack_pointer, state.main_stack);
  }
  const size_t pick = draw(state.runnable.size());
  Thread* const to = &state.threads[state.runnable[pick]];
  state.runnable[pick] = state.runnable.back();
  state.runnable.pop_back();
  if (to == from) return;
  state.current = to;
  thread_index.x = to->index;
  emulator_switch(&from->stack_pointer, to->stack_pointer);
}

void wait_for(const char* what, int line) {
  state.current->waits_for = what;
  state.current->line = line;
  resume_any();
}

void go_on(unsigned thread) {
  state.threads[thread].waits_for = nullptr;
  state.runnable.push_back(thread);
}

// Shared memory

// Passes through the banks that one instruction takes, for all lanes at once: 32 banks of 4 bytes, 128 bytes a pass.
void count_passes(const std::vector<std::pair<uint32_t, uint32_t>>& lanes) {
  uint32_t widest = 4;
  for (const auto& [offset, bytes] : lanes) widest = std::max(widest, bytes);
  const size_t together = 128 / widest;  // lanes whose turn it is
  for (size_t first = 0; first < lanes.size(); first += together) {
    std::vector<uint32_t> words[32];
    size_t passes = 1;
    for (size_t i = first; i < std::min(first + together, lanes.size()); ++i) {
      for (uint32_t word = lanes[i].first / 4; word <= (lanes[i].first + lanes[i].second - 1) / 4; ++word) {
        auto& bank = words[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        passes = std::max(passes, bank.size());
      }
    }
    state.counts->wavefronts += passes;
    state.counts->conflicts += passes - 1;
  }
}

void count_accesses() {
  for (Accesses& accesses : state.accesses) {
    for (auto& [pc, lanes] : accesses) {
      std::vector<std::pair<uint32_t, uint32_t>> at;
      for (size_t turn = 0;; ++turn) {
        at.clear();
        for (const auto& lane : lanes) {
          if (turn < lane.size()) at.push_back(lane[turn]);
        }
        if (at.empty()) break;
        count_passes(at);
      }
    }
    accesses.clear();
  }
}

Stamp stamp() {
  const unsigned thread = state.current->index;
  return {state.number, state.block, state.epoch, state.warps[thread / WARP].epoch, static_cast<uint16_t>(thread)};
}

// Whether nothing orders an earlier access and one of now. Shared memory is another one in each block.
bool races(const Stamp& before, const Stamp& now, bool shared) {
  if (before.launch != now.launch) return false;
  if (shared ? before.block != now.block : before.several_blocks || before.block != now.block) return !shared;
  if (before.epoch != now.epoch) return false;
  if (before.several_threads) return true;
  if (before.thread == now.thread) return false;
  return before.thread / WARP != now.thread / WARP || before.warp_epoch == now.warp_epoch;
}

void touch(Shadow* shadow, size_t bytes, bool write, bool shared, uintptr_t pc) {
  const Stamp now = stamp();
  const char* const memory = shared ? "shared" : "global";
  for (size_t i = 0; i * GRAIN < bytes; ++i) {
    Shadow& byte = shadow[i];
    if (races(byte.write, now, shared)) {
      fail("race: %s %s memory that block %u, thread %u wrote with no barrier between%s", write ? "writes" : "reads", memory,
           byte.write.block, byte.write.thread, code_place(pc).c_str());
    }
    if (write) {
      if (races(byte.read, now, shared)) {
        fail("race: writes %s memory that block %u, thread %u reads with no barrier between%s", memory, byte.read.block, byte.read.thread,
             code_place(pc).c_str());
      }
      byte.write = now;
    } else {
      Stamp reader = now;
      if (byte.read.launch == now.launch) {
        reader.several_blocks = byte.read.several_blocks || byte.read.block != now.block;
        reader.several_threads = byte.read.block == now.block && byte.read.epoch == now.epoch && (byte.read.several_threads || byte.read.thread != now.thread);
      }
      byte.read = reader;
    }
  }
}

size_t static_bytes() {
  size_t total = 0;
  for (const Array& array : state.arrays) total += array.bytes;
  return total;
}

// An access of shared memory at an offset of the window.
void check_shared(size_t offset, size_t bytes, bool write, uintptr_t pc) {
  if (offset % bytes) fail("misaligned: %zu bytes of shared memory at byte %zu%s", bytes, offset, code_place(pc).c_str());
  size_t begin = state.dynamic - state.window, size = state.launch->shared;
  const char* name = "dynamic";
  if (offset < STATIC_ROOM) {
    for (const Array& array : state.arrays) {
      if (array.offset <= offset && (array.offset + array.bytes + GAP > offset)) begin = array.offset, size = array.bytes, name = array.name;
    }
  }
  if (offset < begin || offset + bytes > begin + size) {
    fail("out of bounds: %s %zu bytes at byte %td of %zu bytes of shared memory (%s)%s", write ? "writes" : "reads", bytes,
         static_cast<ptrdiff_t>(offset - begin), size, name, code_place(pc).c_str());
  }
  Shadow* const shadow = state.shadow.data() + offset / GRAIN;
  if (!write) {
    for (size_t i = 0; i * GRAIN < bytes; ++i) {
      if (shadow[i].write.launch != state.number || shadow[i].write.block != state.block) {
        fail("reads shared memory that nobody wrote: byte %zu of %zu (%s)%s", offset + i * GRAIN - begin, size, name, code_place(pc).c_str());
      }
    }
  }
  touch(shadow, bytes, write, true, pc);
}

// Warp instructions

template <class Work>
void meet(const char* what, int line, uint32_t mask, void* operands, const Work& work) {
  const unsigned thread = state.current->index, lane = thread % WARP;
  Warp& warp = state.warps[thread / WARP];
  if (!(mask >> lane & 1)) fail("%s, line %d: its mask %08x is without its own lane %u", what, line, mask, lane);
  for (unsigned i = 0; i < WARP; ++i) {
    const unsigned other = thread - lane + i;
    if ((mask >> i & 1) && (other >= block_size.x || state.threads[other].left)) {
      fail("%s, line %d: thread %u, which its mask names, has left the kernel", what, line, other);
    }
  }
  if (warp.arrived && (warp.what != what || warp.line != line || warp.mask != mask)) {
    fail("lanes of a warp meet at different instructions: %s, line %d, mask %08x, while others wait at %s, line %d, mask %08x", what, line,
         mask, warp.what, warp.line, warp.mask);
  }
  warp.what = what, warp.line = line, warp.mask = mask;
  warp.arrived |= 1u << lane;
  warp.operands[lane] = operands;
  if (warp.arrived != mask) return wait_for(what, line);
  warp.arrived = 0;
  work(warp);
  for (unsigned i = 0; i < WARP; ++i) {
    if (mask >> i & 1) go_on(thread - lane + i);
  }
  resume_any();
}

float to_float(uint16_t bits, __half) {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (unsigned i = 0; i < 65536; ++i) values[i] = __half2float(__half(__half_raw{static_cast<unsigned short>(i)}));
    return values;
  }();
  return table[bits];
}

float to_float(uint16_t bits, __nv_bfloat16) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

struct MmaOperands {
  uint32_t a[4], b[2];
  float c[4];
};

// D = A B + C for A [16, 16] by rows, B [16, 8] by columns. Lane l has of A rows l / 4 and l / 4 + 8 at columns 2 (l % 4), the next, and both
// 8 further; of B column l / 4 at rows 2 (l % 4), the next, and both 8 further; of C and D rows l / 4 and l / 4 + 8 at columns 2 (l % 4), the
// next. Sums are in float64 here; what order and precision the units have is not documented.
template <class T>
void mma(const char* what, int line, float* const (&d)[4], MmaOperands operands) {
  meet(what, line, 0xffffffffu, &operands, [](Warp& warp) {
    double a[16][16], b[16][8];
    for (unsigned l = 0; l < WARP; ++l) {
      const auto& from = *static_cast<const MmaOperands*>(warp.operands[l]);
      for (unsigned r = 0; r < 4; ++r) {
        for (unsigned half = 0; half < 2; ++half) {
          const unsigned k = 2 * (l % 4) + half;
          a[l / 4 + r % 2 * 8][k + r / 2 * 8] = to_float(static_cast<uint16_t>(from.a[r] >> 16 * half), T());
          if (r < 2) b[k + r * 8][l / 4] = to_float(static_cast<uint16_t>(from.b[r] >> 16 * half), T());
        }
      }
    }
    for (unsigned row = 0; row < 16; ++row) {
      double sum[8] = {};
      for (unsigned k = 0; k < 16; ++k) {
        for (unsigned n = 0; n < 8; ++n) sum[n] += a[row][k] * b[k][n];
      }
      for (unsigned n = 0; n < 8; ++n) {
        float& c = static_cast<MmaOperands*>(warp.operands[row % 8 * 4 + n / 2])->c[row / 8 * 2 + n % 2];
        c = static_cast<float>(c + sum[n]);
      }
    }
    ++state.counts->mma;
  });
  for (int i = 0; i < 4; ++i) *d[i] = operands.c[i];
}

struct MatrixOperands {
  uint32_t address;
  uint32_t r[4];
};

// Lane l gives the address of row l % 8 of block l / 8, and receives of every block row l / 4 at columns 2 (l % 4) and the next, or, transposed,
// column l / 4 at these rows.
void ldmatrix(const char* what, int line, bool transposed, uint32_t* const (&r)[4], uint32_t address) {
  MatrixOperands operands{address, {}};
  const size_t begin = state.dynamic - state.window, size = state.launch->shared;
  if (address % 16) fail("misaligned: %s, line %d, of a row at byte %u", what, line, address);
  if (address >= STATIC_ROOM && (address < begin || address + 16 > begin + size)) {
    fail("out of bounds: %s, line %d, of a row at byte %td of %zu bytes of shared memory", what, line, static_cast<ptrdiff_t>(address - begin), size);
  }
  if (settings.tracking) check_shared(address, 16, false, 0);
  meet(what, line, 0xffffffffu, &operands, [transposed](Warp& warp) {
    for (unsigned block = 0; block < 4; ++block) {
      const char* rows[8];
      std::vector<std::pair<uint32_t, uint32_t>> lanes;
      for (unsigned i = 0; i < 8; ++i) {
        const uint32_t offset = static_cast<const MatrixOperands*>(warp.operands[8 * block + i])->address;
        rows[i] = state.window + offset;
        lanes.emplace_back(offset, 16);
      }
      if (settings.counting) count_passes(lanes);
      for (unsigned l = 0; l < WARP; ++l) {
        uint16_t pair[2];
        for (unsigned half = 0; half < 2; ++half) {
          const unsigned row = transposed ? 2 * (l % 4) + half : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + half;
          std::memcpy(&pair[half], rows[row] + 2 * column, 2);
        }
        static_cast<MatrixOperands*>(warp.operands[l])->r[block] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
    ++state.counts->ldmatrix;
  });
  for (int i = 0; i < 4; ++i) *r[i] = operands.r[i];
}

struct ShuffleOperands {
  uint64_t bits, result;
  unsigned source;
};

// Launches

void on_signal(int signal, siginfo_t* info, void* context) {
  if (state.current == nullptr) {
    std::signal(signal, SIG_DFL);
    return;
  }
  uintptr_t pc = 0;
#if defined(__x86_64__)
  pc = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1;
#endif
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr), window = reinterpret_cast<uintptr_t>(state.window);
  std::string what;
  if (address - window < STATIC_ROOM + DYNAMIC_ROOM + PAGE) {
    what = "byte " + std::to_string(static_cast<ptrdiff_t>(address - reinterpret_cast<uintptr_t>(state.dynamic))) + " of " +
           std::to_string(state.launch->shared) + " bytes of shared memory (dynamic)";
  } else if (address < PAGE) {
    what = "a null pointer";
  } else {
    what = describe_address(address);
  }
  fail("out of bounds: %s%s", what.c_str(), code_place(pc).c_str());
}

char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory");
  return static_cast<char*>(memory);
}

void prepare() {
  if (state.window != nullptr) return;
  state.window = reserve(STATIC_ROOM + DYNAMIC_ROOM + PAGE);  // the last page is a guard
  mprotect(state.window + STATIC_ROOM + DYNAMIC_ROOM, PAGE, PROT_NONE);
  state.stacks = reserve(MAX_THREADS * STACK);
  for (unsigned i = 0; i < MAX_THREADS; ++i) mprotect(state.stacks + i * STACK, PAGE, PROT_NONE);
  state.shadow.resize((STATIC_ROOM + DYNAMIC_ROOM) / GRAIN);
}

void run_block(uint32_t block) {
  state.block = block;
  state.epoch = state.arrived = state.left = 0;
  block_index.x = block;
  std::memset(state.dynamic, 0xff, state.launch->shared);  // NaN in every format
  for (const Array& array : state.arrays) std::memset(state.window + array.offset, 0xff, array.bytes);
  for (Warp& warp : state.warps) warp = Warp{};
  state.runnable.clear();
  for (unsigned i = 0; i < block_size.x; ++i) {
    make_fiber(i);
    state.runnable.push_back(i);
  }
  const size_t pick = draw(state.runnable.size());
  std::swap(state.runnable[pick], state.runnable.back());
  state.current = &state.threads[state.runnable.back()];
  state.runnable.pop_back();
  thread_index = {state.current->index, 0, 0};
  emulator_switch(&state.main_stack, state.current->stack_pointer);
  if (settings.counting) count_accesses();
  ++state.counts->blocks;
}

std::map<std::pair<const void*, int>, size_t> allowed_shared;  // by kernel and device

void access(const void* pointer, size_t bytes, bool write, void* pc);

}  // namespace

void entered(const char* name) {
  if (state.kernel == name) return;
  state.kernel = name;
}

void* shared_array(const void* key, const char* name, size_t bytes) {
  for (const Array& array : state.arrays) {
    if (array.key == key) return state.window + array.offset;
  }
  const size_t offset = state.arrays.empty() ? GAP : (state.arrays.back().offset + state.arrays.back().bytes + 2 * GAP - 1) / GAP * GAP;
  if (offset + bytes + GAP > STATIC_ROOM) fail("%s: more shared memory than any device has", name);
  state.arrays.push_back({key, name, offset, bytes});
  if (static_bytes() > STATIC_LIMIT) fail("%zu bytes of static shared memory; there are %zu", static_bytes(), STATIC_LIMIT);
  std::memset(state.window + offset, 0xff, bytes);
  return state.window + offset;
}

char* dynamic_shared() { return state.dynamic; }

uint32_t to_shared(const void* pointer) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - state.window;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(STATIC_ROOM + DYNAMIC_ROOM)) fail("converts a pointer that is not into shared memory");
  return static_cast<uint32_t>(offset);
}

bool planted(int fault) { return settings.planted == fault; }

void block_barrier(int line) {
  if (state.arrived == 0) state.barrier_line = line;
  if (state.barrier_line != line) fail("threads of a block meet at different barriers, lines %d and %d", state.barrier_line, line);
  if (++state.arrived < block_size.x) return wait_for("__syncthreads", line);
  state.arrived = 0;
  ++state.epoch;
  ++state.counts->barriers;
  if (settings.counting) count_accesses();
  for (unsigned i = 0; i < block_size.x; ++i) go_on(i);
  resume_any();
}

void warp_barrier(int line, uint32_t mask) {
  meet("__syncwarp", line, mask, nullptr, [](Warp& warp) { ++warp.epoch; });
}

uint64_t shuffle(int line, Shuffle kind, uint32_t mask, uint64_t bits, int argument, int width) {
  const int lane = state.current->index % WARP, first = lane / width * width, last = first + width - 1;
  int source = lane;
  if (kind == Shuffle::INDEX) source = first + (argument & (width - 1));
  if (kind == Shuffle::XOR && (lane ^ argument) <= last) source = lane ^ argument;
  if (kind == Shuffle::UP && lane - argument >= first) source = lane - argument;
  if (kind == Shuffle::DOWN && lane + argument <= last) source = lane + argument;
  ShuffleOperands operands{bits, 0, static_cast<unsigned>(source)};
  if (!(mask >> source & 1)) fail("__shfl_sync, line %d: reads of lane %d, which its mask %08x is without", line, source, mask);
  meet("__shfl_sync", line, mask, &operands, [mask](Warp& warp) {
    for (unsigned i = 0; i < WARP; ++i) {
      if (!(mask >> i & 1)) continue;
      auto& to = *static_cast<ShuffleOperands*>(warp.operands[i]);
      to.result = static_cast<const ShuffleOperands*>(warp.operands[to.source])->bits;
    }
    ++state.counts->shuffles;
  });
  return operands.result;
}

void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(
    int line, float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
    float c0, float c1, float c2, float c3) {
  mma<__half>("mma.f16", line, {&d0, &d1, &d2, &d3}, {{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}});
}

void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    int line, float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
    float c0, float c1, float c2, float c3) {
  mma<__nv_bfloat16>("mma.bf16", line, {&d0, &d1, &d2, &d3}, {{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}});
}

// The bytes arrive no sooner than the thread waits for them; until then nobody may read them.
void cp_async_cg_shared_global(int line, uint32_t to, const void* from, uint32_t bytes) {
  const size_t begin = state.dynamic - state.window, size = state.launch->shared;
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("misaligned: cp.async, line %d", line);
  if (bytes > 16) fail("cp.async, line %d: %u bytes of 16", line, bytes);
  if (to < begin || to + 16 > begin + size) {
    fail("out of bounds: cp.async, line %d, to byte %td of %zu bytes of shared memory", line, static_cast<ptrdiff_t>(to - begin), size);
  }
  if (bytes) access(from, bytes, false, __builtin_return_address(0));
  if (settings.tracking) {
    access(state.window + to, 16, true, __builtin_return_address(0));
    for (size_t i = 0; i * GRAIN < 16; ++i) state.shadow[to / GRAIN + i].write.launch = 0;
  }
  std::memset(state.window + to, 0xff, 16);
  state.current->groups.back().push_back({to, from, bytes});
}

void cp_async_commit_group(int) { state.current->groups.emplace_back(); }

void cp_async_wait_group(int, int groups) {
  auto& begun = state.current->groups;
  while (begun.size() > static_cast<size_t>(groups) + 1) {  // the last one has not ended
    for (const Copy& copy : begun.front()) {
      std::memset(state.window + copy.to, 0, 16);
      std::memcpy(state.window + copy.to, copy.from, copy.bytes);
      if (settings.tracking) check_shared(copy.to, 16, true, 0);
    }
    begun.erase(begun.begin());
  }
}

void ldmatrix_sync_aligned_m8n8_x4_shared_b16(int line, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address) {
  ldmatrix("ldmatrix", line, false, {&r0, &r1, &r2, &r3}, address);
}

void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(int line, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address) {
  ldmatrix("ldmatrix.trans", line, true, {&r0, &r1, &r2, &r3}, address);
}

void run(const Launch& launch, const std::function<void()>& body) {
  prepare();
  state.launch = &launch;
  state.kernel = nullptr;
  state.body = &body;
  if (launch.grid == 0 || launch.grid > 0x7fffffffu) fail("line %d: a grid of %u blocks", launch.line, launch.grid);
  if (launch.threads == 0 || launch.threads > MAX_THREADS) fail("line %d: blocks of %u threads", launch.line, launch.threads);
  const auto allowed = allowed_shared.find({launch.kernel, settings.device});
  const size_t limit = allowed == allowed_shared.end() ? STATIC_LIMIT : std::max(allowed->second, STATIC_LIMIT);
  if (launch.shared > limit) fail("line %d: %zu bytes of dynamic shared memory; allowed are %zu", launch.line, launch.shared, limit);

  Counts counted;
  state.counts = &counted;
  ++state.number;
  state.random = settings.seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
  state.arrays.clear();
  state.dynamic = state.window + STATIC_ROOM + DYNAMIC_ROOM - (launch.shared + 15) / 16 * 16;
  block_size = dim3(launch.threads);
  grid_size = dim3(launch.grid);

  static char signal_stack[64 << 10];
  stack_t stack{}, old_stack;
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &old_stack);
  struct sigaction action{}, old_segv, old_bus;
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  volatile bool failed = sigsetjmp(state.abandon, 1) != 0;
  if (!failed) {
    // Blocks in any order: a stride that has no factor in common with their number visits each once.
    uint64_t stride = launch.grid > 2 ? draw(launch.grid - 1) + 1 : 1, block = draw(launch.grid);
    const auto coprime = [](uint64_t a, uint64_t b) {
      while (b) std::swap(a, b), b %= a;
      return a == 1;
    };
    while (!coprime(stride, launch.grid)) ++stride;
    for (uint32_t i = 0; i < launch.grid; ++i, block = (block + stride) % launch.grid) run_block(static_cast<uint32_t>(block));
  }
  state.current = nullptr;
  for (Accesses& accesses : state.accesses) accesses.clear();
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_stack, nullptr);
  if (failed) throw std::runtime_error(state.message);

  counted.shared_bytes = launch.shared + static_bytes();
  counted.launches = 1;
  if (counted.shared_bytes > settings.shared_limit) {
    fail("%zu bytes of shared memory, static ones among them; the device has %zu", static_cast<size_t>(counted.shared_bytes), settings.shared_limit);
  }
  if (allowed == allowed_shared.end() && counted.shared_bytes > STATIC_LIMIT) {
    fail("%zu bytes of shared memory, static ones among them, of which the runtime was not told", static_cast<size_t>(counted.shared_bytes));
  }
  Counts& total = counts[state.kernel];
  for (uint64_t Counts::*count : {&Counts::launches, &Counts::blocks, &Counts::barriers, &Counts::mma, &Counts::ldmatrix, &Counts::shuffles,
                                  &Counts::wavefronts, &Counts::conflicts, &Counts::global_read, &Counts::global_write}) {
    total.*count += counted.*count;
  }
  total.shared_bytes = std::max(total.shared_bytes, counted.shared_bytes);
}

namespace {

void access(const void* pointer, size_t bytes, bool write, void* pc) {
  if (!settings.tracking || state.current == nullptr) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer), code = reinterpret_cast<uintptr_t>(pc);
  if (address - reinterpret_cast<uintptr_t>(state.stacks) < MAX_THREADS * STACK) return;
  const size_t offset = address - reinterpret_cast<uintptr_t>(state.window);
  if (offset < STATIC_ROOM + DYNAMIC_ROOM) {
    check_shared(offset, bytes, write, code);
    if (settings.counting) state.accesses[state.current->index / WARP][code][state.current->index % WARP].emplace_back(offset, bytes);
    return;
  }
  Block* const block = find_block(address);
  if (block == nullptr) return;  // the kernel's parameters, constants
  if (address < block->begin || address + bytes > block->begin + block->bytes) {
    fail("out of bounds: %s %zu bytes, %s%s", write ? "writes" : "reads", bytes, describe_address(address).c_str(), code_place(code).c_str());
  }
  if (address % bytes) fail("misaligned: %zu bytes, %s%s", bytes, describe_address(address).c_str(), code_place(code).c_str());
  (write ? state.counts->global_write : state.counts->global_read) += bytes;
  if (block->shadow == nullptr) block->shadow = new Shadow[(block->bytes + GRAIN - 1) / GRAIN];
  touch(block->shadow + (address - block->begin) / GRAIN, bytes, write, false, code);
}

}  // namespace

void forget_shadow(Block& block) { delete[] block.shadow; }

}  // namespace emulator

// What the compiled kernels call

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define HOOKS(N)                                                                                                                      \
  void __tsan_read##N(void* p) { emulator::access(p, N, false, __builtin_return_address(0)); }                                       \
  void __tsan_write##N(void* p) { emulator::access(p, N, true, __builtin_return_address(0)); }                                       \
  void __tsan_unaligned_read##N(void* p) { emulator::access(p, N, false, __builtin_return_address(0)); }                             \
  void __tsan_unaligned_write##N(void* p) { emulator::access(p, N, true, __builtin_return_address(0)); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(char* p, size_t n) {
  for (size_t i = 0; i < n; ++i) emulator::access(p + i, 1, false, __builtin_return_address(0));
}
void __tsan_write_range(char* p, size_t n) {
  for (size_t i = 0; i < n; ++i) emulator::access(p + i, 1, true, __builtin_return_address(0));
}
// Of host code: guards of statics, reference counts.
char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_load(const volatile int* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_add(volatile int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_sub(volatile int* p, int v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }

// The runtime of CUDA, and torch's functions for CUDA devices

cudaError_t cudaGetDevice(int* device) {
  *device = emulator::settings.device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = static_cast<int>(emulator::settings.shared_limit);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  ++emulator::attribute_calls;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  if (static_cast<size_t>(value) > emulator::settings.shared_limit) return cudaErrorInvalidValue;
  emulator::allowed_shared[{kernel, emulator::settings.device}] = value;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }

__attribute__((visibility("default"))) int aoti_torch_create_device_guard(int, void** guard) { return *guard = nullptr, 0; }
__attribute__((visibility("default"))) int aoti_torch_delete_device_guard(void*) { return 0; }
__attribute__((visibility("default"))) int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = nullptr, 0; }

// What tests call

#define EXPORT __attribute__((visibility("default")))

EXPORT void emulator_configure(uint64_t seed, bool tracking, bool counting, int device, size_t shared_limit, int planted) {
  emulator::settings = {seed, tracking || counting, counting, device, shared_limit, planted};
}

EXPORT uint64_t emulator_attribute_calls() { return emulator::attribute_calls; }
EXPORT void emulator_clear_counts() { emulator::counts.clear(); }

// A line per kernel: its name, then numbers in the order of `Counts`.
EXPORT const char* emulator_counts() {
  static std::string text;
  text.clear();
  for (const auto& [name, c] : emulator::counts) {
    text += name;
    for (uint64_t value : {c.launches, c.blocks, c.barriers, c.mma, c.ldmatrix, c.shuffles, c.wavefronts, c.conflicts, c.global_read, c.global_write, c.shared_bytes}) {
      text += "\t" + std::to_string(value);
    }
    text += "\n";
  }
  return text.c_str();
}
}
