// Every byte as a weight of 8 bits, as the kernels widen it: all of int8 in bfloat16, in float16,
// then of fp8.
#include "driver.h"
#include "nbl/cuda/weight_formats.cuh"

namespace nbl {
namespace {

template <class T, class W>
void write_all() {
  for (int first = 0; first < 256; first += 16) {
    uint8_t bytes[16];
    for (int i = 0; i < 16; ++i) bytes[i] = static_cast<uint8_t>(first + i);
    Bytes16 granule;
    std::memcpy(&granule, bytes, sizeof granule);
    for (int part = 0; part < 2; ++part) {
      driver::write_array(std::vector<Bytes16>{widen<T>(W{}, granule, part)});
    }
  }
}

}  // namespace
}  // namespace nbl

int main() {
  using namespace nbl;
  write_all<bfloat16, int8_t>();
  write_all<float16, int8_t>();
  write_all<bfloat16, float8_e4m3>();
  write_all<float16, float8_e4m3>();
}
