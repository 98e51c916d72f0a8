// The emulation itself: a sum over the block, and the same with faults that it has to catch.
#include "driver.h"
#include "nbl/cuda/ptx.cuh"

namespace nbl {

enum Fault { kNone, kNoBarrier, kNoWait, kPartOfABlock, kLoneLane, kOverrun, kUnaligned };

struct Params {
  const float* in;
  float* out;
  int fault;
};

// out[block] = sum of the block's 4 · blockDim inputs, copied through shared memory.
__global__ void block_sum(NBL_PARAM Params p) {
  const unsigned thread = threadIdx.x, threads = blockDim.x;
  float* staged = reinterpret_cast<float*>(shared_memory());
  const unsigned shift = p.fault == kOverrun ? 4 : 0;
  const unsigned skew = p.fault == kUnaligned ? 1 : 0;
  copy_async_16(staged + 4 * thread + shift, p.in + 4 * (blockIdx.x * threads + thread) + skew,
                true);
  copy_async_commit();
  if (p.fault != kNoWait) copy_async_wait<0>();
  if (p.fault == kPartOfABlock && thread == 0) shuffle_xor(0.0f, 1);
  if (p.fault != kNoBarrier) sync_block();
  float sum = 0;  // of elements that other threads copied
  for (unsigned i = 0; i < 4; ++i) sum += staged[(thread + 1) % threads * 4 + i];
  if (p.fault == kLoneLane && thread == 0) return;
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  sync_block();
  if (thread % 32 == 0) staged[thread / 32] = sum;
  sync_block();
  if (thread > 0) return;
  for (unsigned w = 1; w < threads / 32; ++w) sum += staged[w];
  p.out[blockIdx.x] = sum;
}

}  // namespace nbl

int main() {
  using namespace nbl;
  const int fault = driver::read<int>(), blocks = driver::read<int>(),
            threads = driver::read<int>();
  const int seed = driver::read<int>();
  const auto in = driver::read_array<float>(size_t(4) * blocks * threads + 4);
  std::vector<float> out(blocks);
  emulate(block_sum, {unsigned(blocks)}, threads, sizeof(float) * 4 * threads, seed,
          Params{in.data(), out.data(), fault});
  driver::write_array(out);
}
