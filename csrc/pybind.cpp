// The Python module _C: importing it registers the operators of ops.cpp; what it defines itself
// says how it was built and which kernels are in use. No tensors pass through here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "cpu/dispatch.h"
#include "cpu/huge_pages.h"
#include "cpu/read_loop.h"
#include "nbl/cuda/linear_tiles.h"

namespace {

namespace py = pybind11;

// For nbl_kernels.jit, which has no compiled launcher: the kernel as C++ names it, and its grid.
py::dict skinny_linear_plan(const std::string& dtype, bool swiglu, bool norm, bool vector,
                            int64_t m, int64_t n, int64_t k, int sm_count,
                            const std::string& format) {
  if (m < 1 || n < 1 || k < 0 || sm_count < 1)
    throw std::invalid_argument("m, n and sm_count must be positive, k not negative");
  nbl::LinearProblem problem{{}, {}, swiglu, norm, vector, m, n, k, sm_count, /*splits=*/0};
  if (dtype == "float32")
    problem.dtype = nbl::DType::kFloat32;
  else if (dtype == "bfloat16")
    problem.dtype = nbl::DType::kBFloat16;
  else if (dtype == "float16")
    problem.dtype = nbl::DType::kFloat16;
  else
    throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + dtype);
  if (format == "int8")
    problem.format = nbl::WeightFormat::kInt8;
  else if (format == "fp8")
    problem.format = nbl::WeightFormat::kFp8;
  else if (format == "int4")
    problem.format = nbl::WeightFormat::kInt4;
  else if (!format.empty())
    throw std::invalid_argument("format must be int8, fp8, int4 or empty, got " + format);
  py::dict plan;
  nbl::with_linear_tile(problem, [&](auto tile) {
    using Tile = decltype(tile);
    const nbl::LinearGeometry geometry = nbl::linear_geometry<Tile>(problem);
    plan["kernel"] = nbl::linear_kernel_name<Tile>();
    plan["grid"] = py::make_tuple(geometry.grid_x, geometry.grid_y);
    plan["threads"] = nbl::kLinearThreads;
    plan["shared_bytes"] = geometry.shared_bytes;
    plan["split_k"] = geometry.split_k;
    plan["partials"] = geometry.partials;
    plan["counters"] = geometry.counters;
  });
  return plan;
}

// Its argument, as bytes; addresses are integers, 0 for none.
py::bytes skinny_linear_params(uintptr_t x, int64_t x_stride, uintptr_t norm_weight, float norm_eps,
                               uintptr_t weight, int64_t weight_stride, uintptr_t bias,
                               uintptr_t residual, int64_t residual_stride, uintptr_t out,
                               int64_t out_stride, int m, int n, int k, bool swiglu, int split_k,
                               uintptr_t partials, uintptr_t counters) {
  nbl::LinearParams p{};
  p.x = reinterpret_cast<const void*>(x);
  p.x_stride = x_stride;
  p.norm_weight = reinterpret_cast<const void*>(norm_weight);
  p.norm_eps = norm_eps;
  p.weight = reinterpret_cast<const void*>(weight);
  p.weight_stride = weight_stride;
  p.bias = reinterpret_cast<const void*>(bias);
  p.residual = reinterpret_cast<const void*>(residual);
  p.residual_stride = residual_stride;
  p.out = reinterpret_cast<void*>(out);
  p.out_stride = out_stride;
  p.m = m;
  p.n = n;
  p.k = k;
  p.swiglu = swiglu;
  p.split_k = split_k;
  p.partials = reinterpret_cast<float*>(partials);
  p.counters = reinterpret_cast<uint32_t*>(counters);
  return {reinterpret_cast<const char*>(&p), sizeof p};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels and operator schemas of nbl_kernels";
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.def(
      "cpu_capability", [] { return nbl::cpu_kernels().name; },
      "The instruction set whose kernels are in use.");
  m.def("cpu_capabilities", &nbl::supported_cpu_capabilities,
        "Those this processor can run, best first.");
  m.def("set_cpu_capability", &nbl::set_cpu_capability, py::arg("name"),
        "Selects the kernels of one of cpu_capabilities(); \"\" selects the best.");
  m.def("use_huge_pages", &nbl::use_huge_pages, py::arg("address"), py::arg("bytes"),
        py::call_guard<py::gil_scoped_release>(), "See nbl_kernels.use_huge_pages.");
  m.def("read_loop", &nbl::read_loop, py::arg("address"), py::arg("bytes"), py::arg("streams"),
        py::arg("ahead"), "For benchmarks: reads memory with all threads (csrc/cpu/read_loop.h).");
  m.def("skinny_linear_plan", &skinny_linear_plan, py::arg("dtype"), py::arg("swiglu"),
        py::arg("norm"), py::arg("vector"), py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("sm_count"), py::arg("format") = "",
        "The CUDA kernel of a skinny linear, its grid and its workspace.");
  m.def("skinny_linear_params", &skinny_linear_params, py::kw_only(), py::arg("x"),
        py::arg("x_stride"), py::arg("norm_weight"), py::arg("norm_eps"), py::arg("weight"),
        py::arg("weight_stride"), py::arg("bias"), py::arg("residual"), py::arg("residual_stride"),
        py::arg("out"), py::arg("out_stride"), py::arg("m"), py::arg("n"), py::arg("k"),
        py::arg("swiglu"), py::arg("split_k"), py::arg("partials"), py::arg("counters"),
        "The bytes of its LinearParams.");
}
