// memory_scan's filter: what it computes stands in ../memory.h.
//
//   tokens of a sequence   [ chunk 0 | chunk 1 | … | the last chunk ]   kMemoryChunk each
//   memory_ends            entry 0: the state before the call; entry i: what chunk i - 1, begun
//   with
//                          nothing remembered, leaves, and how many of its tokens are there
//   memory_filter          chunk i begins with the entries 0 … i, one after another joined:
//                          average = a^count · what it was before + the entry's
//                          lag     = the entry's newest `count`, then what was there before
//
// A thread takes one channel through the tokens of a chunk; its state is in registers. Up to one
// chunk (decode) there are no entries and one launch: the state is read and written in place. With
// more, the last chunk writes the state, which nobody reads any more: entry 0 has been copied.
//
// The state waits for no load but its own: the numbers of kMemoryAhead tokens are asked for at once
// and wait in shared memory, each thread's own part, so that nobody has to be waited for.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cmath>
#endif

#include "nbl/cuda/ptx.cuh"
#include "nbl/memory.h"

namespace nbl {

constexpr int kMemoryThreads = 64;
constexpr int kMemoryChunk = 64;    // tokens
constexpr int kMemoryAhead = 8;     // tokens
constexpr int kEntriesAhead = 4;    // asked for at once
constexpr int kNothingBefore = -1;  // a count: the chunk holds the start of a sequence

struct MemoryLaunch {
  MemoryParams memory;
  int branches, lag_slots;  // the slots of averages follow those of lags
  int branch[kMostSlots];   // whose numbers go to a slot
  int depth[kMostSlots];    // of the slot in its lag: 0 is the newest
  bool oldest[kMostSlots];  // of its lag
  float decay[kMostSlots], log2_decay[kMostSlots], news[kMostSlots];
  uint32_t tiles, chunks;
  float* entries;   // (batch, chunks, num_slots, channels), or null: there are none
  int32_t* counts;  // (batch, chunks)
};

using MemorySlots = float[kMostSlots];

template <class T>
NBL_DEVICE float widened(T value) {
  if constexpr (sizeof(T) == 4)
    return value;
  else
    return unpack2<T>(value.bits).lo;
}

template <class T>
NBL_DEVICE T narrowed(float value) {
  if constexpr (sizeof(T) == 4)
    return value;
  else
    return {static_cast<uint16_t>(pack2<T>(value, 0.0f))};
}

// c after one token of numbers g, kMemoryThreads apart.
NBL_DEVICE float remember(const MemoryLaunch& launch, const float* g, MemorySlots& slots) {
  float c = g[0];
#pragma unroll
  for (int i = 0; i < kMostSlots; ++i)
    if (i < launch.lag_slots && launch.oldest[i]) c += slots[i];
#pragma unroll
  for (int i = kMostSlots - 1; i >= 0; --i) {
    if (i < launch.lag_slots) {
      const bool newest = launch.depth[i] == 0;
      slots[i] = newest ? g[launch.branch[i] * kMemoryThreads] : slots[i > 0 ? i - 1 : 0];
    }
  }
#pragma unroll
  for (int i = 0; i < kMostSlots; ++i) {
    if (i >= launch.lag_slots && i < launch.memory.num_slots) {
      const float news = launch.news[i] * g[launch.branch[i] * kMemoryThreads];
      slots[i] = fmaf(launch.decay[i], slots[i], news);
      c += slots[i];
    }
  }
  return c;
}

// slots = what they are after `count` more tokens, which alone would leave `entry`. (All indices
// are constants: an array that is indexed by a variable would live in memory.)
NBL_DEVICE void join(const MemoryLaunch& launch, const MemorySlots& entry, int count,
                     MemorySlots& slots) {
  const bool forgets = count == kNothingBefore;
#pragma unroll 1
  for (int moved = 0; moved < count && moved < kMostSlots; ++moved) {
#pragma unroll
    for (int i = kMostSlots - 1; i > 0; --i)
      if (i < launch.lag_slots && launch.depth[i] > 0) slots[i] = slots[i - 1];
  }
#pragma unroll
  for (int i = 0; i < kMostSlots; ++i) {
    if (forgets || (i < launch.lag_slots && launch.depth[i] < count)) {
      slots[i] = entry[i];
    } else if (i >= launch.lag_slots && i < launch.memory.num_slots) {
      const float fading = exp2f(launch.log2_decay[i] * static_cast<float>(count));
      slots[i] = fmaf(fading, slots[i], entry[i]);
    }
  }
}

NBL_DEVICE void load_slots(const MemoryLaunch& launch, const float* from, int64_t stride,
                           MemorySlots& slots) {
#pragma unroll
  for (int i = 0; i < kMostSlots; ++i)
    slots[i] = i < launch.memory.num_slots ? from[i * stride] : 0.0f;
}

NBL_DEVICE void store_slots(const MemoryLaunch& launch, const MemorySlots& slots, float* to,
                            int64_t stride) {
#pragma unroll
  for (int i = 0; i < kMostSlots; ++i)
    if (i < launch.memory.num_slots) to[i * stride] = slots[i];
}

// Which channel of which chunk of which sequence a thread takes.
struct MemoryPlace {
  int64_t b, channel;
  uint32_t chunk;

