// What the host twin and the CUDA kernels of gradient_add must agree on, written once: the floating types, where an
// entry of a gradient lies, and the arithmetic.
#pragma once

#include <cmath>
#include <cstring>

#include "loraga/error.hpp"
#include "loraga/gradient.hpp"
#include "loraga/portable.hpp"

namespace loraga {

template <class To, class From>
LORAGA_HOST_DEVICE To same_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "another size");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

// Each type: how a value is stored, and the way to and from float32. The conversions are integer arithmetic, so that
// host and device agree on every bit, denormal numbers included.
struct Float32 {
    using Stored = float;
    LORAGA_HOST_DEVICE_MEMBER static float load(Stored value) { return value; }
    LORAGA_HOST_DEVICE_MEMBER static Stored store(float value) { return value; }
};

struct BFloat16 {
    using Stored = std::uint16_t;
    LORAGA_HOST_DEVICE_MEMBER static float load(Stored value) {
        return same_bits<float>(static_cast<std::uint32_t>(value) << 16);
    }
    LORAGA_HOST_DEVICE_MEMBER static Stored store(float value) {  // to nearest, ties to even
        const auto bits = same_bits<std::uint32_t>(value);
        if (value != value) return static_cast<Stored>(bits >> 16 | 0x40u);  // rounding could carry a NaN to Inf
        return static_cast<Stored>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
};

struct Float16 {
    using Stored = std::uint16_t;
    LORAGA_HOST_DEVICE_MEMBER static float load(Stored value) {
        const std::uint32_t sign = (value & 0x8000u) << 16, exponent = value & 0x7c00u;
        const std::uint32_t magnitude = (value & 0x7fffu) << 13;
        if (exponent == 0) {
            const float size = static_cast<float>(value & 0x3ffu) * 5.9604644775390625e-8f;  // 2^-24
            return sign != 0 ? -size : size;
        }
        return same_bits<float>(sign | (exponent == 0x7c00u ? magnitude | 0x7f800000u : magnitude + (112u << 23)));
    }
};

// A strided array with as few dimensions as describe it. Index holds every index and offset.
template <class Index>
struct Layout {
    int dims;
    Index sizes[kGradientMaxDims];
    Index strides[kGradientMaxDims];

    // Where entry number `i` in row-major order lies.
    LORAGA_HOST_DEVICE_MEMBER Index offset(Index i) const {
        Index sum = 0;
        for (int d = kGradientMaxDims - 1; d > 0; --d) {  // a fixed count: unrolled, the arrays stay in registers
            if (d >= dims) continue;
            const Index outer = i / sizes[d];
            sum += (i - outer * sizes[d]) * strides[d];
            i = outer;
        }
        return dims == 0 ? 0 : sum + i * strides[0];
    }

    // Whether entry number i lies i entries from the start.
    bool is_in_order() const { return dims == 0 || (dims == 1 && strides[0] == 1); }
};

inline std::int64_t count(const GradientProblem& problem) {
    std::int64_t entries = 1;
    for (int d = 0; d < problem.dims; ++d) entries *= problem.sizes[d];
    return entries;
}

// One past the furthest offset.
inline std::int64_t reach(const GradientProblem& problem) {
    std::int64_t last = 0;
    for (int d = 0; d < problem.dims; ++d) last += (problem.sizes[d] - 1) * problem.strides[d];
    return last + 1;
}

// Leaves out dimensions of size one and joins neighbours that lie one behind the other.
template <class Index>
Layout<Index> layout(const GradientProblem& problem) {
    Layout<Index> result{};
    for (int d = 0; d < problem.dims; ++d) {
        const auto size = static_cast<Index>(problem.sizes[d]), stride = static_cast<Index>(problem.strides[d]);
        const int last = result.dims - 1;
        if (size == 1) continue;
        if (last >= 0 && result.strides[last] == size * stride) {
            result.sizes[last] *= size;
            result.strides[last] = stride;
        } else {
            result.sizes[last + 1] = size;
            result.strides[last + 1] = stride;
            ++result.dims;
        }
    }
    return result;
}

LORAGA_HOST_DEVICE float added(float sum, float scale, float value) { return fmaf(scale, value, sum); }

// Calls work(source, destination) with values of the types named in the problem.
template <class Work>
void with_types(const GradientProblem& problem, const Work& work) {
    const auto with_source = [&](auto source) {
        if (problem.sum_type == Element::kFloat32)
            work(source, Float32{});
        else
            work(source, BFloat16{});
    };
    if (problem.gradient_type == Element::kFloat32) with_source(Float32{});
    if (problem.gradient_type == Element::kBFloat16) with_source(BFloat16{});
    if (problem.gradient_type == Element::kFloat16) with_source(Float16{});
}

inline void check_gradient_call(const GradientProblem& problem) {
    LORAGA_REQUIRE(problem.dims >= 0 && problem.dims <= kGradientMaxDims,
                   "the gradient has " << problem.dims << " dimensions, allowed are 0 to " << kGradientMaxDims);
    LORAGA_REQUIRE(problem.sum_type == Element::kFloat32 || problem.sum_type == Element::kBFloat16,
                   "the sum has element type " << static_cast<int>(problem.sum_type));
    LORAGA_REQUIRE(problem.gradient_type >= Element::kFloat32 && problem.gradient_type <= Element::kFloat16,
                   "the gradient has element type " << static_cast<int>(problem.gradient_type));
    for (int d = 0; d < problem.dims; ++d)
        LORAGA_REQUIRE(problem.sizes[d] >= 0 && problem.strides[d] >= 0,
                       "dimension " << d << " has size " << problem.sizes[d] << " and stride " << problem.strides[d]);
}

}  // namespace loraga
