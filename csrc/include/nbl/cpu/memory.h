// memory_scan's filter on the CPU: a group of channels of a sequence, token after token. Its state
// stays in the first-level cache; a group is whole cache lines of everything. What it computes:
// ../memory.h.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace nbl {
namespace NBL_ISA {

using MemorySlot = float[kMemoryGroup];

// c of one token, kWidth channels from `at` on, of which `left` exist; moves their state on.
template <class T>
Vec remember(const MemoryParams& p, const T* g, MemorySlot* slot, int64_t at, int64_t left) {
  Vec c = load_some(g, left);
  for (int i = 0; i < p.num_lags; ++i) {
    g += p.channels;
    const int lag = p.lags[i];
    c = c + Vec::load(slot[lag - 1] + at);
    for (int depth = lag - 1; depth > 0; --depth)
      Vec::load(slot[depth - 1] + at).store(slot[depth] + at);
    load_some(g, left).store(slot[0] + at);
    slot += lag;
  }
  for (int i = 0; i < p.num_decays; ++i, ++slot) {
    g += p.channels;
    const Vec news = Vec::broadcast(p.news[i]) * load_some(g, left);
    const Vec average = fma(Vec::broadcast(p.decays[i]), Vec::load(*slot + at), news);
    average.store(*slot + at);
    c = c + average;
  }
  return c;
}

// Groups begin to end of batch · memory_groups(channels).
template <class T>
void memory_filter(const MemoryParams& p, int64_t begin, int64_t end) {
  const int64_t groups = memory_groups(p.channels);
  const int64_t row = p.channels * (1 + p.num_lags + p.num_decays);
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t b = group / groups, first = group % groups * kMemoryGroup;
    const int64_t width = std::min(kMemoryGroup, p.channels - first);
    alignas(64) MemorySlot state[kMostSlots] = {};
    float* outside = p.state + b * p.state_strides[0] + first;
    for (int s = 0; s < p.num_slots; ++s)
      std::memcpy(state[s], outside + s * p.state_strides[1], width * sizeof(float));

    for (int64_t t = 0; t < p.tokens; ++t) {
      const bool there = !p.mask || p.mask[b * p.mask_strides[0] + t * p.mask_strides[1]];
      if (there && p.starts && p.starts[b * p.start_strides[0] + t * p.start_strides[1]])
        std::memset(state, 0, sizeof state);
      const int64_t token = b * p.tokens + t;
      const T* g = static_cast<const T*>(p.g) + token * row + first;
      T* out = static_cast<T*>(p.out) + token * p.channels + first;
      const T* residual = static_cast<const T*>(p.residual);
      if (residual) residual += token * p.residual_stride + first;
      for (int64_t i = 0; i < width; i += Vec::kWidth) {
        const int64_t left = width - i;
        Vec c = there ? remember(p, g + i, state, i, left) : Vec::zero();
        if (bias) c = c + load_some(bias + first + i, left);
        if (residual) c = load_some(residual + i, left) + c;
        store_some(c, out + i, left);
      }
      const int64_t kept = t - (p.tokens - p.history_tokens);
      if (kept < 0) continue;
      float* after = p.history + b * p.history_strides[0] + kept * p.history_strides[1] + first;
      for (int s = 0; s < p.num_slots; ++s)
        std::memcpy(after + s * p.history_strides[2], state[s], width * sizeof(float));
    }
    for (int s = 0; s < p.num_slots; ++s)
      std::memcpy(outside + s * p.state_strides[1], state[s], width * sizeof(float));
  }
}

}  // namespace NBL_ISA
}  // namespace nbl
