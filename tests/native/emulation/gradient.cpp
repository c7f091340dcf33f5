// The CUDA kernels of gradient_add on emulated threads, against the host twin: the same bits for every pair of types,
// layout and width of the index, and entries in order both one by one and in groups.
#include <cstdio>
#include <cstring>
#include <random>

#include "cuda/gradient_block.cuh"
#include "cuda_runtime.h"

namespace {

using loraga::Element;
using loraga::GradientProblem;

struct Shape {
    const char* name;
    int dims;
    std::int64_t sizes[loraga::kGradientMaxDims], strides[loraga::kGradientMaxDims];
};

constexpr Shape kShapes[] = {
    {"whole groups in order", 4, {5, 3, 2, 4}, {24, 8, 4, 1}},
    {"in order, five left over", 2, {9, 13}, {13, 1}},
    {"in order, less than a group", 1, {5}, {1}},
    {"channels last", 4, {5, 3, 2, 4}, {24, 1, 12, 3}},
    {"five dimensions, gaps", 5, {3, 2, 2, 2, 5}, {100, 1, 2, 50, 7}},
};

template <class Index>
void emulate(const GradientProblem& problem, int threads, bool grouped) {
    const auto entries = static_cast<Index>(loraga::count(problem));
    const auto where = loraga::layout<Index>(problem);
    loraga::with_types(problem, [&](auto source, auto destination) {
        using Source = decltype(source);
        using Destination = decltype(destination);
        const auto* gradient = static_cast<const typename Source::Stored*>(problem.gradient);
        auto* sum = static_cast<typename Destination::Stored*>(problem.sum);
        *problem.finite = 1;
        const auto step = static_cast<Index>(threads);
        emulation::run_block(threads, [&] {
            const auto first = static_cast<Index>(loraga::cuda::thread_index());
            if (grouped)
                loraga::cuda::check_grouped<Source, Index>(gradient, entries, first, step, problem.finite);
            else
                loraga::cuda::check_strided<Source, Index>(gradient, where, entries, first, step, problem.finite);
        });
        if (*problem.finite == 0) return;
        emulation::run_block(threads, [&] {
            const auto first = static_cast<Index>(loraga::cuda::thread_index());
            if (grouped)
                loraga::cuda::add_grouped<Source, Destination, Index>(sum, gradient, entries, first, step,
                                                                      problem.scale);
            else
                loraga::cuda::add_strided<Source, Destination, Index>(sum, gradient, where, entries, first, step,
                                                                      problem.scale);
        });
    });
}

}  // namespace

int main() {
    int wrong = 0;
    std::mt19937 generator(0);
    for (const auto& shape : kShapes)
        for (const auto gradient_type : {Element::kFloat32, Element::kBFloat16, Element::kFloat16})
            for (const auto sum_type : {Element::kFloat32, Element::kBFloat16})
                for (const bool bad : {false, true}) {
                    // Random bits below the exponents of Inf, so that all kinds of numbers occur; then one NaN.
                    std::vector<std::uint32_t> gradient(400), sum(120);
                    for (auto& word : gradient) word = generator() & 0xbbffbbffu;
                    for (auto& word : sum) word = generator() & 0xbf7fbf7fu;
                    GradientProblem problem{sum.data(), gradient.data(), nullptr, sum_type, gradient_type, shape.dims,
                                            {},         {},              0.37f,   false};
                    std::copy_n(shape.sizes, shape.dims, problem.sizes);
                    std::copy_n(shape.strides, shape.dims, problem.strides);
                    const auto last = static_cast<std::size_t>(loraga::reach(problem) - 1);
                    if (bad && gradient_type == Element::kFloat32) gradient[last] = 0x7fc00000u;
                    if (bad && gradient_type != Element::kFloat32)
                        reinterpret_cast<std::uint16_t*>(gradient.data())[last] = 0x7fff;
                    auto host_sum = sum, narrow_sum = sum, wide_sum = sum, grouped_sum = sum;
                    std::uint8_t host_finite = 9, narrow_finite = 9, wide_finite = 9, grouped_finite = 9;
                    const auto with = [&](std::vector<std::uint32_t>& to, std::uint8_t& finite) {
                        problem.sum = to.data();
                        problem.finite = &finite;
                        return problem;
                    };
                    loraga::cpu::gradient_add(with(host_sum, host_finite));
                    emulate<std::uint32_t>(with(narrow_sum, narrow_finite), 64, false);
                    emulate<std::int64_t>(with(wide_sum, wide_finite), 32, false);
                    const bool in_order = loraga::layout<std::uint32_t>(problem).is_in_order();
                    emulate<std::uint32_t>(with(grouped_sum, grouped_finite), 32, in_order);
                    const bool right = host_sum == narrow_sum && host_sum == wide_sum && host_sum == grouped_sum &&
                                       host_finite == !bad && narrow_finite == !bad && wide_finite == !bad &&
                                       grouped_finite == !bad && (host_sum == sum) == bad;
                    std::printf("%s, %d onto %d%s: %s\n", shape.name, static_cast<int>(gradient_type),
                                static_cast<int>(sum_type), bad ? ", NaN" : "", right ? "same bits" : "DIFFERENT");
                    wrong += !right;
                }
    return wrong;
}
