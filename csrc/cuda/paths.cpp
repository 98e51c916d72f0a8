#include "cuda/paths.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

namespace nbl {
namespace {

enum Op { kLinear, kCovariance, kRope, kMemory, kOps };

// What has been measured: op, compute capability, path, the file in benchmarks/results that says
// so. What does not stand here is plain.
struct Measured {
  Op op;
  int compute_capability;
  Path path;
  const char* result;
};
constexpr const char* kH200 = "gpu-nvidia-h200-2026-11-26T2218.md";
const std::vector<Measured> kMeasured = {
    {kLinear, 90, Path::kKernel, kH200},
    {kRope, 90, Path::kKernel, kH200},
    {kMemory, 90, Path::kKernel, kH200},
    {kCovariance, 90, Path::kHopper, "gpu-nvidia-h200-2026-11-26T2226-covariance.json"}};

constexpr const char* kOpNames[kOps] = {"linear", "covariance", "rope", "memory"};
using Names = std::vector<std::pair<const char*, Path>>;
const std::array<Names, kOps> kPathNames = {
    Names{{"plain", Path::kPlain}, {"kernel", Path::kKernel}},
    Names{{"plain", Path::kPlain},
          {"portable", Path::kPortable},
          {"hopper", Path::kHopper},
          {"kernel", Path::kKernel}},
    Names{{"plain", Path::kPlain}, {"kernel", Path::kKernel}},
    Names{{"plain", Path::kPlain}, {"kernel", Path::kKernel}}};
constexpr int kAuto = -1;

Op find_op(const std::string& name) {
  for (int op = 0; op < kOps; ++op)
    if (name == kOpNames[op]) return static_cast<Op>(op);
  if (name == "gram") return kCovariance;  // its name until 0.1
  throw std::runtime_error("op must be linear, covariance, rope or memory, got " + name);
}

int find_path(Op op, const std::string& name) {
  if (name == "auto") return kAuto;
  std::string names = "auto";
  for (const auto& [known, path] : kPathNames[op]) {
    if (name == known) return static_cast<int>(path);
    names += std::string(", ") + known;
  }
  throw std::runtime_error(std::string("the path of ") + kOpNames[op] + " must be one of " + names +
                           ", got " + name);
}

using Settings = std::array<std::atomic<int>, kOps>;

void set(Settings& settings, const std::string& op, const std::string& path) {
  for (int i = 0; i < kOps; ++i)
    if (op == "all" || i == find_op(op)) settings[i] = find_path(static_cast<Op>(i), path);
}

Settings& settings() {
  static Settings values{kAuto, kAuto, kAuto, kAuto};
  static const bool from_environment = [] {
    const char* text = std::getenv("NBL_CUDA_PATHS");
    std::istringstream entries(text ? text : "");
    for (std::string entry; std::getline(entries, entry, ',');) {
      const size_t equals = entry.find('=');
      if (equals == std::string::npos)
        throw std::runtime_error("NBL_CUDA_PATHS must be op=path,…, got " + entry);
      set(values, entry.substr(0, equals), entry.substr(equals + 1));
    }
    return true;
  }();
  (void)from_environment;
  return values;
}

Path path_of(Op op, int compute_capability) {
  const int setting = settings()[op].load(std::memory_order_relaxed);
  if (setting == static_cast<int>(Path::kKernel) && op == kCovariance)
    return can_run_hopper(compute_capability) ? Path::kHopper : Path::kPortable;
  if (setting != kAuto) return static_cast<Path>(setting);
  for (const Measured& m : kMeasured)
    if (m.op == op && m.compute_capability == compute_capability &&
        (m.path != Path::kHopper || can_run_hopper(compute_capability)))
      return m.path;
  return Path::kPlain;
}

}  // namespace

Path linear_path(int compute_capability) { return path_of(kLinear, compute_capability); }
Path covariance_path(int compute_capability) { return path_of(kCovariance, compute_capability); }
Path rope_path(int compute_capability) { return path_of(kRope, compute_capability); }
Path memory_path(int compute_capability) { return path_of(kMemory, compute_capability); }

std::map<std::string, std::string> cuda_paths(int compute_capability) {
  std::map<std::string, std::string> names;
  for (int op = 0; op < kOps; ++op) {
    const Path path = path_of(static_cast<Op>(op), compute_capability);
    for (const auto& [name, known] : kPathNames[op])
      if (known == path) names[kOpNames[op]] = name;
  }
  return names;
}

void set_cuda_path(const std::string& op, const std::string& path) { set(settings(), op, path); }

}  // namespace nbl
