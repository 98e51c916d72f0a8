// The Python module _C_cuda: importing it registers the CUDA kernels of the operators in ops.cpp.
// No tensors pass through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "cuda/paths.h"

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of nbl_kernels";
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("cuda_version") = NBL_CUDA_VERSION;
  m.attr("archs") = NBL_CUDA_ARCHS;
  m.def("cuda_paths", &nbl::cuda_paths, pybind11::arg("compute_capability"),
        "Which implementation each operator runs on a device of this compute capability.");
  m.def("set_cuda_path", &nbl::set_cuda_path, pybind11::arg("op"), pybind11::arg("path"),
        "Selects one; \"auto\" is what has been measured to be the best.");
}
