// The Python module _C: importing it registers the operators of ops.cpp; what it defines itself
// says how it was built and which kernels are in use. No tensors pass through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "cpu/dispatch.h"
#include "cpu/read_loop.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels and operator schemas of nbl_kernels";
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.def(
      "cpu_capability", [] { return nbl::cpu_kernels().name; },
      "The instruction set whose kernels are in use.");
  m.def("cpu_capabilities", &nbl::supported_cpu_capabilities,
        "Those this processor can run, best first.");
  m.def("set_cpu_capability", &nbl::set_cpu_capability, pybind11::arg("name"),
        "Selects the kernels of one of cpu_capabilities(); \"\" selects the best.");
  m.def("read_loop", &nbl::read_loop, pybind11::arg("address"), pybind11::arg("bytes"),
        pybind11::arg("streams"), pybind11::arg("ahead"),
        "For benchmarks: reads memory with all threads (csrc/cpu/read_loop.h).");
}
