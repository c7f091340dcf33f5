// Launches the Jacobi SVD: one thread block per matrix. The two k x k working arrays lie in shared memory as far as
// they fit (on an H100 both up to k = 119 and one up to k = 168), else in a workspace per resident block. That stays in
// L2 for as many matrices as it holds: of k = 512, each takes 4 MiB.
#include <algorithm>

#include "jacobi_block.cuh"
#include "support.cuh"

namespace loraga::cuda {
namespace {

// How many of the two arrays lie in shared memory is a constant of the kernel, so that the compiler knows the address
// space of each.
template <int kArraysInShared>
__global__ void __launch_bounds__(kMaxWarps* kLanes, 1)
    jacobi_kernel(JacobiProblem problem, JacobiOptions options, double* workspace) {
    extern __shared__ double shared[];
    const int k = problem.k, square = k * k;
    double* arrays = shared + Bookkeeping::kVectors * k;
    double* own = workspace + static_cast<std::int64_t>(blockIdx.x) * (2 - kArraysInShared) * square;
    double* rows = kArraysInShared >= 1 ? arrays : own;
    double* basis = kArraysInShared == 2 ? arrays + square : kArraysInShared == 1 ? own : own + square;
    decompose_strided(problem, options, blockIdx.x, gridDim.x, rows, basis, Bookkeeping(shared, k));
}

using Kernel = void (*)(JacobiProblem, JacobiOptions, double*);
constexpr Kernel kKernels[] = {jacobi_kernel<0>, jacobi_kernel<1>, jacobi_kernel<2>};

// Of k = 512, 64 matrices at a time.
constexpr std::int64_t kMostWorkspace = std::int64_t{256} << 20;

// How a problem is laid out on the current device.
struct Plan {
    Kernel kernel;
    int threads, blocks;
    std::size_t shared_bytes, workspace_bytes;
};

Plan make_plan(std::int64_t batch, int k, int device) {
    check_jacobi_shape(batch, k);
    if (batch == 0) return {};
    int processors = 0, resident = 0;
    LORAGA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));

    Plan plan{};
    const std::size_t array = static_cast<std::size_t>(k) * k * sizeof(double);
    int in_shared = 2;
    for (;; --in_shared) {  // none of them always fits
        plan.kernel = kKernels[in_shared];
        plan.shared_bytes = Bookkeeping::kVectors * k * sizeof(double) + in_shared * array;
        if (plan.shared_bytes <= allow_all_shared_memory(plan.kernel, device)) break;
    }
    plan.threads = block_threads(k);
    LORAGA_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, plan.kernel, plan.threads, plan.shared_bytes));
    const std::size_t own = (2 - in_shared) * array;
    const std::int64_t affordable = own == 0 ? batch : std::max<std::int64_t>(1, kMostWorkspace / own);
    plan.blocks = static_cast<int>(
        std::min({batch, static_cast<std::int64_t>(processors) * resident, affordable}));
    plan.workspace_bytes = plan.blocks * own;
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
    plan.kernel<<<plan.blocks, plan.threads, plan.shared_bytes, static_cast<cudaStream_t>(target.stream)>>>(
        problem, options, static_cast<double*>(workspace.data));
    LORAGA_CUDA_CHECK(cudaGetLastError());
}

void check_device(int device) {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    LORAGA_CUDA_CHECK(cudaFuncGetAttributes(&attributes, jacobi_kernel<0>));
}

}  // namespace loraga::cuda
