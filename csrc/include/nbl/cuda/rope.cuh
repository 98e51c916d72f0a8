// rope_append: what it computes stands in ../rope.h.
//
//   a head      [ a           | b           | rest      ]   a and b: `half` long
//   its lanes   [ 0 1 2 … 7   | 0 1 2 … 7   | 0 1 2 …   ]   16 bytes each, in turns where there
//                                                           are more
//
// A copy with a little arithmetic: every head of q, k and v is read once and written once. A group
// of lanes, as many as half a head has granules of 16 bytes (a power of two), takes one head, so
// that a lane holds both elements of a pair and nothing moves between lanes but Σ x². Consecutive
// groups take consecutive heads; those of a token find its row of cos and sin in the L1 cache.
//
// A decode step has so little to do that all of it is waiting for memory. So x is asked for
// together with its token's position and slot, before these have come; the row of cos and sin that
// they name is the second wait and the last. (RMSNorm adds x once more, from L1.)
//
// A token out of range (nobody waits on the host to look) reads no row of cos and sin and writes
// nothing to the caches; its q is NaN.
#pragma once

#include "nbl/cuda/row_ops.cuh"
#include "nbl/rope.h"

namespace nbl {

constexpr int kRopeThreads = 128;

struct RopeLaunch {
  RopeParams rope;
  int lane_bits;   // of a group: 1 << lane_bits lanes take a head
  uint32_t heads;  // of all tokens: of q, k and v
};

template <class T>
NBL_DEVICE T element_of(uint32_t bits) {
  return {static_cast<uint16_t>(bits)};
}

template <>
NBL_DEVICE float element_of<float>(uint32_t bits) {
  return bits_to_float(bits);
}

// The inverse of load_granule.
template <class T, bool kVector>
NBL_DEVICE void store_bits(T* row, int k, int end, const Bytes16& granule) {
  if constexpr (kVector) {
    store_16(row + k, granule);
  } else {
    constexpr int kPerWord = kGranule<T> / 4;
#pragma unroll
    for (int i = 0; i < kGranule<T>; ++i) {
      if (k + i < end) {
        row[k + i] = element_of<T>(granule.word[i / kPerWord] >> (i % kPerWord * 16));
      }
    }
  }
}

// As many angles as a granule of T has elements.
template <class T>
struct Angles {
  Bytes16 part[kGranule<T> / 4];

  template <bool kVector>
  NBL_DEVICE void load(const float* row, int k, int end) {
#pragma unroll
    for (int i = 0; i < kGranule<T> / 4; ++i) {
      part[i] = load_granule<float, kVector>(row, k + 4 * i, end);
    }
  }

  NBL_DEVICE float operator[](int i) const { return bits_to_float(part[i / 4].word[i % 4]); }
};

// What a head is multiplied by before it is rotated.
template <class T, bool kVector>
struct HeadNorm {
  const T* weight;  // or null
  float scale;

  NBL_DEVICE Bytes16 load(int k, int end) const {
    Bytes16 granule = {};
    if (weight) granule = load_granule<T, kVector>(weight, k, end);
    return granule;
  }

