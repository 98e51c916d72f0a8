// covariance_update on the CPU: one pass for column statistics (it finds bad input before anything
// is changed, and the shifts), then chunk by chunk: pack, column sums, Gram tiles. See
// nbl/cpu/gram.h.
#include "args/covariance.h"

#include <atomic>
#include <cmath>
#include <numeric>

#include "dispatch.h"

namespace nbl {
namespace {

constexpr const char* kOp = CovarianceArgs::kOp;

// Columns with |mean| beyond this many standard deviations are shifted. Float32 block sums carry an
// error of about 1e-7 of the mean square, which is 1 + 8² variances at most without a shift.
constexpr double kShiftRatio = 8.0;
constexpr int64_t kMaxChunkBytes = int64_t{64} << 20;
constexpr int64_t kMaxChunkTokens = 8192;

struct Workspace {  // kept between calls, one per calling thread
  std::vector<char> packed;
  std::vector<float> shifts;
  std::vector<double> sums;
  std::vector<uint8_t> inexact;
};

// Dynamic scheduling: tiles differ in cost (those below the diagonal cost nothing). Each tile is
// computed by one thread in a fixed order, so that results do not depend on the schedule.
template <class F>
void parallel_tasks(int64_t count, const F& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) task(i);
  });
}

void run_tile(const CpuKernels& isa, const GramChunk& chunk, const GramJob& job, int64_t tile) {
  static thread_local std::vector<double> sums;
  sums.resize(isa.tile_row_panels * isa.tile_col_panels * isa.panel * isa.panel);
  isa.gram_tile(chunk, job, tile, sums.data());
}

std::vector<int64_t> counted_tokens(int64_t tokens, const std::optional<Tensor>& mask) {
  std::vector<int64_t> rows;
  rows.reserve(tokens);
  const bool* counts = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  for (int64_t t = 0; t < tokens; ++t)
    if (!counts || counts[t]) rows.push_back(t);
  return rows;
}

[[noreturn]] void fail_not_finite(const char* name, const Tensor& input,
                                  const std::vector<int64_t>& tokens, int64_t channel) {
  const DType dtype = kernel_dtype(kOp, name, input);
  for (int64_t t : tokens) {
    const int64_t at = t * row_stride(input) + channel;
    const float value = dtype == DType::kFloat32
                            ? static_cast<const float*>(input.const_data_ptr())[at]
                        : dtype == DType::kBFloat16
                            ? to_float(static_cast<const bfloat16*>(input.const_data_ptr())[at])
                            : to_float(static_cast<const float16*>(input.const_data_ptr())[at]);
    if (!(std::abs(value) < 1e18f))
      fail(kOp, ": ", name, " must be finite and below 1e18, got ", value, " at token ", t,
           ", channel ", channel, "; nothing was accumulated (mask such tokens out)");
  }
  fail(kOp, ": ", name, " has a sum of squares beyond float32 in channel ", channel,
       "; nothing was accumulated");
}

// Shifts for all packed columns (zeros where none is needed). Throws on values that are not finite.
bool find_shifts(const CpuKernels& isa, const std::vector<GramInput>& inputs,
                 const CovarianceArgs& args, const std::vector<int64_t>& tokens,
                 std::vector<float>& shifts) {
  constexpr int64_t kParts = 16;  // fixed, so that the shifts do not depend on the thread count
  const int64_t n = static_cast<int64_t>(tokens.size());
  const int64_t part = (n + kParts - 1) / kParts;
  bool shifted = false;
  for (size_t s = 0; s < inputs.size(); ++s) {
    const GramInput& input = inputs[s];
    const DType dtype = kernel_dtype(kOp, args.kInputNames[s], args.inputs[s]);
    std::vector<float> stats(kParts * 2 * input.dim, 0.0f);
    parallel_tasks(kParts, [&](int64_t i) {
      const int64_t begin = std::min(i * part, n), end = std::min(begin + part, n);
      float* sums = stats.data() + i * 2 * input.dim;
      isa[dtype].column_stats(input, tokens.data() + begin, end - begin, sums, sums + input.dim);
    });
    for (int64_t c = 0; c < input.dim; ++c) {
      double sum = 0, squares = 0;
      for (int64_t i = 0; i < kParts; ++i) {
        sum += stats[i * 2 * input.dim + c];
        squares += stats[(i * 2 + 1) * input.dim + c];
      }
      if (!(squares < 3e38)) fail_not_finite(args.kInputNames[s], args.inputs[s], tokens, c);
      const double mean = sum / static_cast<double>(n);
      const double variance = std::max(0.0, squares / static_cast<double>(n) - mean * mean);
      if (mean * mean > kShiftRatio * kShiftRatio * variance && mean != 0) {
        // Rounded to bf16: exact to subtract from bf16 values near it, and from any float.
        shifts[input.first_panel * isa.panel + c] =
            to_float(from_float<bfloat16>(static_cast<float>(mean)));
        shifted = true;
      }
    }
  }
  return shifted;
}

