// Launches gradient_add: one pass that looks for NaN and Inf, one that adds where there was none.
#include <algorithm>

#include "gradient_block.cuh"
#include "support.cuh"

namespace loraga::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 2048 / kThreads;  // as many threads as fit: these passes wait for memory only

template <class Index>
__device__ Index first_entry() {
    return static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
}

template <class Index>
__device__ Index entry_step() {
    return static_cast<Index>(gridDim.x) * blockDim.x;
}

template <class Source, class Index>
__global__ void __launch_bounds__(kThreads)
    check_kernel(const typename Source::Stored* gradient, Layout<Index> where, Index entries, std::uint8_t* finite) {
    check_strided<Source, Index>(gradient, where, entries, first_entry<Index>(), entry_step<Index>(), finite);
}

template <class Source, class Destination, class Index>
__global__ void __launch_bounds__(kThreads)
    add_kernel(typename Destination::Stored* sum, const typename Source::Stored* gradient, Layout<Index> where,
               Index entries, const std::uint8_t* finite, float scale) {
    if (*finite == 0) return;
    add_strided<Source, Destination, Index>(sum, gradient, where, entries, first_entry<Index>(), entry_step<Index>(),
                                            scale);
}

template <class Index>
void launch(const GradientProblem& problem, int most_blocks, cudaStream_t stream) {
    const std::int64_t entries = count(problem);
    const auto where = layout<Index>(problem);
    const auto blocks = static_cast<int>(std::min<std::int64_t>((entries + kThreads - 1) / kThreads, most_blocks));
    with_types(problem, [&](auto source, auto destination) {
        using Source = decltype(source);
        using Destination = decltype(destination);
        const auto* gradient = static_cast<const typename Source::Stored*>(problem.gradient);
        if (!problem.finite_is_given) {
            check_kernel<Source, Index>
                <<<blocks, kThreads, 0, stream>>>(gradient, where, static_cast<Index>(entries), problem.finite);
            LORAGA_CUDA_CHECK(cudaGetLastError());
        }
        add_kernel<Source, Destination, Index><<<blocks, kThreads, 0, stream>>>(
            static_cast<typename Destination::Stored*>(problem.sum), gradient, where, static_cast<Index>(entries),
            problem.finite, problem.scale);
        LORAGA_CUDA_CHECK(cudaGetLastError());
    });
}

}  // namespace

void gradient_add(const GradientProblem& problem, Target target) {
    check_gradient_call(problem);
    const DeviceGuard guard(target.device);
    const auto stream = static_cast<cudaStream_t>(target.stream);
    if (!problem.finite_is_given) LORAGA_CUDA_CHECK(cudaMemsetAsync(problem.finite, 1, 1, stream));
    if (count(problem) == 0) return;
    int processors = 0;
    LORAGA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, target.device));
    const int most_blocks = processors * kBlocksPerProcessor;
    // Division is several times faster in 32 bits. Indices go past the end by one step of the grid at most.
    const std::int64_t past = static_cast<std::int64_t>(most_blocks) * kThreads;
    if (std::max(count(problem) + past, reach(problem)) <= 0xffffffffll)
        launch<std::uint32_t>(problem, most_blocks, stream);
    else
        launch<std::int64_t>(problem, most_blocks, stream);
}

}  // namespace loraga::cuda
