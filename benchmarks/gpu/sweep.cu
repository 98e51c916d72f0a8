// Times every tile of the skinny linear that might be worth a line in the table of sizes in
// nbl/cuda/linear_tiles.h. Prints JSON lines, one for each tile, shape and number of splits.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -Icsrc/include
//        benchmarks/gpu/sweep.cu -o sweep && ./sweep [seconds]
//
// bfloat16, x (m, d), square weights, no bias, the residual added; each launch reads another copy
// of the weight, all copies together several times the L2 cache; launches are captured in a graph.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "nbl/cuda/launch.h"
#include "nbl/cuda/skinny_linear.cuh"

namespace {

using nbl::LinearGeometry;
using nbl::LinearParams;
using nbl::LinearProblem;
using nbl::LinearTile;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "sweep: %s, %s\n", cudaGetErrorName(error), cudaGetErrorString(error));
  std::exit(1);
}

// Uniform in [-scale, scale), as bfloat16.
__global__ void fill(uint16_t* out, int64_t count, float scale, uint32_t seed) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    uint32_t h = (static_cast<uint32_t>(i) ^ seed) * 0x9e3779b9u;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    const float value = scale * (static_cast<float>(h >> 8) / 8388608.0f - 1.0f);
    out[i] = static_cast<uint16_t>(__float_as_uint(value) >> 16);
  }
}

template <class T>
T* allocate(int64_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, std::max<int64_t>(count, 1) * sizeof(T)));
  return static_cast<T*>(memory);
}

float as_float(uint16_t bits) {
  const uint32_t word = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

class Sweep {
 public:
  explicit Sweep(double seconds)
      : end_(Clock::now() + std::chrono::milliseconds(static_cast<int64_t>(1e3 * seconds))) {
    int device = 0, l2 = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&sm_count_, cudaDevAttrMultiProcessorCount, device));
    check(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device));
    check(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
    block_bytes_ = std::max<int64_t>(int64_t{4} * l2, int64_t{256} << 20);
    check(cudaStreamCreate(&stream_));
    check(cudaEventCreate(&start_));
    check(cudaEventCreate(&stop_));
    counters_ = allocate<uint32_t>(kMostCounters);
    check(cudaMemset(counters_, 0, kMostCounters * sizeof(uint32_t)));
  }

  void shape(int m, int d) {
    m_ = m, d_ = d;
    const int64_t size = int64_t{d} * d;
    copies_ = static_cast<int>(std::max<int64_t>(2, (block_bytes_ + size * 2 - 1) / (size * 2)));
    check(cudaFree(weights_));
    check(cudaFree(x_));
    check(cudaFree(out_));
    weights_ = allocate<uint16_t>(size * copies_);
    x_ = allocate<uint16_t>(int64_t{m} * d);
    out_ = allocate<uint16_t>(int64_t{m} * d);
    for (int i = 0; i < copies_; ++i)
      fill<<<1024, 256>>>(weights_ + i * size, size, 1.7f / std::sqrt(float(d)), 1);
    fill<<<64, 256>>>(x_, int64_t{m} * d, 1.7f, 2);
    check(cudaDeviceSynchronize());
    expected_.clear();
  }

  template <bool kMma, int kRows, int kTokens, int kUnroll>
  void tile() {
    using Tile =
        LinearTile<nbl::bfloat16, nbl::bfloat16, kMma, kRows, kTokens, kUnroll, /*norm=*/false,
                   /*vector=*/true>;
    int before = 0;
    for (const int splits : {0, 1, 2, 4, 8}) {  // 0: what the table's rule says
      if (Clock::now() > end_) return;
      LinearProblem problem{};
      problem.dtype = nbl::DType::kBFloat16;
      problem.vector = true;
      problem.m = m_, problem.n = d_, problem.k = d_;
      problem.sm_count = sm_count_, problem.splits = splits;
      const LinearGeometry geometry = nbl::linear_geometry<Tile>(problem);
      if (geometry.counters > kMostCounters || (splits != 0 && geometry.grid_y == before)) continue;
      if (splits == 0) before = geometry.grid_y;
      time<Tile>(geometry, splits == 0);
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int64_t kMostCounters = 1 << 16;

  template <class Tile>
  void time(const LinearGeometry& geometry, bool rule) {
    float* partials = allocate<float>(geometry.partials);
    LinearParams p{};
    p.x = x_, p.residual = x_, p.out = out_;
    p.x_stride = p.residual_stride = p.out_stride = p.weight_stride = d_;
    p.m = m_, p.n = d_, p.k = d_;
    p.split_k = geometry.split_k, p.partials = partials, p.counters = counters_;
    p.dependent = major_ >= 9;
    const auto launch = [&](int number) {
      p.weight = weights_ + int64_t{number % copies_} * d_ * d_;
      check(nbl::launch_kernel(nbl::skinny_linear<Tile>, dim3(geometry.grid_x, geometry.grid_y),
                               nbl::kLinearThreads, geometry.shared_bytes, stream_, p.dependent,
                               p));
    };
    check(cudaMemset(out_, 0xff, int64_t{m_} * d_ * 2));
    launch(0);
    check(cudaStreamSynchronize(stream_));
    const bool right = same_as_the_first();

    const int launches = (128 + copies_ - 1) / copies_ * copies_;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; ++i) launch(i);
    check(cudaStreamEndCapture(stream_, &graph));
    check(cudaGraphInstantiate(&replay, graph, 0));
    std::vector<float> times;
    check(cudaGraphLaunch(replay, stream_));
    for (int i = 0; i < 11; ++i) {
      check(cudaEventRecord(start_, stream_));
      check(cudaGraphLaunch(replay, stream_));
      check(cudaEventRecord(stop_, stream_));
      check(cudaStreamSynchronize(stream_));
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, start_, stop_));
      times.push_back(milliseconds * 1e3f / launches);
    }
    std::sort(times.begin(), times.end());
    const double us = times[times.size() / 2];
    std::printf(
        "{\"m\": %d, \"d\": %d, \"products\": \"%s\", \"rows\": %d, \"tokens\": %d, \"unroll\": "
        "%d, \"splits\": %d, \"rule\": %s, \"right\": %s, \"us\": %.2f, \"gb_per_s\": %.0f}\n",
        m_, d_, Tile::kMma ? "mma" : "fma", Tile::kRows, Tile::kTokens, Tile::kUnroll,
        geometry.grid_y, rule ? "true" : "false", right ? "true" : "false", us,
        (2.0 * d_ * d_ + 6.0 * m_ * d_) / us / 1e3);
    std::fflush(stdout);
    check(cudaGraphExecDestroy(replay));
    check(cudaGraphDestroy(graph));
    check(cudaFree(partials));
  }

  // Tiles differ in the order of their sums alone.
  bool same_as_the_first() {
    std::vector<uint16_t> out(size_t(m_) * d_);
    check(cudaMemcpy(out.data(), out_, out.size() * 2, cudaMemcpyDeviceToHost));
    if (expected_.empty()) expected_ = out;
    for (size_t i = 0; i < out.size(); ++i)
      if (!(std::fabs(as_float(out[i]) - as_float(expected_[i])) <= 0.04f)) return false;
    return true;
  }

  Clock::time_point end_;
  int sm_count_ = 0, major_ = 0, m_ = 0, d_ = 0, copies_ = 0;
  int64_t block_bytes_ = 0;
  cudaStream_t stream_;
  cudaEvent_t start_, stop_;
  uint32_t* counters_ = nullptr;
  uint16_t *weights_ = nullptr, *x_ = nullptr, *out_ = nullptr;
  std::vector<uint16_t> expected_;
};

}  // namespace

