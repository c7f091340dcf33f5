// Launches the Cholesky inverse: one thread block per matrix, which works in shared memory on the packed lower triangle
// where that fits, else in the output itself, which is small enough to stay in L2.
//
// In float64 the packed triangle of k = 80 takes 25 KiB, of k = 128 64.5 KiB, of k = 256 257 KiB; a block may have 227 KiB on
// sm_90 and sm_100, 163 KiB on sm_80 and 99 KiB on sm_86 and sm_89. So it is shared memory up to k = 239, 202 and 157,
// beyond every sketch up to adapter rank 16 (k = 128). A square array would end at 168, 142 and 111. In
// float32 it is half of that.
#include <algorithm>
#include <limits>

#include "cholesky_block.cuh"
#include "support.cuh"

namespace loraga::cuda {
namespace {

template <class Real>
__global__ void __launch_bounds__(kMaxWarps* kLanes, 1)
    cholesky_kernel(CholeskyProblem<Real> problem, bool in_shared) {
    extern __shared__ double shared[];
    __shared__ CholeskyBookkeeping<Real> book;
    invert_strided(problem, blockIdx.x, gridDim.x, in_shared ? reinterpret_cast<Real*>(shared) : nullptr, book);
}

}  // namespace

template <class Real>
void cholesky_inverse(const CholeskyProblem<Real>& problem, Target target) {
    check_cholesky_call(problem);
    if (problem.batch == 0) return;
    const DeviceGuard guard(target.device);
    const std::size_t triangle = static_cast<std::size_t>(problem.k) * (problem.k + 1) / 2 * sizeof(Real);
    const bool in_shared = triangle <= allow_all_shared_memory(cholesky_kernel<Real>, target.device);
    const std::size_t bytes = in_shared ? triangle : 0;
    const auto blocks = static_cast<int>(std::min<std::int64_t>(problem.batch, std::numeric_limits<int>::max()));
    cholesky_kernel<Real><<<blocks, cholesky_threads(problem.k), bytes, static_cast<cudaStream_t>(target.stream)>>>(
        problem, in_shared);
    LORAGA_CUDA_CHECK(cudaGetLastError());
}

template void cholesky_inverse(const CholeskyProblem<float>&, Target);
template void cholesky_inverse(const CholeskyProblem<double>&, Target);

}  // namespace loraga::cuda
