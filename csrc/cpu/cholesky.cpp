// The host twin of csrc/cuda/cholesky_block.cuh: the same algorithm in the same order, one matrix after the other.
#include <algorithm>
#include <limits>

#include "loraga/cholesky_steps.hpp"

namespace loraga::cpu {
namespace {

template <class Real>
int invert(const Real* gram, Real* inverse, int k, Real shift) {
    const Triangle<Real> triangle{inverse, k, false};
    Real w[kCholeskyMaxK];
    Real trace = 0;
    for (int j = 0; j < k; ++j) trace += gram[j * k + j];
    for (int i = 0; i < k; ++i) {
        for (int c = 0; c <= i; ++c) triangle.row(i)[c] = gram[i * k + c];
        std::fill(triangle.row(i) + i + 1, triangle.row(i) + k, Real(0));
        triangle.row(i)[i] += shift * trace;
    }
    for (int j = 0; j < k; ++j) {
        const Real pivot = triangle.row(j)[j];
        if (!is_pivot(pivot)) {
            std::fill(inverse, inverse + k * k, std::numeric_limits<Real>::quiet_NaN());
            return j + 1;
        }
        const Real factor = Real(1) / std::sqrt(pivot);
        for (int c = 0; c < j; ++c) w[c] = triangle.row(j)[c] *= factor;
        w[j] = triangle.row(j)[j] = factor;
        for (int i = j + 1; i < k; ++i) {
            w[i] = triangle.row(i)[j] * factor;
            triangle.row(i)[j] = 0;
        }
        for (int i = j + 1; i < k; ++i) {
            Real* row = triangle.row(i);
            for (int c = 0; c <= i; ++c) row[c] = eliminated(row[c], w[i], w[c]);
        }
    }
    return 0;
}

}  // namespace

template <class Real>
void cholesky_inverse(const CholeskyProblem<Real>& problem) {
    check_cholesky_call(problem);
    const std::int64_t square = static_cast<std::int64_t>(problem.k) * problem.k;
    for (std::int64_t b = 0; b < problem.batch; ++b)
        problem.status[b] =
            invert(problem.gram + b * square, problem.inverse + b * square, problem.k,
                   static_cast<Real>(problem.shift));
}

template void cholesky_inverse(const CholeskyProblem<float>&);
template void cholesky_inverse(const CholeskyProblem<double>&);

}  // namespace loraga::cpu
