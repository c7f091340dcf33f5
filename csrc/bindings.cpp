// The Python face of the core: integer pointers in, nothing of torch. Callers are checked in loraga/_native.py;
// what the core throws is turned into Python exceptions here and nowhere else.
#include <pybind11/pybind11.h>

#include "loraga/error.hpp"
#include "loraga/jacobi.hpp"

namespace py = pybind11;

namespace loraga {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Workspace workspace_at(std::uintptr_t address, std::size_t bytes) { return {pointer<void>(address), bytes}; }

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
    m.doc() = "Native core of loraga. Use it through loraga._native.";
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

    py::module_ cpu = m.def_submodule("cpu");
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
