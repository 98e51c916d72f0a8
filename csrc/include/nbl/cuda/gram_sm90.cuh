// The Gram matrices of gram.cuh on Hopper: the same tiles, the same work, the same results, by
// warpgroup products (wgmma) on tiles that the tensor copy engine (TMA) brings.
//
//   warpgroup 0: one thread copies        warpgroups 1, 2: 64 x 128 of the tile each
//   ┌──────────────────────────────┐      ┌────────────────────────────────────────────┐
//   │ per step of 64 tokens        │ full │ 4 wgmma m64n128k16 per step; after the last │
//   │ rows 2 boxes of 64 columns   │ ───▶ │ of a run (32 tokens) the                    │
//   │ cols 2 boxes of 64 columns   │ ◀─── │ accumulators are added to float32 registers │
//   └──────────────────────────────┘ empty└────────────────────────────────────────────┘
//                    6 stages of 32 KiB in shared memory; one block per SM walks over the tiles
//
// A box is 64 tokens (rows) of 64 columns, 128 bytes each, under the 128-byte swizzle: its 16-byte
// chunk c of token t lies at place c xor (t mod 8). For wgmma this is an operand whose contraction
// is the slow dimension ("MN-major"): a swizzle atom is 64 columns by 8 tokens, 1024 bytes. In the
// descriptor the stride offset leads from 8 tokens to the next 8 (1024 bytes, next in the box), the
// leading offset from 64 columns to the next 64 (the next box; 8192 bytes, for the operand of 128
// columns only). A product takes 16 tokens, two atoms; the next starts 2048 bytes on, at a multiple
// of 1024 still, so that the base offset stays zero.
//
// While one of the two warpgroups adds up its accumulators, the other's products keep the tensor
// cores busy. Errors and runs are those of gram.cuh: runs of 64 tokens and more lose too much on an
// H200.
//
// The emulation cannot run this kernel. It shares tiles, work list and results with gram_portable,
// which is emulated under sanitizers.
#pragma once

#include "gram.cuh"