struct Grams {
  const CpuKernels& isa;
  const TypedKernels& kernels;
  std::vector<GramInput> inputs;
  std::vector<GramJob> jobs;  // out and shape of each Gram matrix
  double* sums;               // the running column sums, inputs one after the other
  Workspace& work;
  bool shifted;
};

// Adds one chunk of tokens; returns those whose shifted values were not bf16 numbers.
std::vector<int64_t> add_chunk(Grams& g, const int64_t* tokens, int64_t count, bool pairs) {
  const CpuKernels& isa = g.isa;
  GramChunk chunk{};
  chunk.num_inputs = static_cast<int>(g.inputs.size());
  for (int s = 0; s < chunk.num_inputs; ++s) chunk.inputs[s] = g.inputs[s];
  chunk.tokens = tokens;
  chunk.num_tokens = count;
  chunk.pairs = pairs;
  chunk.block_tokens = pairs ? isa.block_tokens_pairs : isa.block_tokens;
  chunk.num_blocks = (count + chunk.block_tokens - 1) / chunk.block_tokens;
  chunk.num_panels = static_cast<int64_t>(g.work.shifts.size()) / isa.panel;
  const size_t bytes = chunk.num_blocks * chunk.num_panels * chunk.block_tokens * isa.panel *
                       (pairs ? sizeof(bfloat16) : sizeof(float));
  if (g.work.packed.size() < bytes + 64) g.work.packed.resize(bytes + 64);
  void* packed = g.work.packed.data();
  size_t space = g.work.packed.size();
  chunk.packed = std::align(64, bytes, packed, space);
  g.work.inexact.assign(count, 0);
  chunk.inexact = g.work.inexact.data();
  chunk.shifts = g.work.shifts.data();
  chunk.shifted = g.shifted;
  parallel_tasks(chunk.num_blocks, [&](int64_t block) { g.kernels.pack(chunk, block); });

  std::vector<int64_t> left_out;
  for (int64_t t = 0; t < count; ++t)
    if (chunk.inexact[t]) left_out.push_back(tokens[t]);
  chunk.count = static_cast<double>(count - static_cast<int64_t>(left_out.size()));

  // Column sums: the panel of ones times every other panel.
  const int64_t columns = chunk.num_panels * isa.panel;
  g.work.sums.assign(columns, 0.0);
  GramJob ones{};
  ones.row_panel = chunk.num_panels - 1;
  ones.rows = 1;
  ones.cols = columns;
  ones.out = g.work.sums.data();
  ones.stride = columns;
  ones.row_tiles = 1;
  const int64_t tile_cols = isa.tile_col_panels * isa.panel;
  ones.col_tiles = (columns + tile_cols - 1) / tile_cols;
  parallel_tasks(ones.col_tiles, [&](int64_t tile) { run_tile(isa, chunk, ones, tile); });
  chunk.sums = g.work.sums.data();

  int64_t tiles = 0;
  for (const GramJob& job : g.jobs) tiles += job.row_tiles * job.col_tiles;
  parallel_tasks(tiles, [&](int64_t tile) {
    for (const GramJob& job : g.jobs) {
      const int64_t job_tiles = job.row_tiles * job.col_tiles;
      if (tile < job_tiles) return run_tile(isa, chunk, job, tile);
      tile -= job_tiles;
    }
  });

  double* sums = g.sums;
  for (const GramInput& input : g.inputs) {
    const int64_t first = input.first_panel * isa.panel;
    for (int64_t c = 0; c < input.dim; ++c)
      sums[c] += chunk.sums[first + c] + chunk.count * chunk.shifts[first + c];
    sums += input.dim;
  }
  return left_out;
}

