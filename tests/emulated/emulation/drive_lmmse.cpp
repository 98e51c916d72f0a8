// The kernels of nbl/cuda/lmmse.cuh, one call per run: int32 step, layers, seed, then its problem.
#include "driver.h"
#include "nbl/cuda/lmmse.cuh"

namespace nbl {
namespace {

using driver::read;
using driver::read_array;
using driver::write_array;

template <class Params>
void run(void (*kernel)(Params), const LmmseGrid& grid, const Params& params, uint64_t seed) {
  emulate(kernel, {unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)}, kLmmseThreads,
          grid.shared_bytes, seed, params);
}

// int64 n, int32 residual, base[, cross, other]: what a SymmetricSum points to.
struct Sum {
  int64_t n = read<int64_t>();
  bool residual = read<int32_t>() != 0;
  std::vector<double> base, cross, other;
  explicit Sum(int64_t layers) : base(read_array<double>(layers * n * n)) {
    if (!residual) return;
    cross = read_array<double>(layers * n * n);
    other = read_array<double>(layers * n * n);
  }
  SymmetricSum params() const {
    return {base.data(), residual ? cross.data() : nullptr, residual ? other.data() : nullptr, n};
  }
};

int run_step() {
  const auto step = read<int32_t>(), layers = read<int32_t>(), seed = read<int32_t>();
  switch (step) {
    case 0: {  // equilibrate: ridge -> lambda, scale
      const Sum c(layers);
      const auto ridge = read<double>();
      std::vector<double> lambda(layers), scale(layers * c.n);
      run(equilibrate_kernel, lmmse_layer_grid(layers),
          EquilibrateParams{c.params(), ridge, lambda.data(), scale.data()}, seed);
      write_array(lambda);
      write_array(scale);
      break;
    }
    case 1: {  // assemble: scale, out -> out
      const Sum c(layers);
      const auto scale = read_array<double>(layers * c.n);
      auto out = read_array<double>(layers * c.n * c.n);
      run(assemble_kernel, assemble_grid(c.params(), layers),
          AssembleParams{c.params(), scale.data(), out.data()}, seed);
      write_array(out);
      break;
    }
    case 2: {  // check_pivots: n, smallest_pivot, ridge, scale, factor, info -> used
      const auto n = read<int64_t>();
      const auto smallest = read<double>(), ridge = read<double>();
      const auto scale = read_array<double>(layers * n);
      const auto factor = read_array<double>(layers * n * n);
      const auto info = read_array<int32_t>(layers);
      std::vector<double> used(layers);
      run(check_pivots_kernel, lmmse_layer_grid(layers),
          CheckPivotsParams{scale.data(), factor.data(), info.data(), used.data(), n, smallest,
                            ridge, std::nan("")},
          seed);
      write_array(used);
      break;
    }
    case 3: {  // scale: rows, cols, has_b, has_row_scale, in_place, a, b, row_scale, col_scale ->
               // out
      const auto rows = read<int64_t>(), cols = read<int64_t>();
      const auto has_b = read<int32_t>(), has_row_scale = read<int32_t>(),
                 in_place = read<int32_t>();
      auto a = read_array<double>(layers * rows * cols);
      const auto b = read_array<double>(has_b ? layers * rows * cols : 0);
      const auto row_scale = read_array<double>(has_row_scale ? layers * rows : 0);
      const auto col_scale = read_array<double>(layers * cols);
      std::vector<double> out(in_place ? 0 : a.size());
      run(scale_kernel, scale_grid(rows, cols, layers),
          ScaleParams{a.data(), has_b ? b.data() : nullptr,
                      has_row_scale ? row_scale.data() : nullptr, col_scale.data(),
                      in_place ? a.data() : out.data(), rows, cols},
          seed);
      write_array(in_place ? a : out);
      break;
    }
    case 4: {  // subtract_squares: n, has_factor, a, factor, out -> out
      const auto n = read<int64_t>();
      const auto has_factor = read<int32_t>();
      const auto a = read_array<double>(layers * n);
      const auto factor = read_array<double>(has_factor ? layers : 0);
      auto out = read_array<double>(layers);
      std::vector<double> partial(layers * squares_blocks(n));
      const SubtractSquaresParams p{a.data(), has_factor ? factor.data() : nullptr, out.data(),
                                    partial.data(), n};
      run(squares_kernel, squares_grid(n, layers), p, seed);
      run(subtract_squares_kernel, lmmse_layer_grid(layers), p, seed + 1);
      write_array(out);
      break;
    }
    default:
      return 2;
  }
  return 0;
}

}  // namespace
}  // namespace nbl

int main() { return nbl::run_step(); }