  NBL_DEVICE void apply(const Bytes16& x, const Bytes16& gamma, float (&v)[kGranule<T>]) const {
    unpack<T>(x, v);
    if (!weight) return;
    float g[kGranule<T>];
    unpack<T>(gamma, g);
#pragma unroll
    for (int i = 0; i < kGranule<T>; ++i) v[i] = v[i] * scale * g[i];
  }
};

// Grid: rope_blocks(launch), kRopeThreads threads. kVector: rope_vectors(p).
template <class T, bool kVector>
__global__ void __launch_bounds__(kRopeThreads) rope_append(NBL_PARAM RopeLaunch launch) {
  constexpr int kElements = kGranule<T>;
  const RopeParams& p = launch.rope;
  const int lanes = 1 << launch.lane_bits, lane = threadIdx.x & (lanes - 1);
  const int dim = static_cast<int>(p.head_dim), half = static_cast<int>(p.half);
  const int step = lanes * kElements;
  const uint32_t group =
      blockIdx.x * (kRopeThreads >> launch.lane_bits) + (threadIdx.x >> launch.lane_bits);
  const bool exists = group < launch.heads;  // if not: the last head once more, not written
  const uint32_t number = exists ? group : launch.heads - 1;
  const uint32_t heads = static_cast<uint32_t>(p.heads + 2 * p.kv_heads);
  const uint32_t token = number / heads, tokens = static_cast<uint32_t>(p.tokens);
  const int64_t head = number % heads, b = token / tokens, t = token % tokens;
  const T* x = static_cast<const T*>(p.qkv) + b * p.qkv_strides[0] + t * p.qkv_strides[1] +
               head * p.qkv_strides[2];
  grid_dependency_wait();
  grid_dependency_launch();

  const int64_t position = p.positions[b * p.position_strides[0] + t * p.position_strides[1]];
  const int64_t slot = p.slots[b * p.slot_strides[0] + t * p.slot_strides[1]];
  int k = lane * kElements;
  Bytes16 first = load_granule<T, kVector>(x, k, half);
  Bytes16 second = load_granule<T, kVector>(x, half + k, 2 * half);

  const int64_t key = head - p.heads, value = key - p.kv_heads;  // negative: not one of them
  HeadNorm<T, kVector> norm{nullptr, 1.0f};
  if (value < 0) norm.weight = static_cast<const T*>(key < 0 ? p.q_norm_weight : p.k_norm_weight);
  if (p.q_norm_weight || p.k_norm_weight) {  // all lanes of the warp: they meet in the shuffles
    float sum = sum_of_squares<T, kVector>(x, dim, lane, lanes);
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    norm.scale = norm_scale(sum, dim, p.norm_eps);
  }

  const bool in_range = position >= 0 && position < p.num_positions && slot < p.num_slots;
  if (!exists || (key >= 0 && (!in_range || slot < 0))) return;
  const float* cos = p.cos + (in_range ? position : 0) * p.cos_stride;
  const float* sin = p.sin + (in_range ? position : 0) * p.sin_stride;
  T* out;
  if (key < 0) {
    out = static_cast<T*>(p.q) + b * p.q_strides[0] + head * p.q_strides[1] + t * p.q_strides[2];
  } else if (value < 0) {
    out = static_cast<T*>(p.keys) + b * p.key_strides[0] + key * p.key_strides[1] +
          slot * p.key_strides[2];
  } else {
    out = static_cast<T*>(p.values) + b * p.value_strides[0] + value * p.value_strides[1] +
          slot * p.value_strides[2];
  }
  const auto finish = [&](int at, int end, float (&v)[kElements]) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) v[i] = in_range ? v[i] : bits_to_float(0x7fc00000u);
    store_bits<T, kVector>(out, at, end, pack<T>(v));
  };

  for (; k < half; k += step) {
    if (value < 0) {
      Angles<T> c, s;
      c.template load<kVector>(cos, k, in_range ? half : 0);
      s.template load<kVector>(sin, k, in_range ? half : 0);
      const Bytes16 gamma_first = norm.load(k, half), gamma_second = norm.load(half + k, 2 * half);
      float u[kElements], v[kElements];
      norm.apply(first, gamma_first, u);
      norm.apply(second, gamma_second, v);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const float rotated = fmaf(u[i], c[i], -(v[i] * s[i]));  // the same in every instance
        v[i] = fmaf(v[i], c[i], u[i] * s[i]);
        u[i] = rotated;
      }
      finish(k, half, u);
      finish(half + k, 2 * half, v);
    } else {
      store_bits<T, kVector>(out, k, half, first);
      store_bits<T, kVector>(out, half + k, 2 * half, second);
    }
    first = load_granule<T, kVector>(x, k + step, half);
    second = load_granule<T, kVector>(x, half + k + step, 2 * half);
  }
  for (k = 2 * half + lane * kElements; k < dim; k += step) {
    const Bytes16 rest = load_granule<T, kVector>(x, k, dim);
    if (value < 0) {
      float v[kElements];
      norm.apply(rest, norm.load(k, dim), v);
      finish(k, dim, v);
    } else {
      store_bits<T, kVector>(out, k, dim, rest);
    }
  }
}

#if !defined(__CUDACC_RTC__)  // the host's part

// Whether all that the kernel reads and writes is whole granules at multiples of 16 bytes.
inline bool rope_vectors(const RopeParams& p, int64_t element) {
  const auto at_16 = [](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0;
  };
  const auto steps_of_16 = [&](const int64_t (&strides)[3], int64_t n0, int64_t n1, int64_t n2) {
    const int64_t sizes[3] = {n0, n1, n2};
    for (int i = 0; i < 3; ++i)
      if (sizes[i] > 1 && strides[i] * element % 16 != 0) return false;
    return true;
  };
  const int64_t float_size = sizeof(float);
  const bool rows = p.num_positions <= 1 ||
                    (p.cos_stride * float_size % 16 == 0 && p.sin_stride * float_size % 16 == 0);
  return p.head_dim * element % 16 == 0 && p.half * element % 16 == 0 && at_16(p.qkv) &&
         at_16(p.cos) && at_16(p.sin) && rows && at_16(p.q_norm_weight) && at_16(p.k_norm_weight) &&
         at_16(p.q) && at_16(p.keys) && at_16(p.values) &&
         steps_of_16(p.qkv_strides, p.batch, p.tokens, p.heads + 2 * p.kv_heads) &&
         steps_of_16(p.q_strides, p.batch, p.heads, p.tokens) &&
         steps_of_16(p.key_strides, p.batch, p.kv_heads, p.num_slots) &&
         steps_of_16(p.value_strides, p.batch, p.kv_heads, p.num_slots);
}

// The numbers that the kernel keeps in 32 bits.
inline bool rope_fits(const RopeParams& p) {
  constexpr int64_t kMost = int64_t{1} << 31;
  return p.head_dim < kMost / 2 &&
         p.batch * p.tokens < kMost / (p.heads + 2 * p.kv_heads) - kRopeThreads;
}

inline RopeLaunch rope_launch(const RopeParams& p, int64_t element) {
  RopeLaunch launch{p, 0, static_cast<uint32_t>(p.batch * p.tokens * (p.heads + 2 * p.kv_heads))};
  while (launch.lane_bits < 5 && (int64_t{32} << launch.lane_bits) < p.head_dim * element)
    ++launch.lane_bits;
  return launch;
}

inline unsigned rope_blocks(const RopeLaunch& launch) {
  const unsigned per_block = kRopeThreads >> launch.lane_bits;
  return (launch.heads + per_block - 1) / per_block;
}

#endif  // __CUDACC_RTC__

}  // namespace nbl
