// The kernel table of the best instruction set of this processor.
#pragma once

#include <string>
#include <vector>

#include "nbl/cpu/kernels.h"

namespace nbl {

const CpuKernels& cpu_kernels();
std::vector<std::string> supported_cpu_capabilities();  // best first
void set_cpu_capability(const std::string& name);       // one of the supported; "" for the best

// Whether the processor multiplies tiles of bf16 (AMX): ATen does with them, our kernels do not.
bool has_amx_bf16();

}  // namespace nbl
