// Inverses of the Cholesky factors of many small Gram matrices.
//
// The interface of the core: raw pointers, shapes and a stream, nothing of torch. The caller brings no workspace: where
// a matrix does not fit into shared memory, its output is worked on in place, and the host twin allocates what it needs.
#pragma once

#include <cstdint>

#include "loraga/target.hpp"

namespace loraga {

constexpr int kCholeskyMaxK = 512;

// inverse = L^-1 with L L' = gram + shift * trace(gram) * I, L lower triangular with a positive diagonal.
// The square of an entry of its diagonal is at least shift * trace(gram): less would be an error of rounding.
// All arrays are dense and row-major; the output must not overlap the input. Real is float or double, and so is all
// arithmetic.
template <class Real>
struct CholeskyProblem {
    const Real* gram;      // (batch, k, k), symmetric; only the lower triangle is read
    Real* inverse;         // (batch, k, k), zero above the diagonal; all NaN where the status is not 0
    std::int32_t* status;  // (batch,), 0 or the order of the first leading minor that is not positive and finite
    std::int64_t batch;
    int k;         // 1 .. kCholeskyMaxK
    double shift;  // finite, at least 0
};

// Both for float and double.
namespace cpu {
template <class Real>
void cholesky_inverse(const CholeskyProblem<Real>& problem);
}  // namespace cpu

namespace cuda {
// Queued on the stream; the host does not wait.
template <class Real>
void cholesky_inverse(const CholeskyProblem<Real>& problem, Target target);
}  // namespace cuda

}  // namespace loraga
