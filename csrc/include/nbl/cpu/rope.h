// rope_append on the CPU: one token after another, so that its qkv is read once and its row of cos
// and sin stays in the first-level cache for all heads. What it computes: ../rope.h.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace nbl {
namespace NBL_ISA {

// A head, or its normalization, read vector by vector.
template <class T>
struct RopeHead {
  const T* x;
  const T* norm_weight;  // or null
  Vec scale;

  RopeHead(const T* x, const T* norm_weight, float eps, int64_t dim)
      : x(x), norm_weight(norm_weight), scale(Vec::zero()) {
    if (!norm_weight) return;
    Vec squares = Vec::zero();
    for (int64_t i = 0; i < dim; i += Vec::kWidth) {
      const Vec v = load_some(x + i, dim - i);
      squares = fma(v, v, squares);
    }
    scale = Vec::broadcast(1.0f / std::sqrt(squares.sum() / static_cast<float>(dim) + eps));
  }

  // x[i …], zeros from `left` elements on.
  Vec load(int64_t i, int64_t left) const {
    const Vec v = load_some(x + i, left);
    return norm_weight ? v * scale * load_some(norm_weight + i, left) : v;
  }
};

template <class T>
void rotate_head(const RopeHead<T>& head, const float* cos, const float* sin, int64_t half,
                 int64_t dim, T* out) {
  for (int64_t i = 0; i < half; i += Vec::kWidth) {
    const int64_t left = half - i;
    const Vec a = head.load(i, left), b = head.load(half + i, left);
    const Vec c = load_some(cos + i, left), s = load_some(sin + i, left);
    store_some(a * c - b * s, out + i, left);
    store_some(b * c + a * s, out + half + i, left);
  }
  for (int64_t i = 2 * half; i < dim; i += Vec::kWidth)
    store_some(head.load(i, dim - i), out + i, dim - i);
}

// Tokens begin to end of batch · tokens; positions and slots are within their ranges.
template <class T>
void rope_append(const RopeParams& p, int64_t begin, int64_t end) {
  const T* q_norm = static_cast<const T*>(p.q_norm_weight);
  const T* k_norm = static_cast<const T*>(p.k_norm_weight);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.tokens, t = token % p.tokens;
    const int64_t position = p.positions[b * p.position_strides[0] + t * p.position_strides[1]];
    const int64_t slot = p.slots[b * p.slot_strides[0] + t * p.slot_strides[1]];
    const float* cos = p.cos + position * p.cos_stride;
    const float* sin = p.sin + position * p.sin_stride;
    const T* x = static_cast<const T*>(p.qkv) + b * p.qkv_strides[0] + t * p.qkv_strides[1];
    T* q = static_cast<T*>(p.q) + b * p.q_strides[0] + t * p.q_strides[2];
    for (int64_t h = 0; h < p.heads; ++h, x += p.qkv_strides[2]) {
      const RopeHead<T> head(x, q_norm, p.norm_eps, p.head_dim);
      rotate_head(head, cos, sin, p.half, p.head_dim, q + h * p.q_strides[1]);
    }
    if (slot < 0) continue;
    T* key = static_cast<T*>(p.keys) + b * p.key_strides[0] + slot * p.key_strides[2];
    for (int64_t h = 0; h < p.kv_heads; ++h, x += p.qkv_strides[2]) {
      const RopeHead<T> head(x, k_norm, p.norm_eps, p.head_dim);
      rotate_head(head, cos, sin, p.half, p.head_dim, key + h * p.key_strides[1]);
    }
    T* value = static_cast<T*>(p.values) + b * p.value_strides[0] + slot * p.value_strides[2];
    for (int64_t h = 0; h < p.kv_heads; ++h, x += p.qkv_strides[2])
      std::memcpy(value + h * p.value_strides[1], x, p.head_dim * sizeof(T));
  }
}

}  // namespace NBL_ISA
}  // namespace nbl