int main(int argc, char** argv) {
  Sweep sweep(argc > 1 ? std::atof(argv[1]) : 60.0);
  for (const int d : {4096, 8192, 2048}) {
    sweep.shape(1, d);
    sweep.tile<false, 4, 1, 2>();  // first, what the table has
    sweep.tile<false, 2, 1, 2>();
    sweep.tile<false, 2, 1, 4>();
    sweep.tile<false, 4, 1, 1>();
    sweep.tile<false, 4, 1, 3>();
    sweep.tile<false, 4, 1, 4>();
    sweep.tile<false, 8, 1, 1>();
    sweep.tile<false, 8, 1, 2>();
    for (const int m : {4, 8}) {
      sweep.shape(m, d);
      sweep.tile<true, 16, 8, 4>();
      sweep.tile<true, 16, 8, 2>();
      sweep.tile<true, 16, 8, 6>();
      sweep.tile<true, 32, 8, 2>();
      sweep.tile<true, 32, 8, 3>();
      sweep.tile<true, 64, 8, 1>();
      sweep.tile<true, 64, 8, 2>();
    }
    sweep.shape(16, d);
    sweep.tile<true, 16, 16, 4>();
    sweep.tile<true, 16, 16, 2>();
    sweep.tile<true, 16, 16, 3>();
    sweep.tile<true, 16, 8, 4>();
    sweep.tile<true, 32, 16, 1>();
    sweep.tile<true, 32, 16, 2>();
    sweep.tile<true, 32, 16, 3>();
    sweep.tile<true, 32, 8, 2>();
    sweep.tile<true, 64, 16, 1>();
    sweep.tile<true, 64, 16, 2>();
  }
}
