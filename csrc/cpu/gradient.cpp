// The host twin of csrc/cuda/gradient_block.cuh: the same arithmetic, one entry after the other.
#include "loraga/gradient_steps.hpp"

namespace loraga::cpu {

void gradient_add(const GradientProblem& problem) {
    check_gradient_call(problem);
    const std::int64_t entries = count(problem);
    if (entries == 0) {
        if (!problem.finite_is_given) *problem.finite = 1;
        return;
    }
    const auto where = layout<std::int64_t>(problem);
    with_types(problem, [&](auto source, auto destination) {
        using Source = decltype(source);
        using Destination = decltype(destination);
        const auto* gradient = static_cast<const typename Source::Stored*>(problem.gradient);
        auto* sum = static_cast<typename Destination::Stored*>(problem.sum);
        if (!problem.finite_is_given) {
            bool finite = true;
            for (std::int64_t i = 0; i < entries; ++i)
                finite &= static_cast<bool>(std::isfinite(Source::load(gradient[where.offset(i)])));
            *problem.finite = finite;
        }
        if (*problem.finite == 0) return;
        for (std::int64_t i = 0; i < entries; ++i)
            sum[i] = Destination::store(
                added(Destination::load(sum[i]), problem.scale, Source::load(gradient[where.offset(i)])));
    });
}

}  // namespace loraga::cpu
