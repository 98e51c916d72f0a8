#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace nbl {
namespace {

std::vector<const CpuKernels*> supported_kernels() {
  std::vector<const CpuKernels*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  // Only Cooper Lake has the first without the second.
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"))
    tables.push_back(&kernels_avx512_bf16());
  if (avx512) tables.push_back(&kernels_avx512());
  if (avx2) tables.push_back(&kernels_avx2());  // every processor with AVX2 has F16C too
#endif
  tables.push_back(&kernels_portable());
  return tables;
}

const CpuKernels* find(const std::string& name) {
  static const std::vector<const CpuKernels*> tables = supported_kernels();
  if (name.empty()) return tables.front();
  for (const CpuKernels* table : tables)
    if (name == table->name) return table;
  std::string names;
  for (const CpuKernels* table : tables)
    names += std::string(names.empty() ? "" : ", ") + table->name;
  throw std::runtime_error("cpu capability must be one of " + names + " on this processor, got " +
                           name);
}

std::atomic<const CpuKernels*>& selected() {
  static std::atomic<const CpuKernels*> kernels = [] {
    const char* name = std::getenv("NBL_CPU_CAPABILITY");
    return find(name ? name : "");
  }();
  return kernels;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *selected().load(std::memory_order_relaxed); }

std::vector<std::string> supported_cpu_capabilities() {
  std::vector<std::string> names;
  for (const CpuKernels* table : supported_kernels()) names.push_back(table->name);
  return names;
}

void set_cpu_capability(const std::string& name) { selected().store(find(name)); }

bool has_amx_bf16() {
#if defined(__x86_64__)
  static const bool has = [] {
    constexpr unsigned kAmxBf16 = 1u << 22;  // of EDX; GCC 11 and clang 13 know no name for it
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBf16) != 0;
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace nbl
