#include "cpu/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nbl {

bool use_huge_pages(uint64_t address, int64_t bytes) {
#if defined(__linux__)
  constexpr int kCollapse = 25;  // MADV_COLLAPSE: C libraries of before Linux 6.1 lack it
  constexpr uint64_t kHugePage = 2u << 20;  // of x86-64, and of ARM with 4 KiB pages
  const uint64_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uint64_t end = (address + static_cast<uint64_t>(bytes)) / kHugePage * kHugePage;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse) == 0;
#else
  (void)address, (void)bytes;
  return false;
#endif
}

}  // namespace nbl
