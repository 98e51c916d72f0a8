// The launches that make up an update of streaming moments, in order, for any device that can do
//   device.allocate(bytes)                a workspace that lives until the update has ended
//   device.scratch(bytes)                 one that lives until the next call of scratch
//   device.clear(pointer, bytes)
//   device.launch(kernel, grid, threads, shared_bytes, params)
//   device.read_back(host, device, bytes) after all launches before it
//   device.multiprocessors()
//   device.gram(params, as_half)          one launch's worth of products: launch_gram_portable or
//                                         a kernel of its own
// so that the GPU and the emulation run the same sequence with the same grids.
//
//   statistics of every layer → the host looks at the flags → per span of 8192 tokens: pack what
//   cannot be read in place, all products → add the column sums and the count
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "gram.cuh"

namespace nbl {

struct MomentsInput {  // (tokens, dim), contiguous rows
  const void* data;
  int64_t stride, dim;
};

struct MomentsUpdate {  // the tokens of one layer and the sums they are added to
  MomentsInput inputs[kMaxInputs];
  int num_inputs;
  const uint8_t* mask;  // or null
  int64_t tokens;
  int64_t* count;
  double* sums;                 // (all columns)
  double* grams[kMaxProducts];  // null: left out
};

struct BadValue {  // why an update is refused
  int update, input;
  int64_t channel;
  int64_t token;  // -1: no single value, the sum of squares of the channel is too large
};

template <class Device>
void launch_gram_portable(Device& device, GramParams p, bool as_half) {
  plan_gram(p, device.multiprocessors());
  if (p.tiles == 0) return;
  if (p.splits > 1)
    p.partial =
        static_cast<float*>(device.scratch(gram_partial_bytes(p, device.multiprocessors())));
  device.launch(as_half ? gram_portable<float16> : gram_portable<bfloat16>, dim3{gram_blocks(p)},
                kGramThreads, kGramShared, p);
  if (p.splits > 1)
    device.launch(gram_combine, dim3{static_cast<unsigned>(p.tiles)}, kGramThreads, 0, p);
}

template <class T, class Device>
class MomentsUpdater {
 public:
  MomentsUpdater(Device& device, const std::vector<MomentsUpdate>& updates)
      : device_(device), layers_(updates.size()) {
    for (size_t i = 0; i < updates.size(); ++i) layers_[i].update = &updates[i];
  }

  // Accumulates all updates or, where a value cannot be, none, and says which in `bad`.
  bool run(BadValue& bad) {
    find_statistics();
    if (find_bad_value(bad)) return false;
    int64_t most_tokens = 0;
    bool shifted = false;
    for (const Layer& layer : layers_) {
      if (layer.flags.count == 0) continue;
      if (layer.update->tokens > most_tokens) most_tokens = layer.update->tokens;
      shifted = shifted || layer.shifted();
    }
    as_half_ = std::is_same_v<T, float16> && !shifted;
    for (int64_t begin = 0; begin < most_tokens; begin += kGramSpan) multiply_span(begin);
    for (const Layer& layer : layers_) {
      if (layer.flags.count == 0) continue;
      device_.launch(commit_sums, column_blocks(layer.columns), kColumnThreads, 0,
                     CommitParams{layer.sums, layer.update->sums, layer.columns, layer.flags.count,
                                  layer.update->count});
    }
    return true;
  }

 private:
  struct Layer {
    const MomentsUpdate* update;
    int columns = 0;
    int first_column[kMaxInputs + 1] = {};
    double* sums = nullptr;
    float* shifts = nullptr;
    ColumnFlags flags{};
    void* packed[kMaxInputs] = {};  // workspace for a span of tokens
    uint32_t* nonzero[kMaxInputs] = {};

    bool shifted() const { return flags.shifted[0] || flags.shifted[1] || flags.shifted[2]; }
  };

  static bool octets(const MomentsInput& input) {
    return reinterpret_cast<uintptr_t>(input.data) % 16 == 0 && input.stride * sizeof(T) % 16 == 0;
  }

