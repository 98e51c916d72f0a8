// Large pages for weights: fewer address translations, and hardware prefetch that does not stop
// every 4 KiB, when they are read at the speed of memory.
#pragma once

#include <cstdint>

namespace nbl {

// Moves the memory at `address` into huge pages, contents and addresses unchanged: the whole huge
// pages inside it. False where the system does not do that (only Linux 6.1 and later does), for
// memory mapped from a file, when no huge page is free, and for memory too small to hold one.
bool use_huge_pages(uint64_t address, int64_t bytes);

}  // namespace nbl
