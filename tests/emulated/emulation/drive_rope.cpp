// The kernel of rope_append on the CPU: one problem comes in, q, the caches and what was launched
// go out. Every array ends where the kernel may last touch it; q begins as NaN.
#include "driver.h"
#include "nbl/cuda/rope.cuh"

namespace nbl {
namespace {

struct Header {
  int64_t dtype, seed;
  int64_t batch, tokens, heads, kv_heads, head_dim, half, num_positions, num_slots;
  int64_t qkv_strides[3], q_strides[3], key_strides[3], value_strides[3];
  int64_t cos_stride, sin_stride, position_strides[2], slot_strides[2];
  double eps;
};

// Elements before `offset` are there to move the first one off a multiple of 16 bytes.
template <class T>
struct Array {
  std::vector<T> storage;
  int64_t offset;
  T* data() { return storage.empty() ? nullptr : storage.data() + offset; }
};

template <class T>
Array<T> read() {
  const auto size = driver::read<int64_t>(), offset = driver::read<int64_t>();
  return {driver::read_array<T>(size), offset};
}

template <class T>
void run(const Header& h) {
  auto qkv = read<T>();
  auto cos = read<float>(), sin = read<float>();
  auto positions = read<int64_t>(), slots = read<int64_t>();
  auto q_norm = read<T>(), k_norm = read<T>();
  auto q = read<T>(), keys = read<T>(), values = read<T>();
  RopeParams p{};
  p.qkv = qkv.data();
  p.cos = cos.data();
  p.sin = sin.data();
  p.cos_stride = h.cos_stride;
  p.sin_stride = h.sin_stride;
  p.positions = positions.data();
  p.slots = slots.data();
  p.q_norm_weight = q_norm.data();
  p.k_norm_weight = k_norm.data();
  p.norm_eps = static_cast<float>(h.eps);
  p.q = q.data();
  p.keys = keys.data();
  p.values = values.data();
  for (int i = 0; i < 3; ++i) {
    p.qkv_strides[i] = h.qkv_strides[i];
    p.q_strides[i] = h.q_strides[i];
    p.key_strides[i] = h.key_strides[i];
    p.value_strides[i] = h.value_strides[i];
  }
  for (int i = 0; i < 2; ++i) {
    p.position_strides[i] = h.position_strides[i];
    p.slot_strides[i] = h.slot_strides[i];
  }
  p.batch = h.batch;
  p.tokens = h.tokens;
  p.heads = h.heads;
  p.kv_heads = h.kv_heads;
  p.head_dim = h.head_dim;
  p.half = h.half;
  p.num_positions = h.num_positions;
  p.num_slots = h.num_slots;
  const bool vectors = rope_vectors(p, sizeof(T));
  const RopeLaunch launch = rope_launch(p, sizeof(T));
  emulate(vectors ? rope_append<T, true> : rope_append<T, false>, {rope_blocks(launch)},
          kRopeThreads, 0, h.seed, launch);
  driver::write_array(q.storage);
  driver::write_array(keys.storage);
  driver::write_array(values.storage);
  driver::write_array(std::vector<int64_t>{vectors, launch.lane_bits, rope_blocks(launch)});
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
