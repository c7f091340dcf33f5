// What the host twin and the CUDA kernel of the Cholesky inverse must agree on, written once.
//
// Method: the right-looking Cholesky factorisation and the forward substitution for its inverse X, as one loop in one
// triangular array. Before step j, the columns left of j hold the rows of X that are done and, below them, the running
// sums of the others; the rest holds the Schur complement. Step j turns row j into that of X, takes column j of L, and
// subtracts from each row i > j the multiple L_ij of one vector w:
//   w = (X_j0 .. X_jj | L_j+1,j .. L_k-1,j),   where column j itself, now free, starts from zero.
// Each step touches all columns of the rows below it: k^3/3 multiplications.
//
// Steps are taken in panels, so that an entry is read and written once a panel and not once a step. The panel holds a
// row for each of its steps, which becomes that step's w: first the row of the array up to the diagonal, then the column
// below the diagonal. The steps of a panel subtract from its own rows first; then each row below it subtracts all their
// multiples at a time. There, L_ij with both indices in the panel counts as zero, as its column starts from zero later.
//
// Every entry is a sum in the order of the steps. So neither the width of a panel nor the way rows are shared out among
// threads changes a bit of the result.
#pragma once

#include <cfloat>
#include <cmath>

#include "loraga/cholesky.hpp"
#include "loraga/error.hpp"
#include "loraga/portable.hpp"

namespace loraga {

// A Gram matrix with a shift has no pivot below the shift but for rounding, which may even make one negative. Then the
// column of L below the pivot is rounding as well: the pivot becomes the shift and the column zero. So no entry of L is
// larger than rounding makes it. False for NaN.
template <class Real>
LORAGA_HOST_DEVICE bool is_rounding(Real pivot, Real shift) {
    return pivot < shift;
}

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