  NBL_DEVICE explicit MemoryPlace(const MemoryLaunch& launch) {
    const uint32_t row = blockIdx.x / launch.tiles;
    b = row / launch.chunks;
    chunk = row % launch.chunks;
    channel = int64_t{blockIdx.x % launch.tiles} * kMemoryThreads + threadIdx.x;
  }

  NBL_DEVICE int64_t entry_row(const MemoryLaunch& launch, uint32_t number) const {
    return b * launch.chunks + number;
  }

  NBL_DEVICE float* entry(const MemoryLaunch& launch, uint32_t number) const {
    const MemoryParams& p = launch.memory;
    return launch.entries + entry_row(launch, number) * p.num_slots * p.channels + channel;
  }
};

// Takes the state through the tokens of a chunk; returns how many are there. kOut: writes the
// results.
template <class T, bool kOut>
NBL_DEVICE int scan_chunk(const MemoryLaunch& launch, const MemoryPlace& at, uint32_t chunk,
                          MemorySlots& slots) {
  const MemoryParams& p = launch.memory;
  float* mine = reinterpret_cast<float*>(shared_memory()) + threadIdx.x;
  const T* bias = static_cast<const T*>(p.bias);
  const T* residual = static_cast<const T*>(p.residual);
  const int64_t begin = int64_t{chunk} * kMemoryChunk;
  const int64_t end = begin + kMemoryChunk < p.tokens ? begin + kMemoryChunk : p.tokens;
  int count = 0;
  for (int64_t first = begin; first < end; first += kMemoryAhead) {
    const int ahead = static_cast<int>(end - first < kMemoryAhead ? end - first : kMemoryAhead);
    const T* g = static_cast<const T*>(p.g) +
                 (at.b * p.tokens + first) * launch.branches * p.channels + at.channel;
#pragma unroll 8
    for (int i = 0; i < ahead * launch.branches; ++i)
      mine[i * kMemoryThreads] = widened(g[i * p.channels]);

    for (int i = 0; i < ahead; ++i) {
      const int64_t t = first + i, token = at.b * p.tokens + t;
      const bool there = !p.mask || p.mask[at.b * p.mask_strides[0] + t * p.mask_strides[1]];
      float c = 0.0f;
      if (there) {
        if (p.starts && p.starts[at.b * p.start_strides[0] + t * p.start_strides[1]]) {
#pragma unroll
          for (int s = 0; s < kMostSlots; ++s) slots[s] = 0.0f;
          count = kNothingBefore;
        }
        if (count != kNothingBefore) ++count;
        c = remember(launch, mine + i * launch.branches * kMemoryThreads, slots);
      }
      if constexpr (kOut) {
        if (bias) c += widened(bias[at.channel]);
        if (residual) c = widened(residual[token * p.residual_stride + at.channel]) + c;
        static_cast<T*>(p.out)[token * p.channels + at.channel] = narrowed<T>(c);
        const int64_t kept = t - (p.tokens - p.history_tokens);
        if (kept >= 0) {
          float* after =
              p.history + at.b * p.history_strides[0] + kept * p.history_strides[1] + at.channel;
          store_slots(launch, slots, after, p.history_strides[2]);
        }
      }
    }
  }
  return count;
}

// Grid: memory_blocks(launch), kMemoryThreads threads; shared memory: memory_shared_bytes(launch).
template <class T>
__global__ void __launch_bounds__(kMemoryThreads) memory_ends(NBL_PARAM MemoryLaunch launch) {
  const MemoryParams& p = launch.memory;
  const MemoryPlace at(launch);
  grid_dependency_wait();
  grid_dependency_launch();
  if (at.channel >= p.channels) return;
  MemorySlots slots = {};
  int count = 0;
  if (at.chunk == 0)
    load_slots(launch, p.state + at.b * p.state_strides[0] + at.channel, p.state_strides[1], slots);
  else
    count = scan_chunk<T, false>(launch, at, at.chunk - 1, slots);
  store_slots(launch, slots, at.entry(launch, at.chunk), p.channels);
  if (at.channel == 0) launch.counts[at.entry_row(launch, at.chunk)] = count;
}

// The same grid. After memory_ends where there are entries.
template <class T>
__global__ void __launch_bounds__(kMemoryThreads) memory_filter(NBL_PARAM MemoryLaunch launch) {
  const MemoryParams& p = launch.memory;
  const MemoryPlace at(launch);
  grid_dependency_wait();
  grid_dependency_launch();
  if (at.channel >= p.channels) return;
  float* state = p.state + at.b * p.state_strides[0] + at.channel;
  MemorySlots slots;
  if (launch.entries) {
    load_slots(launch, at.entry(launch, 0), p.channels, slots);
    for (uint32_t first = 1; first <= at.chunk; first += kEntriesAhead) {
      MemorySlots entries[kEntriesAhead];
      int counts[kEntriesAhead];
#pragma unroll
      for (int i = 0; i < kEntriesAhead; ++i) {
        const uint32_t number = first + i <= at.chunk ? first + i : at.chunk;
        load_slots(launch, at.entry(launch, number), p.channels, entries[i]);
        counts[i] = launch.counts[at.entry_row(launch, number)];
      }
#pragma unroll
      for (int i = 0; i < kEntriesAhead; ++i)
        if (first + i <= at.chunk) join(launch, entries[i], counts[i], slots);
    }
  } else {
    load_slots(launch, state, p.state_strides[1], slots);
  }
  scan_chunk<T, true>(launch, at, at.chunk, slots);
  if (at.chunk + 1 == launch.chunks) store_slots(launch, slots, state, p.state_strides[1]);
}

#if !defined(__CUDACC_RTC__)  // the host's part

inline int64_t memory_chunks(int64_t tokens) { return (tokens + kMemoryChunk - 1) / kMemoryChunk; }

inline int64_t memory_tiles(int64_t channels) {
  return (channels + kMemoryThreads - 1) / kMemoryThreads;
}

// The numbers that the kernels keep in 32 bits.
inline bool memory_fits(const MemoryParams& p) {
  constexpr int64_t kMost = int64_t{1} << 31;
  const int64_t chunks = memory_chunks(p.tokens), tiles = memory_tiles(p.channels);
  return chunks < kMost && tiles < kMost && chunks * tiles < kMost &&
         p.batch < kMost / (chunks * tiles);
}

// Floats between the launches, and a count for each of batch · chunks; 0: there is one launch only.
inline int64_t memory_entries(const MemoryParams& p) {
  const int64_t chunks = memory_chunks(p.tokens);
  return chunks > 1 ? p.batch * chunks * p.num_slots * p.channels : 0;
}

// Entries and counts are to be filled in where there are any.
inline MemoryLaunch memory_launch(const MemoryParams& p) {
  MemoryLaunch launch{};
  launch.memory = p;
  launch.branches = 1 + p.num_lags + p.num_decays;
  int slot = 0;
  for (int i = 0; i < p.num_lags; ++i) {
    for (int depth = 0; depth < p.lags[i]; ++depth, ++slot) {
      launch.branch[slot] = 1 + i;
      launch.depth[slot] = depth;
      launch.oldest[slot] = depth == p.lags[i] - 1;
    }
  }
  launch.lag_slots = slot;
  for (int i = 0; i < p.num_decays; ++i, ++slot) {
    launch.branch[slot] = 1 + p.num_lags + i;
    launch.decay[slot] = p.decays[i];
    launch.log2_decay[slot] = static_cast<float>(std::log2(static_cast<double>(p.decays[i])));
    launch.news[slot] = p.news[i];
  }
  launch.tiles = static_cast<uint32_t>(memory_tiles(p.channels));
  launch.chunks = static_cast<uint32_t>(memory_chunks(p.tokens));
  return launch;
}

inline unsigned memory_blocks(const MemoryLaunch& launch) {
  return static_cast<unsigned>(launch.memory.batch) * launch.chunks * launch.tiles;
}

inline int memory_shared_bytes(const MemoryLaunch& launch) {
  return kMemoryAhead * launch.branches * kMemoryThreads * static_cast<int>(sizeof(float));
}

#endif  // __CUDACC_RTC__

}  // namespace nbl
