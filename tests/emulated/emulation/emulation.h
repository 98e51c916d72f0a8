// A CUDA block on one CPU thread: what ptx.cuh gives the kernels, defined for the host.
//
// Every thread of a block is a fiber that runs until it has to wait for others (a barrier, a
// shuffle, an mma), finishes, or loses its turn; a random number generator picks who runs next and
// in which order the blocks run, so that whatever a barrier does not order happens in some order or
// other. What the hardware may do late is done late or early at random: a cp.async lands anywhere
// between its issue and the wait. Shared memory is exactly as large as was asked for (the address
// sanitizer sees overruns) and starts as NaN; 16-byte accesses must be aligned; lanes that leave a
// warp's instruction alone, and barriers that part of a block never reaches, end the run with a
// message.
//
// Not caught: races between accesses with no waiting point near them in any order tried, memory
// ordering weaker than program order within a thread, anything of Hopper (TMA, wgmma, clusters),
// registers, occupancy and speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "nbl/dtypes.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define NBL_DEVICE inline
#define NBL_PARAM const

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace nbl {
namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = size_t{256} << 10;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::fflush(stderr);
  std::_Exit(3);
}

inline void require(bool ok, const char* what) {
  if (!ok) fail(what);
}

// ---- Fibers ------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void nbl_switch_stack(void** save, void* load);
asm(R"(
.text
nbl_switch_stack:
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
#endif

class Context {
 public:
  void start_on(char* stack, size_t bytes, void (*entry)()) {
    stack_ = stack;
    bytes_ = bytes;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, bytes);  // of the fiber that had it before
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack + bytes);
    top[-1] = nullptr;  // where a return address would be: entry never returns
    top[-2] = reinterpret_cast<void*>(entry);
    top_ = top - 8;  // and six registers
    std::fill(top - 8, top - 2, nullptr);
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    makecontext(&context_, entry, 0);
#endif
  }

  // Leaves `from`, which continues when somebody switches back to it.
  static void change(Context& from, Context& to, bool from_is_done = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from_is_done ? nullptr : &from.fake_, to.stack_, to.bytes_);
#endif
#if defined(__x86_64__)
    nbl_switch_stack(&from.top_, to.top_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
    from.arrived();
  }

  // The first thing on a stack: tells the sanitizer where we are, and learns where we came from.
  void arrived(Context* came_from = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_, &stack, &bytes);
    if (came_from && !came_from->stack_) {
      came_from->stack_ = static_cast<char*>(const_cast<void*>(stack));
      came_from->bytes_ = bytes;
    }
#else
    (void)came_from;
#endif
  }

 private:
  char* stack_ = nullptr;
  size_t bytes_ = 0;
  void* fake_ = nullptr;
#if defined(__x86_64__)
  void* top_ = nullptr;
#else
  ucontext_t context_;
#endif
};

// ---- A block -----------------------------------------------------------------------------------

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Thread {
  enum State { kReady, kAtBarrier, kInWarp, kDone };
  Context context;
  State state = kReady;
  std::vector<Copy> copies;       // issued, not landed
  std::vector<size_t> committed;  // copies issued up to each commit that has not been waited for
};

// A collective instruction: gets every lane's operands (and writes the results there).
using Collective = void (*)(void* const (&lanes)[kWarpSize]);

struct Warp {
  void* lanes[kWarpSize];
  Collective operation = nullptr;
  int arrived = 0;
};

struct Block {
  std::mt19937_64 random;
  dim3 grid, index;
  unsigned size = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<char, void (*)(void*)> shared{nullptr, std::free};
  size_t shared_bytes = 0;
  unsigned current = 0, at_barrier = 0, done = 0;
  Context scheduler;
  std::function<void()> kernel;
};

inline Block*& block() {
  static Block* current = nullptr;
  return current;
}

inline Thread& self() { return block()->threads[block()->current]; }

inline bool chance(unsigned one_in) { return block()->random() % one_in == 0; }

inline void wait_for_turn(Thread::State state) {
  Thread& me = self();
  me.state = state;
  Context::change(me.context, block()->scheduler);
}

// Another thread may go first: called where a thread touches memory that others see.
inline void maybe_lose_turn() {
  if (chance(16)) wait_for_turn(Thread::kReady);
}

