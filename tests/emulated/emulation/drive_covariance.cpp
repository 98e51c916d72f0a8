// An update of streaming moments, launch by launch, from stdin to stdout: int32 dtype (0 float32,
// 1 bfloat16, 2 float16), seed, multiprocessors, layers; per
// layer int32 inputs, tokens, mask (0/1), left out (bit i: product i), per input dim, stride,
// offset (elements before the first row), the mask, the inputs' elements, and what count, sums and
// the Gram matrices not left out hold before. Out: int64 update, input, channel, token of a refused
// value (update -1: none), then the moments.
#include <list>

#include "driver.h"
#include "nbl/cuda/covariance_update.h"

namespace nbl {

using driver::read;
using driver::read_array;

class EmulatedDevice {
 public:
  EmulatedDevice(uint64_t seed, int multiprocessors)
      : seed_(seed), multiprocessors_(multiprocessors) {}

  void* allocate(size_t bytes) {
    workspaces_.emplace_back(bytes, char(0xff));
    return workspaces_.back().data();
  }
  void* scratch(size_t bytes) { return allocate(bytes); }
  void clear(void* pointer, size_t bytes) { std::memset(pointer, 0, bytes); }
  void read_back(void* host, const void* device, size_t bytes) { std::memcpy(host, device, bytes); }
  int multiprocessors() const { return multiprocessors_; }

  template <class Params>
  void launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared, const Params& params) {
    emulate(kernel, grid, threads, shared, seed_++, params);
  }

  void gram(const GramParams& params, bool as_half) {
    launch_gram_portable(*this, params, as_half);
  }

 private:
  uint64_t seed_;
  int multiprocessors_;
  std::list<std::vector<char>> workspaces_;
};

struct LayerMemory {
  std::vector<uint8_t> mask;
  std::vector<uint8_t> inputs[kMaxInputs];
  std::vector<int64_t> count;
  std::vector<double> sums, grams[kMaxProducts];
};

template <class T>
void run() {
  const int seed = read<int>(), multiprocessors = read<int>();
  const int num_layers = read<int>();
  std::vector<LayerMemory> memory(num_layers);
  std::vector<MomentsUpdate> updates(num_layers);
  for (int i = 0; i < num_layers; ++i) {
    MomentsUpdate& update = updates[i];
    update.num_inputs = read<int>();
    update.tokens = read<int>();
    const bool masked = read<int>();
    const int left_out = read<int>();
    int offsets[kMaxInputs];
    size_t columns = 0;
    for (int s = 0; s < update.num_inputs; ++s) {
      update.inputs[s].dim = read<int>();
      update.inputs[s].stride = read<int>();
      offsets[s] = read<int>();
      columns += update.inputs[s].dim;
    }
    memory[i].mask = read_array<uint8_t>(masked ? update.tokens : 0);
    update.mask = masked ? memory[i].mask.data() : nullptr;
    for (int s = 0; s < update.num_inputs; ++s) {
      const MomentsInput& in = update.inputs[s];
      const int64_t elements = update.tokens ? (update.tokens - 1) * in.stride + in.dim : 0;
      memory[i].inputs[s] = read_array<uint8_t>((offsets[s] + elements) * sizeof(T));
      update.inputs[s].data = memory[i].inputs[s].data() + offsets[s] * sizeof(T);
    }
    memory[i].count = read_array<int64_t>(1);
    memory[i].sums = read_array<double>(columns);
    update.count = memory[i].count.data();
    update.sums = memory[i].sums.data();
    for (int product = 0; product < gram_products(update.num_inputs); ++product) {
      if (left_out >> product & 1) continue;
      memory[i].grams[product] =
          read_array<double>(size_t(update.inputs[gram_row_input(product)].dim) *
                             update.inputs[gram_col_input(product)].dim);
      update.grams[product] = memory[i].grams[product].data();
    }
  }
  EmulatedDevice device(seed, multiprocessors);
  BadValue bad{-1, -1, -1, -1};
  MomentsUpdater<T, EmulatedDevice>(device, updates).run(bad);
  driver::write_array(std::vector<int64_t>{bad.update, bad.input, bad.channel, bad.token});
  for (int i = 0; i < num_layers; ++i) {
    driver::write_array(memory[i].count);
    driver::write_array(memory[i].sums);
    for (int product = 0; product < gram_products(updates[i].num_inputs); ++product)
      driver::write_array(memory[i].grams[product]);
  }
}

}  // namespace nbl

int main() {
  const int dtype = nbl::driver::read<int>();
  if (dtype == 0)
    nbl::run<float>();
  else if (dtype == 1)
    nbl::run<nbl::bfloat16>();
  else
    nbl::run<nbl::float16>();
}
