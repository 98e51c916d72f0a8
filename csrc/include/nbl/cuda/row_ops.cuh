// What surrounds a matrix product of many rows: RMSNorm before it, silu(gate) · up after it.
//
//   rms_norm_rows   out[i] = x[i] / sqrt(mean(x[i]²) + eps) · γ        one rounding, at the end
//   silu_mul_rows   out[i] = silu(gate_up[i, :n]) · gate_up[i, n:]     one rounding, at the end
//   dequantize_rows out[i] = quantized weight[i] · its scales          one rounding, at the end
//
// One block per row. A thread takes every kRowThreads-th granule of 16 bytes, the widest access
// there is; rms_norm_rows reads a row twice, the second time from the cache. Where 16-byte accesses
// are not possible (kVector false: odd sizes, odd addresses) a granule is gathered by elements.
#pragma once

#include "nbl/cuda/ptx.cuh"
#include "nbl/cuda/weight_formats.cuh"

namespace nbl {

// ---- Granules: 16 bytes of a row, as floats ----------------------------------------------------

template <class T>
constexpr int kGranule = 16 / static_cast<int>(sizeof(T));  // elements

template <class T>
NBL_DEVICE void unpack(const Bytes16& granule, float (&values)[kGranule<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Float2 pair = unpack2<T>(granule.word[i]);
    values[2 * i] = pair.lo;
    values[2 * i + 1] = pair.hi;
  }
}

template <>
NBL_DEVICE void unpack<float>(const Bytes16& granule, float (&values)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = bits_to_float(granule.word[i]);
}

template <class T, int kCount, int kValues>
NBL_DEVICE void unpack_all(const Bytes16 (&granules)[kCount], float (&values)[kValues]) {
  static_assert(kValues == kCount * kGranule<T>, "as many values as the granules hold");
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float part[kGranule<T>];
    unpack<T>(granules[i], part);
#pragma unroll
    for (int e = 0; e < kGranule<T>; ++e) values[i * kGranule<T> + e] = part[e];
  }
}

template <class T>
NBL_DEVICE Bytes16 pack(const float (&values)[kGranule<T>]) {
  Bytes16 granule;
#pragma unroll
  for (int i = 0; i < 4; ++i) granule.word[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
  return granule;
}

template <>
NBL_DEVICE Bytes16 pack<float>(const float (&values)[4]) {
  Bytes16 granule;
#pragma unroll
  for (int i = 0; i < 4; ++i) granule.word[i] = float_to_bits(values[i]);
  return granule;
}

NBL_DEVICE uint32_t element_bits(float value) { return float_to_bits(value); }
NBL_DEVICE uint32_t element_bits(bfloat16 value) { return value.bits; }
NBL_DEVICE uint32_t element_bits(float16 value) { return value.bits; }
NBL_DEVICE uint32_t element_bits(uint8_t value) { return value; }

// The granule row[k … k + kGranule), zeros from `end` on, gathered by elements.
template <class T>
NBL_DEVICE Bytes16 gather(const T* row, int k, int end) {
  constexpr int kPerWord = kGranule<T> / 4;
  Bytes16 granule = {};
#pragma unroll
  for (int i = 0; i < kGranule<T>; ++i) {
    if (k + i < end) {
      granule.word[i / kPerWord] |= element_bits(row[k + i]) << (i % kPerWord * (32 / kPerWord));
    }
  }
  return granule;
}

// The same. Where kVector, `end` is a multiple of kGranule, and every row starts at one of 16
// bytes.
template <class T, bool kVector>
NBL_DEVICE Bytes16 load_granule(const T* row, int k, int end) {
  if constexpr (kVector) {
    Bytes16 granule = {};
    if (k < end) granule = load_16(row + k);
    return granule;
  } else {
    return gather(row, k, end);
  }
}

template <class T, bool kVector>
NBL_DEVICE void store_granule(T* row, int k, int end, const float (&values)[kGranule<T>]) {
  if constexpr (kVector) {
    store_16(row + k, pack<T>(values));
  } else {
#pragma unroll
    for (int i = 0; i < kGranule<T>; ++i) {
      if (k + i < end) row[k + i] = from_float<T>(values[i]);
    }
  }
}

// Σ x² over the granules first, first + step, … of a row of k elements.
template <class T, bool kVector>
NBL_DEVICE float sum_of_squares(const T* row, int k, int first, int step) {
  float sum = 0.0f;
#pragma unroll 4
  for (int i = first * kGranule<T>; i < k; i += step * kGranule<T>) {
    float x[kGranule<T>];
    unpack<T>(load_granule<T, kVector>(row, i, k), x);
#pragma unroll
    for (int j = 0; j < kGranule<T>; ++j) sum += x[j] * x[j];
  }
  return sum;
}

NBL_DEVICE float sum_over_warp(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) value += shuffle_xor(value, mask);
  return value;
}

// 1 / sqrt(mean(x²) + eps); for rows without elements, whose products are zero, any finite number.
NBL_DEVICE float norm_scale(float sum_of_squares, int k, float eps) {
  return rsqrt_approx(sum_of_squares / static_cast<float>(k > 0 ? k : 1) + eps);
}