inline void release_barrier() {
  Block& b = *block();
  if (b.at_barrier == 0 || b.at_barrier + b.done < b.size) return;
  b.at_barrier = 0;
  for (Thread& t : b.threads)
    if (t.state == Thread::kAtBarrier) t.state = Thread::kReady;
}

inline void land(const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, sizeof(Bytes16));
  else
    std::memset(copy.to, 0, sizeof(Bytes16));
}

inline void land_first(Thread& thread, size_t count) {
  for (size_t i = 0; i < count; ++i) land(thread.copies[i]);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + count);
  for (size_t& c : thread.committed) c -= std::min(c, count);
}

inline void thread_main() {
  Block& b = *block();
  self().context.arrived(&b.scheduler);
  b.kernel();
  Thread& me = self();
  land_first(me, me.copies.size());
  me.state = Thread::kDone;
  ++b.done;
  release_barrier();
  Context::change(me.context, b.scheduler, true);
  fail("a finished thread was woken");
}

// Waits until all lanes of the warp have called the same operation; the last one performs it.
template <class Operands>
void collective(Collective operation, Operands& operands) {
  Block& b = *block();
  Warp& warp = b.warps[b.current / kWarpSize];
  require(warp.arrived == 0 || warp.operation == operation,
          "lanes of a warp are at different instructions");
  warp.operation = operation;
  warp.lanes[b.current % kWarpSize] = &operands;
  if (++warp.arrived < kWarpSize) {
    wait_for_turn(Thread::kInWarp);
    return;
  }
  operation(warp.lanes);
  warp.arrived = 0;
  const unsigned first = b.current / kWarpSize * kWarpSize;
  for (unsigned i = first; i < first + kWarpSize; ++i)
    if (b.threads[i].state == Thread::kInWarp) b.threads[i].state = Thread::kReady;
}

inline void run_block(Block& b) {
  block() = &b;
  static std::vector<std::unique_ptr<char[]>> stacks;  // kept: fresh ones would cost page faults
  while (stacks.size() < b.size) stacks.emplace_back(new char[kStackBytes]);
  for (unsigned i = 0; i < b.size; ++i) {
    char* aligned =
        reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(stacks[i].get()) + 63) / 64 * 64);
    b.threads[i].context.start_on(aligned, kStackBytes - 64, thread_main);
  }
  std::vector<unsigned> ready;
  while (b.done < b.size) {
    ready.clear();
    for (unsigned i = 0; i < b.size; ++i)
      if (b.threads[i].state == Thread::kReady) ready.push_back(i);
    if (ready.empty())
      fail(b.at_barrier ? "part of the block waits at a barrier, the rest in a warp's instruction"
                        : "lanes of a warp never reached its instruction");
    // All that are ready take a turn, in a new order each time: fair, and cheap to choose.
    std::shuffle(ready.begin(), ready.end(), b.random);
    for (unsigned i : ready) {
      if (b.threads[i].state != Thread::kReady) continue;
      Thread& other = b.threads[b.random() % b.size];
      if (!other.copies.empty()) land_first(other, b.random() % (other.copies.size() + 1));
      b.current = i;
      Context::change(b.scheduler, b.threads[i].context);
    }
  }
  block() = nullptr;
}

inline bool in_shared(const void* pointer, size_t bytes) {
  const char* p = static_cast<const char*>(pointer);
  const char* base = block()->shared.get();
  return p >= base && p + bytes <= base + block()->shared_bytes;
}

inline void require_aligned(const void* address) {
  require(reinterpret_cast<uintptr_t>(address) % 16 == 0,
          "a 16-byte access at an address that is no multiple of 16");
}

// What a tensor core does with 8 products and an accumulator: exact products, aligned to the
// largest and cut off, not rounded. (Hardware keeps two or three more bits than are kept here.)
inline float truncated(double value) {
  const float nearest = static_cast<float>(value);
  if (!std::isfinite(nearest) || std::abs(static_cast<double>(nearest)) <= std::abs(value))
    return nearest;
  return std::nextafter(nearest, 0.0f);
}

}  // namespace emulation

