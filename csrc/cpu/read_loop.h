// Reads `bytes` from `address` with all threads and returns the xor of its 64-bit words.
#pragma once

#include <cstdint>

namespace nbl {

// streams: rows a thread reads together, 1 or 4; ahead: prefetch distance in bytes, 0 for none.
uint64_t read_loop(uint64_t address, int64_t bytes, int streams, int64_t ahead);

}  // namespace nbl