NBL_DEVICE float silu(float value) { return value / (1.0f + expf(-value)); }

// ---- Kernels -----------------------------------------------------------------------------------

constexpr int kRowThreads = 256;
constexpr int kNormRowsSharedBytes = kRowThreads / 32 * sizeof(float);

struct NormRowsParams {
  const void* x;            // (rows, k), last dimension contiguous
  int64_t x_stride;         // elements
  const void* norm_weight;  // (k)
  float norm_eps;
  void* out;  // (rows, k)
  int64_t out_stride;
  int k;
};

// Grid: one block of kRowThreads per row. Shared memory: kNormRowsSharedBytes.
template <class T, bool kVector>
__global__ void __launch_bounds__(kRowThreads) rms_norm_rows(NBL_PARAM NormRowsParams p) {
  const int thread = threadIdx.x;
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* norm_weight = static_cast<const T*>(p.norm_weight);
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  grid_dependency_wait();
  grid_dependency_launch();

  float* warp_sums = reinterpret_cast<float*>(shared_memory());
  const float sum = sum_over_warp(sum_of_squares<T, kVector>(x, p.k, thread, kRowThreads));
  if (thread % 32 == 0) warp_sums[thread / 32] = sum;
  sync_block();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kRowThreads / 32; ++warp) total += warp_sums[warp];
  const float scale = norm_scale(total, p.k, p.norm_eps);

  for (int k = thread * kGranule<T>; k < p.k; k += kRowThreads * kGranule<T>) {
    float v[kGranule<T>], gamma[kGranule<T>];
    unpack<T>(load_granule<T, kVector>(x, k, p.k), v);
    unpack<T>(load_granule<T, kVector>(norm_weight, k, p.k), gamma);
#pragma unroll
    for (int i = 0; i < kGranule<T>; ++i) v[i] = v[i] * scale * gamma[i];
    store_granule<T, kVector>(out, k, p.k, v);
  }
}

struct SiluMulParams {
  const void* gate_up;  // (rows, 2n): n gates, then n ups
  int64_t gate_up_stride;
  void* out;  // (rows, n)
  int64_t out_stride;
  int n;
};

// Grid: one block of kRowThreads per row. kVector: n too is a multiple of a granule.
template <class T, bool kVector>
__global__ void __launch_bounds__(kRowThreads) silu_mul_rows(NBL_PARAM SiluMulParams p) {
  const int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(p.gate_up) + row * p.gate_up_stride;
  const T* up = gate + p.n;
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  grid_dependency_wait();
  grid_dependency_launch();
  for (int n = threadIdx.x * kGranule<T>; n < p.n; n += kRowThreads * kGranule<T>) {
    float g[kGranule<T>], u[kGranule<T>];
    unpack<T>(load_granule<T, kVector>(gate, n, p.n), g);
    unpack<T>(load_granule<T, kVector>(up, n, p.n), u);
#pragma unroll
    for (int i = 0; i < kGranule<T>; ++i) g[i] = silu(g[i]) * u[i];
    store_granule<T, kVector>(out, n, p.n, g);
  }
}

struct DequantizeParams {
  const void* weight;        // (rows, k) of W; int4: (rows, 64 · ceil(k / 128)) bytes
  int64_t weight_stride;     // bytes
  const void* weight_scale;  // float32 (rows); int4: bfloat16 (rows, ceil(k / 128))
  bool vector;               // all rows of the weight allow 16-byte loads
  void* out;                 // (rows, k) of T
  int64_t out_stride;        // elements, a multiple of 8: what is past k may be written
  int k;
};

// Grid: one block of kRowThreads per row. T: bfloat16 or float16.
template <class T, class W>
__global__ void __launch_bounds__(kRowThreads) dequantize_rows(NBL_PARAM DequantizeParams p) {
  constexpr bool kGroups = sizeof(W) > 1;
  constexpr int kParts = kGroups ? 4 : 2, kPartStride = kGroups ? 32 : 8;
  const int64_t row = blockIdx.x;
  const int groups = (p.k + int{kInt4Group} - 1) / int{kInt4Group};
  const int bytes = kGroups ? groups * int{sizeof(int4_group)} : p.k;
  const uint8_t* weight = static_cast<const uint8_t*>(p.weight) + row * p.weight_stride;
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  grid_dependency_wait();
  grid_dependency_launch();
  for (int i = threadIdx.x * 16; i < bytes; i += kRowThreads * 16) {
    const Bytes16 granule = p.vector ? load_streaming(weight + i) : gather(weight, i, bytes);
    int first = i;  // the k of its first weight
    float scale;
    if constexpr (kGroups) {
      first = i / 64 * int{kInt4Group} + i % 64 / 2;
      scale = to_float(static_cast<const bfloat16*>(p.weight_scale)[row * groups + i / 64]);
    } else {
      scale = static_cast<const float*>(p.weight_scale)[row];
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int k = first + part * kPartStride;
      if (k < p.k) {
        float v[8];
        unpack<float16>(widen<float16>(W{}, granule, part), v);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] *= scale;
        store_16(out + k, pack<T>(v));
      }
    }
  }
}

}  // namespace nbl