// Runs a kernel: grid blocks of `threads` threads, in an order and interleaving drawn from seed.
template <class Params>
void emulate(void (*kernel)(Params), dim3 grid, unsigned threads, size_t shared_bytes,
             uint64_t seed, const Params& params) {
  using namespace emulation;
  require(threads > 0 && threads % kWarpSize == 0 && threads <= 1024,
          "a block must be a multiple of 32 threads, up to 1024");
  require(shared_bytes <= size_t{227} << 10, "more than 227 KiB of shared memory");
  std::mt19937_64 random(seed);
  std::vector<unsigned> order(size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  for (unsigned i : order) {
    Block b;
    b.random.seed(random());
    b.grid = grid;
    b.index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    b.size = threads;
    b.threads.resize(threads);
    b.warps.resize(threads / kWarpSize);
    void* shared = nullptr;
    require(posix_memalign(&shared, 1024, std::max<size_t>(shared_bytes, 1)) == 0, "no memory");
    b.shared.reset(static_cast<char*>(shared));
    b.shared_bytes = shared_bytes;
    std::memset(shared, 0xff, shared_bytes);
    b.kernel = [&] { kernel(params); };
    run_block(b);
  }
}

// ---- The functions of ptx.cuh ------------------------------------------------------------------

#define threadIdx (dim3{::nbl::emulation::block()->current, 0, 0})
#define blockIdx (::nbl::emulation::block()->index)
#define blockDim (dim3{::nbl::emulation::block()->size, 1, 1})
#define gridDim (::nbl::emulation::block()->grid)

inline char* shared_memory() { return emulation::block()->shared.get(); }

inline void sync_block() {
  emulation::Block& b = *emulation::block();
  ++b.at_barrier;
  b.threads[b.current].state = emulation::Thread::kAtBarrier;
  emulation::release_barrier();
  const auto state = b.threads[b.current].state;  // the last to arrive may go on, or not
  if (state == emulation::Thread::kAtBarrier || emulation::chance(2))
    emulation::wait_for_turn(state);
}

inline void sync_warp() {
  int none = 0;
  emulation::collective([](void* const(&)[emulation::kWarpSize]) {}, none);
}

namespace emulation {

template <class T>
struct Shuffled {
  T value, result;
  int lane;  // whose value this lane asks for
};

template <class T>
void exchange(void* const (&lanes)[kWarpSize]) {
  for (void* lane : lanes) {
    auto* mine = static_cast<Shuffled<T>*>(lane);
    mine->result = static_cast<Shuffled<T>*>(lanes[mine->lane & (kWarpSize - 1)])->value;
  }
}

}  // namespace emulation

template <class T>
T shuffle(T value, int lane) {
  emulation::Shuffled<T> operands{value, T{}, lane};
  emulation::collective(emulation::exchange<T>, operands);
  return operands.result;
}

template <class T>
T shuffle_xor(T value, int lane_mask) {
  return shuffle(value, static_cast<int>(emulation::block()->current % 32) ^ lane_mask);
}

inline bool any_lane(bool value) {
  emulation::collective(
      [](void* const(&lanes)[emulation::kWarpSize]) {
        bool any = false;
        for (void* lane : lanes) any = any || *static_cast<bool*>(lane);
        for (void* lane : lanes) *static_cast<bool*>(lane) = any;
      },
      value);
  return value;
}

inline void fence_global() { emulation::maybe_lose_turn(); }

inline uint32_t atomic_add(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  *address += value;
  return before;
}

inline uint64_t atomic_min(uint64_t* address, uint64_t value) {
  const uint64_t before = *address;
  *address = std::min(before, value);
  return before;
}

inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

inline Bytes16 load_16(const void* address) {
  emulation::require_aligned(address);
  Bytes16 value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

inline Bytes16 load_streaming(const void* address) { return load_16(address); }

inline void store_16(void* address, const Bytes16& value) {
  emulation::require_aligned(address);
  std::memcpy(address, &value, sizeof value);
}

inline void prefetch_l2(const void*) {}

inline void copy_async_16(void* shared, const void* global, bool valid) {
  emulation::require_aligned(shared);
  emulation::require(emulation::in_shared(shared, 16), "cp.async writes past shared memory");
  if (valid) {
    emulation::require_aligned(global);
    char probe[16];
    std::memcpy(probe, global, sizeof probe);  // now, so that the sanitizer names the caller
  }
  emulation::self().copies.push_back({shared, valid ? global : nullptr});
}

inline void copy_async_commit() {
  emulation::Thread& me = emulation::self();
  me.committed.push_back(me.copies.size());
}

template <int kPending>
void copy_async_wait() {
  emulation::Thread& me = emulation::self();
  if (me.committed.size() <= kPending) return;
  const size_t complete = me.committed.size() - kPending;
  emulation::land_first(me, me.committed[complete - 1]);
  me.committed.erase(me.committed.begin(), me.committed.begin() + complete);
}

namespace emulation {

struct Matrices {
  const void* row;
  uint32_t* result;
};

template <bool kTransposed>
void load_matrices(void* const (&lanes)[kWarpSize]) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const void* row = static_cast<Matrices*>(lanes[lane])->row;
    require_aligned(row);
    require(in_shared(row, 16), "ldmatrix reads past shared memory");
    std::memcpy(matrix[lane / 8][lane % 8], row, 16);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint32_t lo = kTransposed ? matrix[i][2 * t][g] : matrix[i][g][2 * t];
      const uint32_t hi = kTransposed ? matrix[i][2 * t + 1][g] : matrix[i][g][2 * t + 1];
      static_cast<Matrices*>(lanes[lane])->result[i] = lo | hi << 16;
    }
  }
}

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <class T>
double element(uint32_t packed, int half) {
  return to_float(T{static_cast<uint16_t>(half ? packed >> 16 : packed & 0xffffu)});
}

