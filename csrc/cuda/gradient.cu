// Launches gradient_add: one pass that looks for NaN and Inf, one that adds where there was none.
#include <algorithm>

#include "gradient_block.cuh"
#include "support.cuh"

namespace loraga::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 2048 / kThreads;  // as many threads as fit: these passes wait for memory only

bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % sizeof(uint4) == 0; }

template <class Index>
__device__ Index first_index() {
    return static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
}

template <class Index>
__device__ Index index_step() {
    return static_cast<Index>(gridDim.x) * blockDim.x;
}

template <class Source, class Index>
__global__ void __launch_bounds__(kThreads)
    check_kernel(const typename Source::Stored* gradient, Layout<Index> where, Index entries, std::uint8_t* finite) {
    check_strided<Source, Index>(gradient, where, entries, first_index<Index>(), index_step<Index>(), finite);
}

template <class Source, class Destination, class Index>
__global__ void __launch_bounds__(kThreads)
    add_kernel(typename Destination::Stored* sum, const typename Source::Stored* gradient, Layout<Index> where,
               Index entries, const std::uint8_t* finite, float scale) {
    if (*finite == 0) return;
    add_strided<Source, Destination, Index>(sum, gradient, where, entries, first_index<Index>(), index_step<Index>(),
                                            scale);
}

template <class Source, class Index>
__global__ void __launch_bounds__(kThreads)
    check_in_order_kernel(const typename Source::Stored* gradient, Index entries, std::uint8_t* finite) {
    check_grouped<Source, Index>(gradient, entries, first_index<Index>(), index_step<Index>(), finite);
}

template <class Source, class Destination, class Index>
__global__ void __launch_bounds__(kThreads)
    add_in_order_kernel(typename Destination::Stored* sum, const typename Source::Stored* gradient, Index entries,
                        const std::uint8_t* finite, float scale) {
    if (*finite == 0) return;
    add_grouped<Source, Destination, Index>(sum, gradient, entries, first_index<Index>(), index_step<Index>(), scale);
}

template <class Index>
void launch(const GradientProblem& problem, int most_blocks, cudaStream_t stream) {
    const std::int64_t entries = count(problem);
    const auto where = layout<Index>(problem);
    const bool grouped = where.is_in_order() && is_aligned(problem.gradient) && is_aligned(problem.sum);
    const std::int64_t threads = grouped ? (entries + kGroup - 1) / kGroup : entries;
    const auto blocks = static_cast<int>(std::min<std::int64_t>((threads + kThreads - 1) / kThreads, most_blocks));
    with_types(problem, [&](auto source, auto destination) {
        using Source = decltype(source);
        using Destination = decltype(destination);
        const auto* gradient = static_cast<const typename Source::Stored*>(problem.gradient);
        auto* sum = static_cast<typename Destination::Stored*>(problem.sum);
        const auto all = static_cast<Index>(entries);
        if (!problem.finite_is_given) {
            if (grouped)
                check_in_order_kernel<Source, Index><<<blocks, kThreads, 0, stream>>>(gradient, all, problem.finite);
            else
                check_kernel<Source, Index><<<blocks, kThreads, 0, stream>>>(gradient, where, all, problem.finite);
            LORAGA_CUDA_CHECK(cudaGetLastError());
        }
        if (grouped)
            add_in_order_kernel<Source, Destination, Index>
                <<<blocks, kThreads, 0, stream>>>(sum, gradient, all, problem.finite, problem.scale);
        else
            add_kernel<Source, Destination, Index>
                <<<blocks, kThreads, 0, stream>>>(sum, gradient, where, all, problem.finite, problem.scale);
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
