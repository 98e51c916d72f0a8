// covariance_update on the CPU: one pass for column statistics (it finds bad input before anything
// is changed, and the shifts), then chunk by chunk: pack, column sums, Gram tiles. See
// nbl/cpu/gram.h.
#include <atomic>
#include <cmath>
#include <numeric>

#include "common.h"
#include "dispatch.h"

namespace nbl {
namespace {

constexpr const char* kOp = "covariance_update";

// Columns with |mean| beyond this many standard deviations are shifted. Float32 block sums carry an
// error of about 1e-7 of the mean square, which is 1 + 8² variances at most without a shift.
constexpr double kShiftRatio = 8.0;
constexpr int64_t kMaxChunkBytes = int64_t{64} << 20;
constexpr int64_t kMaxChunkTokens = 8192;

struct Input {
  const char* name;
  Tensor data;
  int64_t dim;
};

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

[[noreturn]] void fail_not_finite(const Input& input, const std::vector<int64_t>& tokens,
                                  int64_t channel) {
  const DType dtype = kernel_dtype(kOp, input.name, input.data);
  for (int64_t t : tokens) {
    const int64_t at = t * row_stride(input.data) + channel;
    const float value =
        dtype == DType::kFloat32 ? static_cast<const float*>(input.data.const_data_ptr())[at]
        : dtype == DType::kBFloat16
            ? to_float(static_cast<const bfloat16*>(input.data.const_data_ptr())[at])
            : to_float(static_cast<const float16*>(input.data.const_data_ptr())[at]);
    if (!(std::abs(value) < 1e18f))
      fail(kOp, ": ", input.name, " must be finite and below 1e18, got ", value, " at token ", t,
           ", channel ", channel, "; nothing was accumulated (mask such tokens out)");
  }
  fail(kOp, ": ", input.name, " has a sum of squares beyond float32 in channel ", channel,
       "; nothing was accumulated");
}

// Shifts for all packed columns (zeros where none is needed). Throws on values that are not finite.
bool find_shifts(const CpuKernels& isa, const std::vector<GramInput>& inputs,
                 const std::vector<Input>& named, const std::vector<int64_t>& tokens,
                 std::vector<float>& shifts) {
  constexpr int64_t kParts = 16;  // fixed, so that the shifts do not depend on the thread count
  const int64_t n = static_cast<int64_t>(tokens.size());
  const int64_t part = (n + kParts - 1) / kParts;
  bool shifted = false;
  for (size_t s = 0; s < inputs.size(); ++s) {
    const GramInput& input = inputs[s];
    const DType dtype = kernel_dtype(kOp, named[s].name, named[s].data);
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
      if (!(squares < 3e38)) fail_not_finite(named[s], tokens, c);
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

void check_sums(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
  check_shape(kOp, name, t, expected);
  check(t.scalar_type() == ScalarType::Double && t.is_contiguous(), kOp, ": ", name,
        " must be a contiguous float64 tensor");
}

// A Gram matrix without elements is left out: not computed.
void check_gram(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  if (t.numel() > 0) check_shape(kOp, name, t, {rows, cols}, " or no elements (left out)");
  check(t.scalar_type() == ScalarType::Double && t.is_contiguous(), kOp, ": ", name,
        " must be a contiguous float64 tensor");
}

void covariance_update(const Tensor& features, const Tensor& targets,
                       const std::optional<Tensor>& block, const std::optional<Tensor>& mask,
                       Tensor count, Tensor sums, Tensor gram_ff, Tensor gram_tf, Tensor gram_tt,
                       Tensor gram_bf, Tensor gram_bb) {
  std::vector<Input> named{{"features", features, 0}, {"targets", targets, 0}};
  if (block) named.push_back({"block", *block, 0});
  for (Input& input : named) {
    kernel_dtype(kOp, input.name, input.data);
    check_like(kOp, input.name, input.data, "features", features);
    check(input.data.dim() == 2, kOp, ": ", input.name,
          " must have 2 dimensions (tokens, dim), got ", shape(input.data));
    check(input.data.size(0) == features.size(0), kOp, ": ", input.name, " must have the ",
          features.size(0), " tokens of features, got ", input.data.size(0));
    input.dim = input.data.size(1);
    input.data = with_contiguous_rows(input.data);
  }
  std::optional<Tensor> counts = mask;
  if (mask) {
    check_shape(kOp, "mask", *mask, {features.size(0)});
    check(mask->scalar_type() == ScalarType::Bool, kOp, ": mask must be bool, got ",
          dtype_name(mask->scalar_type()));
    counts = torch::stable::contiguous(*mask);
  }
  const int64_t df = named[0].dim, dt = named[1].dim, db = block ? named[2].dim : 0;
  check_sums("sums", sums, {df + dt + db});
  check_gram("gram_ff", gram_ff, df, df);
  check_gram("gram_tf", gram_tf, dt, df);
  check_gram("gram_tt", gram_tt, dt, dt);
  check_gram("gram_bf", gram_bf, db, df);
  check_gram("gram_bb", gram_bb, db, db);
  check(count.scalar_type() == ScalarType::Long && count.numel() == 1, kOp,
        ": count must be one int64");

  const std::vector<int64_t> tokens = counted_tokens(features.size(0), counts);
  if (tokens.empty()) return;

  static thread_local Workspace work;
  const CpuKernels& isa = cpu_kernels();
  const DType dtype = kernel_dtype(kOp, "features", features);
  Grams g{isa, isa[dtype], {}, {}, static_cast<double*>(sums.mutable_data_ptr()), work, false};
  int64_t panels = 0;
  for (const Input& input : named) {
    g.inputs.push_back({input.data.const_data_ptr(), row_stride(input.data), input.dim, panels});
    panels += (input.dim + isa.panel - 1) / isa.panel;
  }
  ++panels;  // the ones
  work.shifts.assign(panels * isa.panel, 0.0f);
  g.shifted = find_shifts(isa, g.inputs, named, tokens, work.shifts);

  const auto add_job = [&](int rows, int cols, Tensor& out) {
    if (out.numel() == 0) return;
    GramJob job{};
    job.row_panel = g.inputs[rows].first_panel;
    job.rows = g.inputs[rows].dim;
    job.col_panel = g.inputs[cols].first_panel;
    job.cols = g.inputs[cols].dim;
    job.out = static_cast<double*>(out.mutable_data_ptr());
    job.stride = job.cols;
    job.upper = rows == cols;
    job.recenter = true;
    const int64_t tile_rows = isa.tile_row_panels * isa.panel;
    const int64_t tile_cols = isa.tile_col_panels * isa.panel;
    job.row_tiles = (job.rows + tile_rows - 1) / tile_rows;
    job.col_tiles = (job.cols + tile_cols - 1) / tile_cols;
    if (job.row_tiles * job.col_tiles > 0) g.jobs.push_back(job);
  };
  add_job(0, 0, gram_ff);
  add_job(1, 0, gram_tf);
  add_job(1, 1, gram_tt);
  if (block) {
    add_job(2, 0, gram_bf);
    add_job(2, 2, gram_bb);
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
  *static_cast<int64_t*>(count.mutable_data_ptr()) += n;
}

}  // namespace
}  // namespace nbl

STABLE_TORCH_LIBRARY_IMPL(nbl, CPU, m) {
  m.impl("covariance_update", TORCH_BOX(&nbl::covariance_update));
}
