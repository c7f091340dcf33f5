// Adds one gradient, in whatever layout and floating type autograd gave it, to a dense sum.
//
// The interface of the core: raw pointers, shapes and a stream, nothing of torch. Nothing is allocated.
#pragma once

#include <cstdint>

#include "loraga/target.hpp"

namespace loraga {

constexpr int kGradientMaxDims = 5;

enum class Element : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// sum += scale * gradient, in the order of the gradient's indices, unless the gradient holds NaN or Inf: then nothing
// is added. The sum is taken in float32 with one rounding (a fused multiply-add) and rounded to nearest when stored.
struct GradientProblem {
    void* sum;             // dense, as many entries as the gradient; must not overlap it
    const void* gradient;  // entry (i, j, ...) lies `i * strides[0] + j * strides[1] + ...` entries from here
    std::uint8_t* finite;  // (1,): 1 where the gradient was added, else 0
    Element sum_type;      // kFloat32 or kBFloat16
    Element gradient_type;
    int dims;  // 0 .. kGradientMaxDims
    std::int64_t sizes[kGradientMaxDims];
    std::int64_t strides[kGradientMaxDims];  // not negative
    float scale;
    bool finite_is_given;  // `finite` is read, not written: the caller has looked at the whole, and this is a part
};

namespace cpu {
void gradient_add(const GradientProblem& problem);
}

namespace cuda {
// Queued on the stream; the host does not wait.
void gradient_add(const GradientProblem& problem, Target target);
}  // namespace cuda

}  // namespace loraga
