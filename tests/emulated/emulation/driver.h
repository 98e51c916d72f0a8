// For the emulated drivers: a problem comes in on stdin, its results go out on stdout. Arrays are
// vectors of exactly their size, so that the sanitizer sees every access beside them.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace nbl::driver {

template <class T>
std::vector<T> read_array(size_t count) {
  std::vector<T> values(count);
  if (count && std::fread(values.data(), sizeof(T), count, stdin) != count) {
    std::fprintf(stderr, "driver: the input ended early\n");
    std::exit(2);
  }
  values.shrink_to_fit();
  return values;
}

template <class T>
T read() {
  return read_array<T>(1)[0];
}

template <class T>
void write_array(const std::vector<T>& values) {
  if (values.empty()) return;
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

}  // namespace nbl::driver
