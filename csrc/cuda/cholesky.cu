// Launches the Cholesky inverse: one thread block per matrix, which works in shared memory on the packed lower triangle
// where that fits beside the panel, else in the output itself. That is at most 2 MiB (k = 512, float64) and comes from
// L2, read and written once a panel.
//
// In float64 triangle and panel of k = 80 take 35 KiB, of k = 128 80.5 KiB, of k = 256 289 KiB; a block may have 227 KiB
// on sm_90 and sm_100, 163 KiB on sm_80, 99 KiB on sm_86, sm_89 and sm_120. So it is shared memory up to k = 224, 187
// and 141, in float32 up to 324, 271 and 208.
#include <algorithm>
#include <limits>

#include "cholesky_block.cuh"
#include "support.cuh"

namespace loraga::cuda {
namespace {

template <class Real, bool kInShared>
__global__ void __launch_bounds__(kCholeskyMaxWarps* kLanes, 1) cholesky_kernel(CholeskyProblem<Real> problem) {
    extern __shared__ __align__(32) unsigned char shared[];
    __shared__ CholeskyBookkeeping<Real> book;
    Real* panel = reinterpret_cast<Real*>(shared);
    invert_strided<kInShared>(problem, blockIdx.x, gridDim.x, panel, panel + kPanel * cholesky_stride(problem.k), book);
}

template <class Real, bool kInShared>
bool launch(const CholeskyProblem<Real>& problem, Target target) {
    const std::size_t k = problem.k, triangle = kInShared ? k * (k + 1) / 2 : 0;
    const std::size_t bytes = (kPanel * cholesky_stride(problem.k) + triangle) * sizeof(Real);
    if (bytes > allow_all_shared_memory(cholesky_kernel<Real, kInShared>, target.device)) return false;
    const auto blocks = static_cast<int>(std::min<std::int64_t>(problem.batch, std::numeric_limits<int>::max()));
    cholesky_kernel<Real, kInShared>
        <<<blocks, cholesky_threads(problem.k), bytes, static_cast<cudaStream_t>(target.stream)>>>(problem);
    LORAGA_CUDA_CHECK(cudaGetLastError());
    return true;
}

}  // namespace

template <class Real>
void cholesky_inverse(const CholeskyProblem<Real>& problem, Target target) {
    check_cholesky_call(problem);
    if (problem.batch == 0) return;
    const DeviceGuard guard(target.device);
    if (launch<Real, true>(problem, target) || launch<Real, false>(problem, target)) return;
    LORAGA_REQUIRE(false, "k is " << problem.k << ", for which this device has too little shared memory");
}

template void cholesky_inverse(const CholeskyProblem<float>&, Target);
template void cholesky_inverse(const CholeskyProblem<double>&, Target);

}  // namespace loraga::cuda
