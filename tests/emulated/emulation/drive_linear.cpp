// The linear kernels on the CPU: problems come in one after another, the results go out. Every
// array is exactly as large as the kernel may touch; outputs and workspace begin as NaN.
#include "driver.h"
#include "nbl/cuda/skinny_linear.cuh"

namespace nbl {
namespace {

enum Kernel { kLinear, kNormRows, kSiluMulRows, kDequantizeRows };

struct Header {
  int32_t kernel, dtype, format, swiglu, norm, bias, residual, vector;
  int32_t m, n, k;
  int32_t x_stride, weight_stride, residual_stride, out_stride;
  int32_t shift;  // elements by which x, γ and the weight are off an address of 16 bytes
  int32_t splits, sm_count, seed, runs;
  float eps;
};

template <class T>
struct Array {
  std::vector<T> storage;
  int shift;
  const T* data() const { return storage.empty() ? nullptr : storage.data() + shift; }
};

template <class T>
Array<T> read_rows(int64_t rows, int64_t stride, int64_t columns, int shift) {
  std::vector<T> values(shift);
  const auto read = driver::read_array<T>(rows > 0 ? (rows - 1) * stride + columns : 0);
  values.insert(values.end(), read.begin(), read.end());
  values.shrink_to_fit();
  return {std::move(values), shift};
}

void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(4);
}

// NBL_FEW_TILES: bfloat16 without norm and float16 with it, a fraction of the time to compile.
// NBL_QUANTIZED: the tiles of quantized weights, else those of plain ones.
template <class T, class Visitor>
void with_tile_of(const LinearProblem& p, const Visitor& visitor) {
#if defined(NBL_FEW_TILES)
  if constexpr (std::is_same_v<T, bfloat16>) {
    require(!p.norm, "no such tile here");
    if (p.format == WeightFormat::kInt8) return visit_tile<T, int8_t, false, true>(p, visitor);
    if (p.format == WeightFormat::kFp8) return visit_tile<T, float8_e4m3, false, true>(p, visitor);
    if (p.format == WeightFormat::kInt4) return visit_tile<T, int4_group, false, true>(p, visitor);
    p.vector ? visit_tile<T, T, false, true>(p, visitor)
             : visit_tile<T, T, false, false>(p, visitor);
  } else if constexpr (std::is_same_v<T, float16>) {
    require(p.norm && p.vector, "no such tile here");
    visit_tile<T, T, true, true>(p, visitor);
  }
#elif defined(NBL_QUANTIZED)
  require(p.format != WeightFormat::kPlain, "no such tile here");
  if (p.format == WeightFormat::kInt8) return visit_typed_tile<T, int8_t>(p, visitor);
  if (p.format == WeightFormat::kFp8) return visit_typed_tile<T, float8_e4m3>(p, visitor);
  visit_typed_tile<T, int4_group>(p, visitor);
#else
  require(p.format == WeightFormat::kPlain, "no such tile here");
  visit_typed_tile<T, T>(p, visitor);
#endif
}

template <class T>
void run_skinny(const Header& h) {
  const int64_t weight_rows = h.swiglu ? 2 * h.n : h.n;
  const auto x = read_rows<T>(h.m, h.x_stride, h.k, h.shift);
  const auto gamma = read_rows<T>(h.norm ? 1 : 0, 0, h.k, h.shift);
  const auto format = static_cast<WeightFormat>(h.format);
  const bool int4 = format == WeightFormat::kInt4, plain = format == WeightFormat::kPlain;
  const int64_t groups = (h.k + kInt4Group - 1) / kInt4Group;
  const int64_t element = plain ? sizeof(T) : 1, columns = int4 ? 64 * groups : h.k;
  const auto weight = read_rows<uint8_t>(weight_rows, h.weight_stride * element, columns * element,
                                         h.shift * element);
  const auto scale = driver::read_array<uint8_t>(plain ? 0 : weight_rows * (int4 ? 2 * groups : 4));
  const auto bias = read_rows<T>(h.bias ? 1 : 0, 0, h.n, 0);
  const auto residual = read_rows<T>(h.residual ? h.m : 0, h.residual_stride, h.n, 0);
  const LinearProblem problem{static_cast<DType>(h.dtype),
                              format,
                              h.swiglu != 0,
                              h.norm != 0,
                              h.vector != 0,
                              h.m,
                              h.n,
                              h.k,
                              h.sm_count,
                              h.splits};
  with_tile_of<T>(problem, [&](auto tile) {
    using Tile = decltype(tile);
    const LinearGeometry geometry = linear_geometry<Tile>(problem);
    std::vector<uint32_t> counters(geometry.counters);
    for (int run = 0; run < h.runs; ++run) {
      std::vector<float> partials(geometry.partials, std::nanf(""));
      std::vector<T> out((h.m - 1) * h.out_stride + h.n);
      std::memset(out.data(), 0xff, out.size() * sizeof(T));
      LinearParams p{};
      p.x = x.data();
      p.x_stride = h.x_stride;
      p.norm_weight = gamma.data();
      p.norm_eps = h.eps;
      p.weight = weight.data();
      p.weight_stride = h.weight_stride;
      p.weight_scale = scale.data();
      p.swiglu = h.swiglu != 0;
      p.bias = bias.data();
      p.residual = residual.data();
      p.residual_stride = h.residual_stride;
      p.out = out.data();
      p.out_stride = h.out_stride;
      p.m = h.m;
      p.n = h.n;
      p.k = h.k;
      p.split_k = geometry.split_k;
      p.partials = partials.data();
      p.counters = counters.data();
      p.dependent = run % 2 == 1;
      const dim3 grid{static_cast<unsigned>(geometry.grid_x),
                      static_cast<unsigned>(geometry.grid_y)};
      emulate(skinny_linear<Tile>, grid, kLinearThreads, geometry.shared_bytes, h.seed + run, p);
      for (uint32_t counter : counters) require(counter == 0, "a counter was not reset");
      driver::write_array(out);
    }
    driver::write_array(std::vector<int32_t>{geometry.grid_x, geometry.grid_y, Tile::kMma,
                                             Tile::kRows, Tile::kTokens});
  });
}

template <class T, bool kVector>
void run_rows(const Header& h) {
  std::vector<T> out((h.m - 1) * h.out_stride + h.n);
  std::memset(out.data(), 0xff, out.size() * sizeof(T));
  const auto x = read_rows<T>(h.m, h.x_stride, h.k, h.shift);
  const dim3 grid{static_cast<unsigned>(h.m)};
  if (h.kernel == kNormRows) {
    const auto gamma = read_rows<T>(1, 0, h.k, h.shift);
    const NormRowsParams p{x.data(),   h.x_stride,   gamma.data(), h.eps,
                           out.data(), h.out_stride, h.k};
    emulate(rms_norm_rows<T, kVector>, grid, kRowThreads, kNormRowsSharedBytes, h.seed, p);
  } else {
    const SiluMulParams p{x.data(), h.x_stride, out.data(), h.out_stride, h.n};
    emulate(silu_mul_rows<T, kVector>, grid, kRowThreads, 0, h.seed, p);
  }
  driver::write_array(out);
}

#if defined(NBL_QUANTIZED)
template <class T, class W>
void run_dequantize(const Header& h) {
  const int64_t groups = (h.k + kInt4Group - 1) / kInt4Group;
  const bool int4 = sizeof(W) > 1;
  const auto weight = read_rows<uint8_t>(h.m, h.weight_stride, int4 ? 64 * groups : h.k, h.shift);
  const auto scale = driver::read_array<uint8_t>(h.m * (int4 ? 2 * groups : 4));
  std::vector<T> out(h.m * h.out_stride);
  std::memset(out.data(), 0xff, out.size() * sizeof(T));
  const DequantizeParams p{weight.data(), h.weight_stride, scale.data(), h.vector != 0,
                           out.data(),    h.out_stride,    h.k};
  emulate(dequantize_rows<T, W>, dim3{static_cast<unsigned>(h.m)}, kRowThreads, 0, h.seed, p);
  driver::write_array(out);
}
#endif

template <class T>
void run(const Header& h) {
#if defined(NBL_QUANTIZED)
  if constexpr (sizeof(T) == 2) {
    if (h.kernel == kDequantizeRows) {
      if (h.format == static_cast<int>(WeightFormat::kInt8)) return run_dequantize<T, int8_t>(h);
      if (h.format == static_cast<int>(WeightFormat::kFp8))
        return run_dequantize<T, float8_e4m3>(h);
      return run_dequantize<T, int4_group>(h);
    }
  }
#endif
  if (h.kernel == kLinear) {
    run_skinny<T>(h);
  } else if (h.vector) {
    run_rows<T, true>(h);
  } else {
    run_rows<T, false>(h);
  }
}

}  // namespace
}  // namespace nbl

int main() {
  using namespace nbl;
  for (int count = driver::read<int32_t>(); count > 0; --count) {
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
}
