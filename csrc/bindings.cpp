// The Python face of the core: integer pointers in, nothing of torch. Callers are checked in loraga/ops/native_core.py;
// what the core throws is turned into Python exceptions here and nowhere else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "loraga/cholesky.hpp"
#include "loraga/error.hpp"
#include "loraga/gradient.hpp"
#include "loraga/jacobi.hpp"
#include "loraga/philox.hpp"

namespace py = pybind11;

namespace loraga {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Workspace workspace_at(std::uintptr_t address, std::size_t bytes) { return {pointer<void>(address), bytes}; }

GradientProblem gradient_problem(std::uintptr_t sum, std::uintptr_t gradient, std::uintptr_t finite, Element sum_type,
                                 Element gradient_type, const std::vector<std::int64_t>& sizes,
                                 const std::vector<std::int64_t>& strides, float scale, bool finite_is_given) {
    GradientProblem problem{pointer<void>(sum), pointer<const void>(gradient), pointer<std::uint8_t>(finite),
                            sum_type,           gradient_type,                 static_cast<int>(sizes.size()),
                            {},                 {},                            scale,
                            finite_is_given};
    LORAGA_REQUIRE(sizes.size() == strides.size(), sizes.size() << " sizes, " << strides.size() << " strides");
    LORAGA_REQUIRE(sizes.size() <= kGradientMaxDims,
                   "the gradient has " << sizes.size() << " dimensions, allowed are 0 to " << kGradientMaxDims);
    std::copy(sizes.begin(), sizes.end(), problem.sizes);
    std::copy(strides.begin(), strides.end(), problem.strides);
    return problem;
}

template <class Real>
void bind_cholesky(py::module_& m, const char* name) {
    using Problem = CholeskyProblem<Real>;
    py::class_<Problem>(m, name).def(
        py::init([](std::uintptr_t gram, std::uintptr_t inverse, std::uintptr_t status, std::int64_t batch, int k,
                    double shift) {
            return Problem{pointer<const Real>(gram), pointer<Real>(inverse), pointer<std::int32_t>(status), batch, k,
                           shift};
        }),
        py::kw_only(), py::arg("gram"), py::arg("inverse"), py::arg("status"), py::arg("batch"), py::arg("k"),
        py::arg("shift"));
}

py::dict build_info() {
    py::dict info;
    info["version"] = LORAGA_VERSION;
    info["cuda"] = LORAGA_WITH_CUDA != 0;
    info["cuda_architectures"] = LORAGA_CUDA_ARCHITECTURES_BUILT;
    info["cuda_compiler"] = LORAGA_CUDA_COMPILER;
    info["cxx_compiler"] = LORAGA_CXX_COMPILER;
    return info;
}

}  // namespace
}  // namespace loraga

