// What the host twin and the CUDA kernel of the Jacobi SVD must agree on, written once.
//
// Method: two arrays are transformed from the left only, so that basis' rows = A always holds. Householder
// reflections with column pivoting first make rows triangular up to the order of its columns, basis = Q'. Then plane
// rotations of two rows at a time (Hestenes 1958) make all rows orthogonal: U is basis transposed, S the row norms,
// Vh the rows divided by them. Rows of a pivoted triangle are nearly orthogonal where the spectrum falls (Drmac and
// Veselic 2008), so at most 12 sweeps over all pairs were needed where 30 and more were without (k = 256). Pairs
// meet in the fixed order of a round-robin tournament: the pairs of a round are independent, and every run gives the
// same bits. All of it is float64. A rotation errs by one rounding, and a row takes part in about 10 k of them: in
// float32 that would cost the promised 1e-6. The square of any float32 number fits, so no scaling is needed either.
#pragma once

#include <cfloat>
#include <cmath>

#include "loraga/error.hpp"
#include "loraga/jacobi.hpp"
#include "loraga/portable.hpp"

namespace loraga {

// A dot product is summed in kLanes strided parts, then halved in a tree: one part per lane of a warp on the device, a
// vectorisable block on the host.

struct Pair {
    int first, second;
};

LORAGA_HOST_DEVICE int players(int k) { return k + (k & 1); }

// The meeting number `slot` of a round: `n` players (even), n - 1 rounds, n / 2 slots (circle method).
// With an odd k the last player, index k, is no row: whoever meets it rests, which is always slot 0.
LORAGA_HOST_DEVICE Pair meeting(int round, int slot, int n) {
    const int ring = n - 1;
    const int a = slot == 0 ? ring : (round + slot) % ring;
    const int b = (round - slot + ring) % ring;
    return a < b ? Pair{a, b} : Pair{b, a};
}

// Squared norm below which a row is rounding noise of the core: its singular value is reported as zero and its
// singular vector comes from completing the basis.
LORAGA_HOST_DEVICE double negligible_square(double frobenius_square, int k) {
    const double relative = k * DBL_EPSILON;
    return relative * relative * frobenius_square;
}

// The Householder reflection 1 - factor d d' that turns a column with first entry `head` and the given norm into a
// multiple of the first unit vector; d is the column with its first entry replaced.
struct Reflection {
    double first, factor;
};

LORAGA_HOST_DEVICE Reflection reflection(double head, double norm) {
    return {head < 0.0 ? head - norm : head + norm, 1.0 / (norm * (norm + fabs(head)))};
}

struct Gram {
    double first, mixed, second;  // |a|^2, a.b, |b|^2
};

LORAGA_HOST_DEVICE bool must_rotate(const Gram& g, double negligible, double tolerance) {
    return g.first > negligible && g.second > negligible &&
           g.mixed * g.mixed > tolerance * tolerance * g.first * g.second;
}

struct Rotation {
    double cosine, sine;
};

// The rotation by at most 45 degrees that makes the two rows orthogonal.
LORAGA_HOST_DEVICE Rotation orthogonalising(const Gram& g) {
    const double zeta = (g.second - g.first) / (2.0 * g.mixed);
    const double tangent = (zeta < 0.0 ? -1.0 : 1.0) / (fabs(zeta) + sqrt(1.0 + zeta * zeta));
    const double cosine = 1.0 / sqrt(1.0 + tangent * tangent);
    return {cosine, cosine * tangent};
}

LORAGA_HOST_DEVICE void rotate(const Rotation& r, double& first, double& second) {
    const double a = first, b = second;
    first = r.cosine * a - r.sine * b;
    second = r.sine * a + r.cosine * b;
}

// Place of row j in descending order; equal values keep the order of their rows.
LORAGA_HOST_DEVICE int descending_rank(const double* values, int k, int j) {
    int rank = 0;
    for (int i = 0; i < k; ++i) rank += values[i] > values[j] || (values[i] == values[j] && i < j);
    return rank;
}

// What both homes of the Jacobi SVD ask of their arguments.
inline void check_jacobi_shape(std::int64_t batch, int k) {
    LORAGA_REQUIRE(batch >= 0, "batch is " << batch);
    LORAGA_REQUIRE(k >= 1 && k <= kJacobiMaxK, "k is " << k << ", allowed are 1 to " << kJacobiMaxK);
}

inline void check_jacobi_call(const JacobiOptions& options, std::size_t needed_bytes, Workspace workspace) {
    LORAGA_REQUIRE(options.max_sweeps >= 1, "max_sweeps is " << options.max_sweeps);
    LORAGA_REQUIRE(options.tolerance > 0.0, "tolerance is " << options.tolerance);
    LORAGA_REQUIRE(workspace.bytes >= needed_bytes,
                   "the workspace has " << workspace.bytes << " bytes, needed are " << needed_bytes);
}

}  // namespace loraga
