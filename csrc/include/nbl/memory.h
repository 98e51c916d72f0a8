// The parameters of memory_scan's filter, for the CPU and the CUDA kernel alike: raw pointers and
// sizes.
//
//   for each channel of each sequence, token after token, g = [g_0 | one of every branch]:
//     c = g_0 + Σ over lags l: what branch l was l tokens ago
//             + Σ over decays a: e_a,   e_a = a e_a + (1 - a) g_a
//     out = c, or residual + c + bias: one rounding, at the end
//
// What is remembered, the state, is one vector of channels per slot: for every lag l the last l of
// its branch, the newest first, then for every decay its average. A token whose mask is false is
// not there: it leaves the state alone, its g is not used, its c is zero. Before a token that is
// there and starts a sequence the state becomes zero.
//
// float32 arithmetic, the same operations in the same order for a token wherever a call begins, so
// that T tokens at once or one by one leave the same bits. Strides are in elements; last dimensions
// are contiguous.
#pragma once

#include "dtypes.h"

namespace nbl {

constexpr int kMostSlots = 8;

struct MemoryParams {
  const void* g;  // (batch, tokens, 1 + num_lags + num_decays, channels), contiguous
  int num_lags, num_decays, num_slots;
  int lags[kMostSlots];
  float decays[kMostSlots], news[kMostSlots];  // a and 1 - a
  float* state;                                // (batch, num_slots, channels)
  int64_t state_strides[2];
  float* history;  // (batch, history_tokens, num_slots, channels): the states after the last tokens
  int64_t history_strides[3], history_tokens;  // history_tokens 0: none are kept
  const uint8_t *mask, *starts;  // (batch, tokens) or null: all are there, none starts
  int64_t mask_strides[2], start_strides[2];
  const void* residual;  // (batch · tokens, channels) or null: zero
  int64_t residual_stride;
  const void* bias;  // (channels) or null: zero
  void* out;         // (batch, tokens, channels), contiguous
  int64_t batch, tokens, channels;
};

}  // namespace nbl
