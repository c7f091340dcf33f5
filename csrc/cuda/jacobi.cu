// Launches the Jacobi SVD: one thread block per matrix. The two k x k working arrays lie in shared memory as far as
// they fit (on an H100 both up to k = 118 and one up to k = 168), else in a workspace per resident block, which is
// small enough to stay in L2.
#include <algorithm>

#include "jacobi_block.cuh"
#include "support.cuh"

namespace loraga::cuda {
namespace {

__global__ void __launch_bounds__(kMaxWarps* kLanes)
    jacobi_kernel(JacobiProblem problem, JacobiOptions options, int arrays_in_shared, double* workspace) {
    extern __shared__ double shared[];
    __shared__ Bookkeeping book;
    const std::int64_t square = static_cast<std::int64_t>(problem.k) * problem.k;
    double* own = workspace + blockIdx.x * (2 - arrays_in_shared) * square;
    double* rows = arrays_in_shared >= 1 ? shared : own;
    double* basis = arrays_in_shared == 2 ? shared + square : arrays_in_shared == 1 ? own : own + square;
    decompose_strided(problem, options, blockIdx.x, gridDim.x, rows, basis, book);
}

// How a problem is laid out on the current device.
struct Plan {
    int threads, blocks, arrays_in_shared;
    std::size_t shared_bytes, workspace_bytes;
};

Plan make_plan(std::int64_t batch, int k, int device) {
    check_jacobi_shape(batch, k);
    if (batch == 0) return {};
    int processors = 0, resident = 0;
    LORAGA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));

    Plan plan{};
    const std::size_t array = static_cast<std::size_t>(k) * k * sizeof(double);
    const std::size_t room = allow_all_shared_memory(jacobi_kernel, device);
    plan.arrays_in_shared = static_cast<int>(std::min<std::size_t>(room / array, 2));
    plan.shared_bytes = plan.arrays_in_shared * array;
    plan.threads = block_threads(k);
    LORAGA_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, jacobi_kernel, plan.threads, plan.shared_bytes));
    plan.blocks = static_cast<int>(std::min<std::int64_t>(batch, static_cast<std::int64_t>(processors) * resident));
    plan.workspace_bytes = plan.blocks * (2 - plan.arrays_in_shared) * array;
    return plan;
}

}  // namespace

std::size_t jacobi_svd_workspace(std::int64_t batch, int k, Target target) {
    const DeviceGuard guard(target.device);
    return make_plan(batch, k, target.device).workspace_bytes;
}

void jacobi_svd(const JacobiProblem& problem, const JacobiOptions& options, Workspace workspace, Target target) {
    const DeviceGuard guard(target.device);
    const Plan plan = make_plan(problem.batch, problem.k, target.device);
    check_jacobi_call(options, plan.workspace_bytes, workspace);
    if (problem.batch == 0) return;
    jacobi_kernel<<<plan.blocks, plan.threads, plan.shared_bytes, static_cast<cudaStream_t>(target.stream)>>>(
        problem, options, plan.arrays_in_shared, static_cast<double*>(workspace.data));
    LORAGA_CUDA_CHECK(cudaGetLastError());
}

void check_device(int device) {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    LORAGA_CUDA_CHECK(cudaFuncGetAttributes(&attributes, jacobi_kernel));
}

}  // namespace loraga::cuda