void covariance_update(const Tensor& features, const Tensor& targets,
                       const std::optional<Tensor>& block, const std::optional<Tensor>& mask,
                       Tensor count, Tensor sums, Tensor gram_ff, Tensor gram_tf, Tensor gram_tt,
                       Tensor gram_bf, Tensor gram_bb) {
  const CovarianceArgs args = covariance_args(features, targets, block, mask, count, sums,
                                              {gram_ff, gram_tf, gram_tt, gram_bf, gram_bb});
  const std::vector<int64_t> tokens = counted_tokens(args.tokens, args.mask);
  if (tokens.empty()) return;

  static thread_local Workspace work;
  const CpuKernels& isa = cpu_kernels();
  const DType dtype = kernel_dtype(kOp, "features", features);
  Grams g{isa, isa[dtype], {}, {}, args.sums_data(), work, false};
  int64_t panels = 0;
  for (const Tensor& input : args.inputs) {
    g.inputs.push_back({input.const_data_ptr(), row_stride(input), input.size(1), panels});
    panels += (input.size(1) + isa.panel - 1) / isa.panel;
  }
  ++panels;  // the ones
  work.shifts.assign(panels * isa.panel, 0.0f);
  g.shifted = find_shifts(isa, g.inputs, args, tokens, work.shifts);

  for (size_t gram = 0; gram < args.grams.size(); ++gram) {
    if (!args.gram_data(gram)) continue;
    const auto [rows, cols] = args.kGramInputs[gram];
    GramJob job{};
    job.row_panel = g.inputs[rows].first_panel;
    job.rows = g.inputs[rows].dim;
    job.col_panel = g.inputs[cols].first_panel;
    job.cols = g.inputs[cols].dim;
    job.out = args.gram_data(gram);
    job.stride = job.cols;
    job.upper = rows == cols;
    job.recenter = true;
    const int64_t tile_rows = isa.tile_row_panels * isa.panel;
    const int64_t tile_cols = isa.tile_col_panels * isa.panel;
    job.row_tiles = (job.rows + tile_rows - 1) / tile_rows;
    job.col_tiles = (job.cols + tile_cols - 1) / tile_cols;
    g.jobs.push_back(job);
  }

  const bool pairs = dtype == DType::kBFloat16 && isa.bfloat16_pairs;
  const int64_t token_bytes = panels * isa.panel * (pairs ? 2 : 4);
  const int64_t block_tokens = pairs ? isa.block_tokens_pairs : isa.block_tokens;
  const int64_t fitting = kMaxChunkBytes / token_bytes / block_tokens * block_tokens;
  const int64_t chunk_tokens = std::clamp(fitting, 4 * block_tokens, kMaxChunkTokens);
  const int64_t n = static_cast<int64_t>(tokens.size());
  std::vector<int64_t> left_out;
  for (int64_t begin = 0; begin < n; begin += chunk_tokens) {
    const int64_t size = std::min(chunk_tokens, n - begin);
    const auto again = add_chunk(g, tokens.data() + begin, size, pairs);
    left_out.insert(left_out.end(), again.begin(), again.end());
  }
  for (int64_t begin = 0; begin < static_cast<int64_t>(left_out.size());
       begin += chunk_tokens / 2) {
    const int64_t size = std::min<int64_t>(chunk_tokens / 2, left_out.size() - begin);
    add_chunk(g, left_out.data() + begin, size, false);
  }
  *args.count_data() += n;
}

}  // namespace
}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CPU, m) {
  m.impl("covariance_update", TORCH_BOX(&nbl::covariance_update));
}
