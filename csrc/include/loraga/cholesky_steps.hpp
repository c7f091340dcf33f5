// What the host twin and the CUDA kernel of the Cholesky inverse must agree on, written once.
//
// Method: the right-looking Cholesky factorisation and the forward substitution for its inverse X, as one loop in one
// triangular array. Before step j, the columns left of j hold the rows of X that are done and, below them, the running
// sums of the others; the rest holds the Schur complement. Step j turns row j into that of X, takes column j of L, and
// subtracts from each row i > j the multiple L_ij of one vector w:
//   w = (X_j0 .. X_jj | L_j+1,j .. L_k-1,j),   where column j itself, now free, starts from zero.
// Every entry is a sum in the order of the steps, so rows can be shared out among threads in any way and give the same
// bits. Each step touches all columns of the rows below it: k^3/3 multiplications, and no thread runs out of work as
// the Schur complement shrinks.
#pragma once

#include <cfloat>
#include <cmath>

#include "loraga/cholesky.hpp"
#include "loraga/error.hpp"
#include "loraga/portable.hpp"

namespace loraga {

// The lower triangle of a k x k matrix: packed row after row, or as a part of the whole matrix.
template <class Real>
struct Triangle {
    Real* data;
    int k;
    bool packed;

    LORAGA_HOST_DEVICE_MEMBER Real* row(int i) const { return data + (packed ? i * (i + 1) / 2 : i * k); }
};

LORAGA_HOST_DEVICE bool is_pivot(float value) { return value > 0.0f && value <= FLT_MAX; }
LORAGA_HOST_DEVICE bool is_pivot(double value) { return value > 0.0 && value <= DBL_MAX; }

template <class Real>
LORAGA_HOST_DEVICE Real eliminated(Real value, Real factor, Real w) {
    return value - factor * w;
}

template <class Real>
void check_cholesky_call(const CholeskyProblem<Real>& problem) {
    LORAGA_REQUIRE(problem.batch >= 0, "batch is " << problem.batch);
    LORAGA_REQUIRE(problem.k >= 1 && problem.k <= kCholeskyMaxK,
                   "k is " << problem.k << ", allowed are 1 to " << kCholeskyMaxK);
    LORAGA_REQUIRE(problem.shift >= 0.0 && std::isfinite(problem.shift), "shift is " << problem.shift);
}

}  // namespace loraga