  static dim3 column_blocks(int columns) {
    return dim3{static_cast<unsigned>(ceil_div(columns, kColumnThreads))};
  }

  static TokenColumns token_columns(const MomentsInput& input, int64_t begin) {
    return {static_cast<const T*>(input.data) + begin * input.stride, input.stride,
            static_cast<int>(input.dim), octets(input)};
  }

  template <class V>
  V* allocate(int64_t count) {
    return static_cast<V*>(device_.allocate(sizeof(V) * count));
  }

  void find_statistics() {
    ColumnFlags* flags = allocate<ColumnFlags>(layers_.size());
    for (size_t i = 0; i < layers_.size(); ++i) {
      Layer& layer = layers_[i];
      const MomentsUpdate& update = *layer.update;
      ColumnStatsParams stats{};
      stats.num_inputs = update.num_inputs;
      int64_t dims[kMaxInputs];
      for (int s = 0; s < update.num_inputs; ++s) {
        dims[s] = update.inputs[s].dim;
        stats.inputs[s] = token_columns(update.inputs[s], 0);
        layer.columns += static_cast<int>(dims[s]);
        for (int after = s + 1; after <= kMaxInputs; ++after)
          layer.first_column[after] = layer.columns;
      }
      if (update.tokens == 0 || layer.columns == 0) continue;
      const ColumnStatsGrid grid = column_stats_grid(dims, update.num_inputs, update.tokens);
      stats.columns = layer.columns;
      stats.mask = update.mask;
      stats.tokens = update.tokens;
      stats.part_tokens = grid.part_tokens;
      stats.partial = allocate<double>(int64_t{2} * grid.parts * layer.columns);
      stats.counts = allocate<uint32_t>(grid.parts);
      stats.flags = flags + i;
      layer.sums = allocate<double>(layer.columns);
      layer.shifts = allocate<float>(layer.columns);
      device_.launch(column_stats<T>, dim3{grid.groups, grid.parts}, kColumnThreads,
                     kColumnStatsShared, stats);
      ColumnShiftParams shifts{stats.partial, stats.counts, static_cast<int>(grid.parts),
                               layer.columns, {},           update.num_inputs,
                               layer.sums,    layer.shifts, flags + i};
      for (int s = 0; s <= kMaxInputs; ++s) shifts.first_column[s] = layer.first_column[s];
      device_.launch(column_shifts<T>, column_blocks(layer.columns), kColumnThreads, 0, shifts);
    }
    flags_ = flags;
    std::vector<ColumnFlags> read(layers_.size());
    device_.read_back(read.data(), flags, sizeof(ColumnFlags) * read.size());
    for (size_t i = 0; i < layers_.size(); ++i)
      if (layers_[i].sums) layers_[i].flags = read[i];
  }

  bool find_bad_value(BadValue& bad) {
    for (size_t i = 0; i < layers_.size(); ++i) {
      Layer& layer = layers_[i];
      if (!layer.sums || layer.flags.first_bad == ~uint64_t{0}) continue;
      const MomentsUpdate& update = *layer.update;
      bad.update = static_cast<int>(i);
      bad.input = 0;
      const int64_t column = static_cast<int64_t>(layer.flags.first_bad);
      while (column >= layer.first_column[bad.input + 1]) ++bad.input;
      bad.channel = column - layer.first_column[bad.input];
      const MomentsInput& input = update.inputs[bad.input];
      device_.launch(first_bad_token<T>, dim3{64}, kColumnThreads, 0,
                     BadTokenParams{static_cast<const T*>(input.data) + bad.channel, input.stride,
                                    update.mask, update.tokens, flags_ + i});
      device_.read_back(&layer.flags, flags_ + i, sizeof(ColumnFlags));
      bad.token = static_cast<int64_t>(layer.flags.first_token);  // -1 where there is none
      return true;
    }
    return false;
  }