template <class T>
void mma(void* const (&lanes)[kWarpSize]) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Mma& mine = *static_cast<Mma*>(lanes[lane]);
    for (int half = 0; half < 2; ++half) {
      const int k = 2 * t + half;
      a[g][k] = element<T>(mine.a[0], half);
      a[g + 8][k] = element<T>(mine.a[1], half);
      a[g][k + 8] = element<T>(mine.a[2], half);
      a[g + 8][k + 8] = element<T>(mine.a[3], half);
      b[k][g] = element<T>(mine.b[0], half);
      b[k + 8][g] = element<T>(mine.b[1], half);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    float* d = static_cast<Mma*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = g + i / 2 * 8, column = 2 * t + i % 2;
      for (int k = 0; k < 16; k += 8) {
        double sum = d[i];
        for (int j = k; j < k + 8; ++j) sum += a[row][j] * b[j][column];
        d[i] = truncated(sum);
      }
    }
  }
}

}  // namespace emulation

inline void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  emulation::Matrices operands{row, r};
  emulation::collective(emulation::load_matrices<false>, operands);
}

inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  emulation::Matrices operands{row, r};
  emulation::collective(emulation::load_matrices<true>, operands);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::Mma operands{d, a, b};
  emulation::collective(emulation::mma<T>, operands);
}

template <class T>
uint32_t pack2(float lo, float hi) {
  return uint32_t{from_float<T>(lo).bits} | uint32_t{from_float<T>(hi).bits} << 16;
}

struct Float2 {
  float lo, hi;
};

template <class T>
Float2 unpack2(uint32_t packed) {
  return {to_float(T{static_cast<uint16_t>(packed & 0xffffu)}),
          to_float(T{static_cast<uint16_t>(packed >> 16)})};
}

template <class T>
uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  const auto half = [&](int i) {
    using emulation::element;
    const double sum = element<T>(a, i) * element<T>(b, i) + element<T>(c, i);
    return uint32_t{from_float<T>(static_cast<float>(sum)).bits};
  };
  return half(0) | half(1) << 16;
}

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

#if !defined(NBL_HAS_FP8_CONVERSION)
#define NBL_HAS_FP8_CONVERSION 0
#endif
constexpr bool kHasFp8Conversion = NBL_HAS_FP8_CONVERSION;

inline uint32_t fp8_to_half2(uint32_t bytes) {
  const auto half = [&](int i) {
    const float8_e4m3 number{static_cast<uint8_t>(bytes >> (8 * i))};
    return uint32_t{from_float<float16>(to_float(number)).bits};
  };
  return half(0) | half(1) << 16;
}

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> (4 * i) & 15;
    emulation::require(digit < 8, "a byte that is not there");
    picked |= static_cast<uint32_t>(bytes >> (8 * digit) & 255) << (8 * i);
  }
  return picked;
}

inline float rsqrt_approx(float value) { return 1.0f / std::sqrt(value); }

}  // namespace nbl
