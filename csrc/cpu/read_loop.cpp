// Reading memory and doing nothing with it: the limit the benchmarks hold the skinny linears
// against.
//
// Each thread reads one contiguous part of the buffer, `streams` rows at a time:
//
//   streams 1   ────────────────────────▶   one sequential stream per thread
//   streams 4   ──▶──▶  four rows together, then the next four: how a matrix-vector product reads
//
// with or without software prefetch of what lies `ahead` bytes further. Which is fastest differs
// between processors, so the benchmarks try several.
#include "read_loop.h"

#include <atomic>
#include <cstring>

#include "args/common.h"

namespace nbl {
namespace {

constexpr int kStreams = 4;             // the most
constexpr int64_t kRowBytes = 8 << 10;  // 4096 bfloat16
constexpr int64_t kUnitBytes = kStreams * kRowBytes;
constexpr int kVectors = 4;  // cache lines of a row read per step, each with its own sum

using Line = uint64_t __attribute__((vector_size(64)));
using ReadUnits = uint64_t (*)(const char* data, int64_t bytes, int streams, int64_t ahead);

// The one loop; always inlined, so that each caller below compiles it for its own instruction set.
template <bool kPrefetch>
[[gnu::always_inline]] inline uint64_t read_rows(const char* data, int64_t bytes, int streams,
                                                 int64_t ahead) {
  Line sums[kVectors] = {};
  for (const char* block = data; block < data + bytes; block += streams * kRowBytes) {
    for (int64_t i = 0; i < kRowBytes; i += kVectors * int64_t{sizeof(Line)}) {
      for (int s = 0; s < streams; ++s) {
        const char* p = block + s * kRowBytes + i;
        for (int v = 0; v < kVectors; ++v) {
          if (kPrefetch) __builtin_prefetch(p + v * sizeof(Line) + ahead);
          Line line;
          std::memcpy(&line, p + v * sizeof(Line), sizeof(Line));
          sums[v] ^= line;
        }
      }
    }
  }
  const Line total = (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
  uint64_t result = 0;
  for (size_t i = 0; i < sizeof(Line) / sizeof(uint64_t); ++i) result ^= total[i];
  return result;
}

[[gnu::always_inline]] inline uint64_t read_units(const char* data, int64_t bytes, int streams,
                                                  int64_t ahead) {
  if (streams == 1)
    return ahead ? read_rows<true>(data, bytes, 1, ahead) : read_rows<false>(data, bytes, 1, 0);
  return ahead ? read_rows<true>(data, bytes, kStreams, ahead)
               : read_rows<false>(data, bytes, kStreams, 0);
}

uint64_t read_portable(const char* data, int64_t bytes, int streams, int64_t ahead) {
  return read_units(data, bytes, streams, ahead);
}

#if defined(__x86_64__)
[[gnu::target("avx2")]] uint64_t read_avx2(const char* data, int64_t bytes, int streams,
                                           int64_t ahead) {
  return read_units(data, bytes, streams, ahead);
}

[[gnu::target("avx512f")]] uint64_t read_avx512(const char* data, int64_t bytes, int streams,
                                                int64_t ahead) {
  return read_units(data, bytes, streams, ahead);
}
#endif

ReadUnits best_loop() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return &read_avx512;
  if (__builtin_cpu_supports("avx2")) return &read_avx2;
#endif
  return &read_portable;
}

}  // namespace

uint64_t read_loop(uint64_t address, int64_t bytes, int streams, int64_t ahead) {
  check(bytes > 0 && bytes % kUnitBytes == 0, "read_loop: bytes must be a positive multiple of ",
        kUnitBytes, ", got ", bytes);
  check(streams == 1 || streams == kStreams, "read_loop: streams must be 1 or ", kStreams, ", got ",
        streams);
  check(ahead >= 0, "read_loop: ahead must be 0 (no prefetch) or positive, got ", ahead);
  static const ReadUnits read = best_loop();
  const char* data = reinterpret_cast<const char*>(address);
  std::atomic<uint64_t> sum{0};
  torch::stable::parallel_for(0, bytes / kUnitBytes, 1, [&](int64_t begin, int64_t end) {
    sum ^= read(data + begin * kUnitBytes, (end - begin) * kUnitBytes, streams, ahead);
  });
  return sum;
}

}  // namespace nbl