PYBIND11_MODULE(_C, m) {
    using namespace loraga;
    m.doc() = "Native core of loraga. Use it through loraga.ops.native_core.";
    py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
    m.def("build_info", &build_info);

    py::class_<JacobiOptions>(m, "JacobiOptions")
        .def(py::init<>())
        .def_readwrite("tolerance", &JacobiOptions::tolerance)
        .def_readwrite("max_sweeps", &JacobiOptions::max_sweeps);
    py::class_<JacobiProblem>(m, "JacobiProblem")
        .def(py::init([](std::uintptr_t core, std::uintptr_t u, std::uintptr_t s, std::uintptr_t vh,
                         std::uintptr_t status, std::int64_t batch, int k) {
                 return JacobiProblem{pointer<const float>(core),
                                      pointer<float>(u),
                                      pointer<float>(s),
                                      pointer<float>(vh),
                                      pointer<std::int32_t>(status),
                                      batch,
                                      k};
             }),
             py::kw_only(), py::arg("core"), py::arg("u"), py::arg("s"), py::arg("vh"), py::arg("status"),
             py::arg("batch"), py::arg("k"));
    m.attr("JACOBI_MAX_K") = kJacobiMaxK;

    bind_cholesky<float>(m, "CholeskyProblemFloat32");
    bind_cholesky<double>(m, "CholeskyProblemFloat64");
    m.attr("CHOLESKY_MAX_K") = kCholeskyMaxK;

    py::enum_<Element>(m, "Element")
        .value("float32", Element::kFloat32)
        .value("bfloat16", Element::kBFloat16)
        .value("float16", Element::kFloat16);
    py::class_<GradientProblem>(m, "GradientProblem")
        .def(py::init(&gradient_problem), py::kw_only(), py::arg("sum"), py::arg("gradient"), py::arg("finite"),
             py::arg("sum_type"), py::arg("gradient_type"), py::arg("sizes"), py::arg("strides"), py::arg("scale"),
             py::arg("finite_is_given"));

    py::module_ cpu = m.def_submodule("cpu");
    cpu.def("cholesky_inverse", &loraga::cpu::cholesky_inverse<float>, py::arg("problem"),
            py::call_guard<py::gil_scoped_release>());
    cpu.def("cholesky_inverse", &loraga::cpu::cholesky_inverse<double>, py::arg("problem"),
            py::call_guard<py::gil_scoped_release>());
    cpu.def(
        "fill_uniform",
        [](std::uintptr_t out, std::int64_t count, std::uint64_t seed) {
            loraga::cpu::fill_uniform(pointer<float>(out), count, seed);
        },
        py::arg("out"), py::arg("count"), py::arg("seed"), py::call_guard<py::gil_scoped_release>());
    cpu.def("gradient_add", &loraga::cpu::gradient_add, py::arg("problem"), py::call_guard<py::gil_scoped_release>());
    cpu.def("jacobi_svd_workspace", &loraga::cpu::jacobi_svd_workspace, py::arg("batch"), py::arg("k"));
    cpu.def(
        "jacobi_svd",
        [](const JacobiProblem& problem, const JacobiOptions& options, std::uintptr_t workspace, std::size_t bytes) {
            loraga::cpu::jacobi_svd(problem, options, workspace_at(workspace, bytes));
        },
        py::arg("problem"), py::arg("options"), py::arg("workspace"), py::arg("workspace_bytes"),
        py::call_guard<py::gil_scoped_release>());

#if LORAGA_WITH_CUDA
    py::module_ cuda = m.def_submodule("cuda");
    py::class_<loraga::cuda::Target>(cuda, "Target")
        .def(py::init([](int device, std::uintptr_t stream) {
                 return loraga::cuda::Target{device, pointer<void>(stream)};
             }),
             py::kw_only(), py::arg("device"), py::arg("stream"));
    cuda.def("check_device", &loraga::cuda::check_device, py::arg("device"), py::call_guard<py::gil_scoped_release>());
    cuda.def("cholesky_inverse", &loraga::cuda::cholesky_inverse<float>, py::arg("problem"), py::arg("target"),
             py::call_guard<py::gil_scoped_release>());
    cuda.def("cholesky_inverse", &loraga::cuda::cholesky_inverse<double>, py::arg("problem"), py::arg("target"),
             py::call_guard<py::gil_scoped_release>());
    cuda.def("gradient_add", &loraga::cuda::gradient_add, py::arg("problem"), py::arg("target"),
             py::call_guard<py::gil_scoped_release>());
    cuda.def("jacobi_svd_workspace", &loraga::cuda::jacobi_svd_workspace, py::arg("batch"), py::arg("k"),
             py::arg("target"), py::call_guard<py::gil_scoped_release>());
    cuda.def(
        "jacobi_svd",
        [](const JacobiProblem& problem, const JacobiOptions& options, std::uintptr_t workspace, std::size_t bytes,
           const loraga::cuda::Target& target) {
            loraga::cuda::jacobi_svd(problem, options, workspace_at(workspace, bytes), target);
        },
        py::arg("problem"), py::arg("options"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("target"),
        py::call_guard<py::gil_scoped_release>());
#endif
}