namespace nbl {

constexpr int kHopperThreads = 384;
constexpr int kHopperSlab = 64;
constexpr int kHopperStages = 6;
constexpr int kBoxColumns = 64;
constexpr int kBoxBytes = kBoxColumns * 2 * kHopperSlab;
constexpr int kHopperStageBytes = 4 * kBoxBytes;
constexpr size_t kHopperShared = size_t{kHopperStages} * (kHopperStageBytes + 2 * sizeof(uint64_t));
static_assert(kSplitTokens % kHopperSlab == 0, "a box lies within one split");

constexpr int kHopperRuns = kHopperSlab / kTokensPerRun;  // in a step

struct GramHopperParams {
  TensorMap maps[kMaxGramProblems][kMaxInputs];  // (parts, tokens, dim), boxes (1, 64, 64)
  GramParams gram;
};

// A matrix descriptor of an MN-major operand in the 128-byte swizzle, from its first box.
NBL_DEVICE uint64_t box_descriptor(const char* box) {
  constexpr uint64_t kLeading = kBoxBytes / 16, kStride = 1024 / 16, kSwizzle128 = 1;
  const uint64_t address = (shared_address(box) & 0x3ffffu) / 16;
  return address | kLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}

// A persistent kernel: one block per SM (or fewer), each walks over the (tile, split) pairs.
template <class T>
__global__ void __launch_bounds__(kHopperThreads, 1) gram_hopper(NBL_PARAM GramHopperParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  char* stages = shared_memory();
  uint64_t* full = reinterpret_cast<uint64_t*>(stages + kHopperStages * kHopperStageBytes);
  uint64_t* empty = full + kHopperStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kHopperStages; ++s) {
      barrier_init(full + s, 1);   // the copying thread's, and the bytes
      barrier_init(empty + s, 8);  // one per warp that multiplies
    }
    barrier_init_fence();
  }
  sync_block();

  const int blocks = p.gram.tiles * p.gram.splits;
  int stage = 0;
  uint32_t phase = 0;
  if (threadIdx.x < 128) {
    give_back_registers<40>();
    if (threadIdx.x > 0) return;
    for (int index = blockIdx.x; index < blocks; index += gridDim.x) {
      const GramWork work = gram_work(p.gram, index);
      const int slabs = gram_steps(work, kHopperSlab) / work.pairs;
      const TensorMap* rows = &p.maps[work.tile.problem][gram_row_input(work.tile.product)];
      const TensorMap* cols = &p.maps[work.tile.problem][gram_col_input(work.tile.product)];
      const int row = work.tile.row * kGramTile, col = work.tile.col * kGramTile;
      for (int pair = 0; pair < work.pairs; ++pair) {
        const int row_part = work.pair_codes >> 4 * pair & 3;
        const int col_part = work.pair_codes >> 4 * pair >> 2 & 3;
        for (int slab = 0; slab < slabs; ++slab) {
          const int token = static_cast<int>(work.begin) + slab * kHopperSlab;
          char* to = stages + stage * kHopperStageBytes;
          barrier_wait(empty + stage, phase ^ 1);
          barrier_arrive_expect(full + stage, kHopperStageBytes);
          copy_tensor_3d(to, rows, row, token, row_part, full + stage);
          copy_tensor_3d(to + kBoxBytes, rows, row + kBoxColumns, token, row_part, full + stage);
          copy_tensor_3d(to + 2 * kBoxBytes, cols, col, token, col_part, full + stage);
          copy_tensor_3d(to + 3 * kBoxBytes, cols, col + kBoxColumns, token, col_part,
                         full + stage);
          if (++stage == kHopperStages) {
            stage = 0;
            phase ^= 1;
          }
        }
      }
    }
  } else {
    take_registers<232>();
    const int warpgroup = threadIdx.x / 128 - 1;
    for (int index = blockIdx.x; index < blocks; index += gridDim.x) {
      const GramWork work = gram_work(p.gram, index);
      const int steps = gram_steps(work, kHopperSlab);
      float accumulators[64], sums[1][16][4] = {};
      for (int step = 0; step < steps; ++step) {
        barrier_wait(full + stage, phase);
        const char* from = stages + stage * kHopperStageBytes;
        const uint64_t rows = box_descriptor(from + warpgroup * kBoxBytes);
        const uint64_t cols = box_descriptor(from + 2 * kBoxBytes);
#pragma unroll
        for (int run = 0; run < kHopperRuns; ++run) {
          constexpr int kProducts = kTokensPerRun / 16;
          wgmma_fence();
#pragma unroll
          for (int k = run * kProducts; k < (run + 1) * kProducts; ++k) {
            const uint64_t tokens = k * 16 * kBoxColumns * 2 / 16;
            wgmma_m64n128k16<T>(accumulators, rows + tokens, cols + tokens, k % kProducts > 0);
          }
          wgmma_commit();
          wgmma_wait(accumulators);
          if (run + 1 == kHopperRuns && threadIdx.x % 32 == 0) barrier_arrive(empty + stage);
#pragma unroll
          for (int i = 0; i < 64; ++i) sums[0][i / 4][i % 4] += accumulators[i];
        }
        if (++stage == kHopperStages) {
          stage = 0;
          phase ^= 1;
        }
      }
      finish_fragments(p.gram, index, work.tile, static_cast<int>(threadIdx.x - 128) / 32 * 16, 0,
                       sums);
    }
  }
#else
  trap();  // compiled without the features of sm_90a: nothing may take it for done
#endif
}

NBL_HOST_DEVICE inline unsigned gram_hopper_blocks(const GramParams& p, int sms) {
  const unsigned blocks = gram_blocks(p);
  return blocks < static_cast<unsigned>(sms) ? blocks : static_cast<unsigned>(sms);
}

}  // namespace nbl