  void multiply_span(int64_t begin) {
    GramParams params{};
    for (Layer& layer : layers_) {
      const int64_t left = layer.flags.count == 0 ? 0 : layer.update->tokens - begin;
      if (left <= 0) continue;
      params.problems[params.num_problems++] =
          make_problem(layer, begin, left < kGramSpan ? left : kGramSpan);
      if (params.num_problems < kMaxGramProblems) continue;
      device_.gram(params, as_half_);
      params = {};
    }
    if (params.num_problems > 0) device_.gram(params, as_half_);
  }

  GramProblem make_problem(Layer& layer, int64_t begin, int64_t tokens) {
    const MomentsUpdate& update = *layer.update;
    GramProblem problem{};
    problem.num_inputs = update.num_inputs;
    problem.tokens = tokens;
    for (int product = 0; product < kMaxProducts; ++product)
      problem.out[product] = update.grams[product];
    problem.sums = layer.sums;
    problem.shifts = begin == 0 && layer.shifted() ? layer.shifts : nullptr;
    problem.count = static_cast<double>(layer.flags.count);
    for (int s = 0; s < update.num_inputs; ++s)
      problem.inputs[s] = make_operand(layer, s, begin, tokens);
    return problem;
  }

  GramOperand make_operand(Layer& layer, int s, int64_t begin, int64_t tokens) {
    const MomentsUpdate& update = *layer.update;
    const MomentsInput& input = update.inputs[s];
    GramOperand operand{};
    operand.dim = static_cast<int>(input.dim);
    operand.first_column = layer.first_column[s];
    const bool shifted = layer.flags.shifted[s] != 0;
    operand.parts = sizeof(T) == 4                                         ? 3
                    : shifted || (std::is_same_v<T, float16> && !as_half_) ? 2
                                                                           : 1;
    const bool in_place = operand.parts == 1 && !update.mask && octets(input) &&
                          input.dim % kOctet == 0 && input.stride >= input.dim;
    if (in_place || input.dim == 0) {
      operand.data = static_cast<const T*>(input.data) + begin * input.stride;
      operand.stride = input.stride;
      operand.part_stride = tokens * input.stride;
      return operand;
    }
    operand.stride = ceil_div(input.dim, kOctet) * kOctet;
    operand.part_stride = tokens * operand.stride;
    const int64_t flags = int64_t{operand.parts - 1} * column_tiles(input.dim);
    if (!layer.packed[s]) {  // the first span is the longest
      layer.packed[s] = allocate<uint16_t>(operand.parts * operand.part_stride);
      layer.nonzero[s] = flags > 0 ? allocate<uint32_t>(flags) : nullptr;
    }
    operand.data = layer.packed[s];
    operand.nonzero = layer.nonzero[s];
    if (flags > 0) device_.clear(layer.nonzero[s], sizeof(uint32_t) * flags);
    PackParams pack{token_columns(input, begin),
                    update.mask ? update.mask + begin : nullptr,
                    shifted ? layer.shifts + layer.first_column[s] : nullptr,
                    tokens,
                    layer.packed[s],
                    operand.stride,
                    operand.part_stride,
                    layer.nonzero[s],
                    column_tiles(input.dim),
                    kGramTile};
    const dim3 grid{static_cast<unsigned>(ceil_div(operand.stride, kColumnGroup)),
                    static_cast<unsigned>(ceil_div(tokens, kPackTokens))};
    if constexpr (sizeof(T) == 4)
      device_.launch(pack_tokens<T, bfloat16, 3>, grid, kColumnThreads, 0, pack);
    else if (operand.parts == 2)
      device_.launch(pack_tokens<T, bfloat16, 2>, grid, kColumnThreads, 0, pack);
    else
      device_.launch(pack_tokens<T, T, 1>, grid, kColumnThreads, 0, pack);
    return operand;
  }

  Device& device_;
  std::vector<Layer> layers_;
  ColumnFlags* flags_ = nullptr;
  bool as_half_ = false;
};

}  // namespace nbl
