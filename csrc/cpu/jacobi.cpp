// The host twin of csrc/cuda/jacobi_block.cuh: the same algorithm in the same order, one matrix after the other.
#include <algorithm>
#include <cmath>
#include <limits>

#include "loraga/jacobi_steps.hpp"

namespace loraga::cpu {
namespace {

// What one matrix needs while it is worked on, laid out in the caller's workspace.
struct Scratch {
    double* rows;          // (k, k): the core, rotated row by row
    double* basis;         // (k, k): the product of the rotations
    double* sigma;         // (k,)
    double* residual;      // (k,): squared norms of what is left of columns or unit vectors
    double* coefficients;  // (k,)
    double* products;      // (k,)

    Scratch(double* start, std::size_t k)
        : rows(start),
          basis(rows + k * k),
          sigma(basis + k * k),
          residual(sigma + k),
          coefficients(residual + k),
          products(coefficients + k) {}

    static std::size_t count(std::size_t k) { return 2 * k * k + 4 * k; }
};

double sum_parts(double* parts) {
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
    return parts[0];
}

double dot(const double* a, const double* b, int k) {
    double parts[kLanes] = {};
    for (int start = 0; start < k; start += kLanes) {
        const int lanes = std::min(kLanes, k - start);
        for (int lane = 0; lane < lanes; ++lane) parts[lane] += a[start + lane] * b[start + lane];
    }
    return sum_parts(parts);
}

Gram gram(const double* a, const double* b, int k) { return {dot(a, a, k), dot(a, b, k), dot(b, b, k)}; }

void rotate_rows(const Rotation& r, double* a, double* b, int k) {
    for (int i = 0; i < k; ++i) rotate(r, a[i], b[i]);
}

bool load(const float* core, const Scratch& w, int k) {
    bool finite = true;
    for (int i = 0; i < k * k; ++i) {
        finite &= static_cast<bool>(std::isfinite(core[i]));
        w.rows[i] = core[i];
        w.basis[i] = 0.0;
    }
    for (int j = 0; j < k; ++j) w.basis[j * k + j] = 1.0;
    return finite;
}

void reflect_rows(const Scratch& w, double* matrix, int start, double factor, int k) {
    std::fill(w.products, w.products + k, 0.0);
    for (int j = start; j < k; ++j)
        for (int i = 0; i < k; ++i) w.products[i] += w.coefficients[j] * matrix[j * k + i];
    for (int i = 0; i < k; ++i) w.products[i] *= factor;
    for (int j = start; j < k; ++j)
        for (int i = 0; i < k; ++i) matrix[j * k + i] -= w.coefficients[j] * w.products[i];
}

void triangularise(const Scratch& w, double negligible, int k) {
    for (int step = 0; step + 1 < k; ++step) {
        std::fill(w.residual, w.residual + k, 0.0);
        for (int j = step; j < k; ++j)
            for (int i = 0; i < k; ++i) w.residual[i] += w.rows[j * k + i] * w.rows[j * k + i];
        const auto pivot = std::max_element(w.residual, w.residual + k) - w.residual;
        if (k * w.residual[pivot] <= negligible) return;  // so is every row from here on
        for (int j = step; j < k; ++j) w.coefficients[j] = w.rows[j * k + pivot];
        const Reflection r = reflection(w.coefficients[step], std::sqrt(w.residual[pivot]));
        w.coefficients[step] = r.first;
        reflect_rows(w, w.rows, step, r.factor, k);
        reflect_rows(w, w.basis, step, r.factor, k);
    }
}

// One sweep: every pair once. Returns whether any pair still had to be rotated.
bool sweep(const Scratch& w, int k, double negligible, double tolerance) {
    const int n = players(k);
    bool rotated = false;
    for (int round = 0; round < n - 1; ++round) {
        for (int slot = 0; slot < n / 2; ++slot) {
            const Pair pair = meeting(round, slot, n);
            if (pair.second >= k) continue;
            double* a = w.rows + pair.first * k;
            double* b = w.rows + pair.second * k;
            const Gram g = gram(a, b, k);
            if (!must_rotate(g, negligible, tolerance)) continue;
            const Rotation r = orthogonalising(g);
            rotate_rows(r, a, b, k);
            rotate_rows(r, w.basis + pair.first * k, w.basis + pair.second * k, k);
            rotated = true;
        }
    }
    return rotated;
}

// Makes a unit row, orthogonal to all that have a sigma above zero or come earlier, out of each row with sigma zero.
void complete_rows(const Scratch& w, int k) {
    std::fill(w.residual, w.residual + k, 1.0);
    const auto take_from_residual = [&](const double* row) {
        for (int i = 0; i < k; ++i) w.residual[i] -= row[i] * row[i];
    };
    for (int j = 0; j < k; ++j)
        if (w.sigma[j] > 0.0) take_from_residual(w.rows + j * k);
    for (int missing = 0; missing < k; ++missing) {
        if (w.sigma[missing] > 0.0) continue;
        double* row = w.rows + missing * k;
        // The unit vector that the rows so far cover least keeps at least 1/k of its square: no cancellation.
        const auto axis = std::max_element(w.residual, w.residual + k) - w.residual;
        std::fill(row, row + k, 0.0);
        row[axis] = 1.0;
        for (int pass = 0; pass < 2; ++pass) {
            for (int j = 0; j < k; ++j)
                if (w.sigma[j] > 0.0 || j < missing) w.coefficients[j] = dot(w.rows + j * k, row, k);
            for (int j = 0; j < k; ++j)
                if (w.sigma[j] > 0.0 || j < missing)
                    for (int i = 0; i < k; ++i) row[i] -= w.coefficients[j] * w.rows[j * k + i];
        }
        const double norm = std::sqrt(dot(row, row, k));
        for (int i = 0; i < k; ++i) row[i] /= norm;
        take_from_residual(row);
    }
}

JacobiStatus decompose(const float* core, float* u, float* s, float* vh, int k, const JacobiOptions& options,
                       const Scratch& w) {
    if (!load(core, w, k)) {
        constexpr float nan = std::numeric_limits<float>::quiet_NaN();
        std::fill(u, u + k * k, nan);
        std::fill(s, s + k, nan);
        std::fill(vh, vh + k * k, nan);
        return JacobiStatus::kNonFinite;
    }
    double frobenius_square = 0.0;
    for (int j = 0; j < k; ++j) frobenius_square += dot(w.rows + j * k, w.rows + j * k, k);
    const double negligible = negligible_square(frobenius_square, k);

    triangularise(w, negligible, k);
    bool rotated = true;
    for (int i = 0; rotated && i < options.max_sweeps; ++i) rotated = sweep(w, k, negligible, options.tolerance);

    for (int j = 0; j < k; ++j) {
        double* row = w.rows + j * k;
        const double square = dot(row, row, k);
        w.sigma[j] = square > negligible ? std::sqrt(square) : 0.0;
        if (w.sigma[j] > 0.0)
            for (int i = 0; i < k; ++i) row[i] /= w.sigma[j];
    }
    complete_rows(w, k);

    for (int j = 0; j < k; ++j) {
        const int rank = descending_rank(w.sigma, k, j);
        s[rank] = static_cast<float>(w.sigma[j]);
        for (int i = 0; i < k; ++i) {
            vh[rank * k + i] = static_cast<float>(w.rows[j * k + i]);
            u[i * k + rank] = static_cast<float>(w.basis[j * k + i]);
        }
    }
    return rotated ? JacobiStatus::kNotConverged : JacobiStatus::kOk;
}

}  // namespace

std::size_t jacobi_svd_workspace(std::int64_t batch, int k) {
    check_jacobi_shape(batch, k);
    return batch == 0 ? 0 : Scratch::count(k) * sizeof(double);
}

void jacobi_svd(const JacobiProblem& problem, const JacobiOptions& options, Workspace workspace) {
    check_jacobi_call(options, jacobi_svd_workspace(problem.batch, problem.k), workspace);
    if (problem.batch == 0) return;
    const std::int64_t k = problem.k;
    const Scratch scratch(static_cast<double*>(workspace.data), static_cast<std::size_t>(k));
    for (std::int64_t b = 0; b < problem.batch; ++b)
        problem.status[b] =
            static_cast<std::int32_t>(decompose(problem.core + b * k * k, problem.u + b * k * k, problem.s + b * k,
                                                problem.vh + b * k * k, problem.k, options, scratch));
}

}  // namespace loraga::cpu
