// The kernels of memory_scan's filter on the CPU: one problem comes in; the result, the state, the
// history and what was launched go out. Every array ends where the kernels may last touch it; the
// result and the entries between two launches begin as NaN.
#include "driver.h"
#include "nbl/cuda/memory.cuh"

namespace nbl {
namespace {

struct Header {
  int64_t dtype, seed;
  int64_t batch, tokens, channels, num_lags, num_decays, history_tokens;
  int64_t lags[kMostSlots];
  int64_t state_strides[2], history_strides[3], mask_strides[2], start_strides[2], residual_stride;
  double decays[kMostSlots];
};

template <class T>
std::vector<T> read() {
  return driver::read_array<T>(driver::read<int64_t>());
}

template <class T>
T* data(std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}

template <class T>
void run(const Header& h) {
  auto g = read<T>(), residual = read<T>(), bias = read<T>();
  auto mask = read<uint8_t>(), starts = read<uint8_t>();
  auto state = read<float>(), history = read<float>();
  auto out = read<T>();
  MemoryParams p{};
  p.g = data(g);
  p.num_lags = static_cast<int>(h.num_lags);
  p.num_decays = static_cast<int>(h.num_decays);
  p.num_slots = p.num_decays;
  for (int i = 0; i < p.num_lags; ++i) p.num_slots += p.lags[i] = static_cast<int>(h.lags[i]);
  for (int i = 0; i < p.num_decays; ++i) {
    p.decays[i] = static_cast<float>(h.decays[i]);
    p.news[i] = static_cast<float>(1 - h.decays[i]);
  }
  p.state = data(state);
  p.history = data(history);
  p.history_tokens = h.history_tokens;
  p.mask = data(mask);
  p.starts = data(starts);
  for (int i = 0; i < 2; ++i) {
    p.state_strides[i] = h.state_strides[i];
    p.mask_strides[i] = h.mask_strides[i];
    p.start_strides[i] = h.start_strides[i];
  }
  for (int i = 0; i < 3; ++i) p.history_strides[i] = h.history_strides[i];
  p.residual = data(residual);
  p.residual_stride = h.residual_stride;
  p.bias = data(bias);
  p.out = data(out);
  p.batch = h.batch;
  p.tokens = h.tokens;
  p.channels = h.channels;

  MemoryLaunch launch = memory_launch(p);
  const unsigned blocks = memory_blocks(launch);
  const int shared = memory_shared_bytes(launch);
  std::vector<float> entries(memory_entries(p), bits_to_float(0x7fc00000u));
  std::vector<int32_t> counts(p.batch * launch.chunks, 12345);
  if (!entries.empty()) {
    launch.entries = entries.data();
    launch.counts = counts.data();
    emulate(memory_ends<T>, {blocks}, kMemoryThreads, shared, h.seed, launch);
  }
  emulate(memory_filter<T>, {blocks}, kMemoryThreads, shared, h.seed + 1, launch);
  driver::write_array(out);
  driver::write_array(state);
  driver::write_array(history);
  driver::write_array(
      std::vector<int64_t>{launch.chunks, launch.tiles, !entries.empty(), memory_fits(p)});
}

}  // namespace
}  // namespace nbl

int main() {
  using namespace nbl;
  const auto header = driver::read<Header>();
  switch (static_cast<DType>(header.dtype)) {
    case DType::kFloat32:
      run<float>(header);
      break;
    case DType::kBFloat16:
      run<bfloat16>(header);
      break;
    case DType::kFloat16:
      run<float16>(header);
      break;
  }
}
