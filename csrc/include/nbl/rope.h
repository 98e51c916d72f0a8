// The parameters of rope_append, for the CPU and the CUDA kernel alike: raw pointers and sizes.
//
//   x = the heads of q and of k of a token, each times RMSNorm where a norm weight is given
//   rotated x    [a | b | rest] -> [a cos - b sin | b cos + a sin | rest],  a and b `half` long,
//                with the row of cos and sin that the token's position names ("half rotation", as
//                in Hugging Face's Llama; rest: what partial rotary embeddings leave alone)
//   q[b, h, t] = rotated q head;  keys[b, h, slot] = rotated k head;  values[b, h, slot] = v head
//
// float32 arithmetic, one rounding at the end. A token whose slot is negative is not written to the
// caches. Strides are in elements; last dimensions are contiguous.
#pragma once

#include "dtypes.h"

namespace nbl {

struct RopeParams {
  const void* qkv;         // (batch, tokens, heads + 2 kv_heads, head_dim): q, then k, then v
  int64_t qkv_strides[3];  // of batch, token, head
  const float *cos, *sin;  // (num_positions, half)
  int64_t cos_stride, sin_stride;
  const int64_t *positions, *slots;  // (batch, tokens)
  int64_t position_strides[2], slot_strides[2];
  const void *q_norm_weight, *k_norm_weight;  // (head_dim), or null: no normalization
  float norm_eps;
  void* q;                   // (batch, heads, tokens, head_dim)
  int64_t q_strides[3];      // of batch, head, token
  void *keys, *values;       // (batch or more, kv_heads, num_slots, head_dim)
  int64_t key_strides[3];    // of batch, head, slot
  int64_t value_strides[3];  // the same
  int64_t batch, tokens, heads, kv_heads, head_dim, half;
  int64_t num_positions, num_slots;
};

}  // namespace nbl
