// The Jacobi SVD of one matrix by one thread block, one warp per pair of rows. cpu/jacobi.cpp is the same algorithm in
// plain loops: read that first. This file holds device code only and launches nothing, so that the tests can run it on
// emulated threads (tests/native/emulation).
#pragma once

#include "block.cuh"
#include "loraga/jacobi_steps.hpp"

namespace loraga::cuda {

// Threads of a block: a warp per pair, at most kMaxWarps, and no warp idles while another has one pair more.
inline int block_threads(int k) {
    const int pairs = players(k) / 2;
    const int passes = (pairs + kMaxWarps - 1) / kMaxWarps;
    return (pairs + passes - 1) / passes * kLanes;
}

// Three vectors of k numbers each, in shared memory.
struct Bookkeeping {
    double *sigma, *residual, *coefficients;

    static constexpr int kVectors = 3;

    __device__ Bookkeeping(double* memory, int k) : sigma(memory), residual(memory + k), coefficients(memory + 2 * k) {}
};

// Every lane gets the same bits: each step adds the same two numbers in both lanes of a pair.
__device__ inline double sum_lanes(double value) {
    for (int half = kLanes / 2; half > 0; half /= 2) value += __shfl_xor_sync(0xffffffffu, value, half);
    return value;
}

__device__ inline double warp_dot(const double* a, const double* b, int k) {
    double part = 0.0;
    for (int i = lane_index(); i < k; i += kLanes) part += a[i] * b[i];
    return sum_lanes(part);
}

__device__ inline Gram warp_gram(const double* a, const double* b, int k) {
    Gram part{0.0, 0.0, 0.0};
    for (int i = lane_index(); i < k; i += kLanes) {
        const double x = a[i], y = b[i];
        part.first += x * x;
        part.mixed += x * y;
        part.second += y * y;
    }
    return {sum_lanes(part.first), sum_lanes(part.mixed), sum_lanes(part.second)};
}

__device__ inline void warp_rotate_rows(const Rotation& r, double* a, double* b, int k) {
    for (int i = lane_index(); i < k; i += kLanes) rotate(r, a[i], b[i]);
}

// Whether all entries are finite; the same answer in every thread.
__device__ inline bool load(const float* core, double* rows, double* basis, int k) {
    bool finite = true;
    for (int i = thread_index(); i < k * k; i += thread_count()) {
        const float value = core[i];
        finite = finite && isfinite(value);
        rows[i] = value;
        basis[i] = i / k == i % k ? 1.0 : 0.0;
    }
    return !__syncthreads_or(!finite);
}

// Index of the largest value, the first one of equals. Every warp that calls it gets the same.
__device__ inline int warp_argmax(const double* values, int k) {
    int best = min(lane_index(), k - 1);
    for (int i = best + kLanes; i < k; i += kLanes)
        if (values[i] > values[best]) best = i;
    for (int half = kLanes / 2; half > 0; half /= 2) {
        const int other = __shfl_xor_sync(0xffffffffu, best, half);
        if (values[other] > values[best] || (values[other] == values[best] && other < best)) best = other;
    }
    return best;
}

// One thread owns column i of a matrix: the reflection of its entries from row `start` on. Returns the squared norm of
// what it leaves below that row.
__device__ inline double reflect_column(const double* direction, double* column, int start, double factor, int k) {
    double product = 0.0;
#pragma unroll 2  // with more, a thread would need more than its 64 registers
    for (int j = start; j < k; ++j) product += direction[j] * column[j * k];
    product *= factor;
    double below = 0.0;
#pragma unroll 2
    for (int j = start; j < k; ++j) {
        const double value = column[j * k] - direction[j] * product;
        column[j * k] = value;
        if (j > start) below += value * value;
    }
    return below;
}

__device__ inline void triangularise(double* rows, double* basis, const Bookkeeping& book, double negligible, int k) {
    for (int i = thread_index(); i < k; i += thread_count()) {
        double square = 0.0;
        for (int j = 0; j < k; ++j) square += rows[j * k + i] * rows[j * k + i];
        book.residual[i] = square;
    }
    __syncthreads();
    for (int step = 0; step + 1 < k; ++step) {
        const int pivot = warp_argmax(book.residual, k);
        const double square = book.residual[pivot];
        if (k * square <= negligible) return;  // so is every row from here on
        const Reflection r = reflection(rows[step * k + pivot], sqrt(square));
        for (int j = step + thread_index(); j < k; j += thread_count())
            book.coefficients[j] = j == step ? r.first : rows[j * k + pivot];
        __syncthreads();
        for (int i = thread_index(); i < 2 * k; i += thread_count()) {
            if (i < k)
                book.residual[i] = reflect_column(book.coefficients, rows + i, step, r.factor, k);
            else
                reflect_column(book.coefficients, basis + i - k, step, r.factor, k);
        }
        __syncthreads();
    }
}

__device__ inline bool sweep(double* rows, double* basis, int k, double negligible, double tolerance) {
    const int n = players(k);
    bool rotated = false;
    for (int round = 0; round < n - 1; ++round) {
        for (int slot = warp_index(); slot < n / 2; slot += warp_count()) {
            const Pair pair = meeting(round, slot, n);
            if (pair.second >= k) continue;
            double* a = rows + pair.first * k;
            double* b = rows + pair.second * k;
            const Gram g = warp_gram(a, b, k);
            if (!must_rotate(g, negligible, tolerance)) continue;
            const Rotation r = orthogonalising(g);
            warp_rotate_rows(r, a, b, k);
            warp_rotate_rows(r, basis + pair.first * k, basis + pair.second * k, k);
            rotated = true;
        }
        __syncthreads();
    }
    return __syncthreads_or(rotated);
}

// Row norms into `squares`, and their sum in the order of the rows; the same bits in every thread.
__device__ inline double sum_of_squares(const double* rows, double* squares, int k) {
    for (int j = warp_index(); j < k; j += warp_count()) {
        const double square = warp_dot(rows + j * k, rows + j * k, k);
        if (lane_index() == 0) squares[j] = square;
    }
    __syncthreads();
    double sum = 0.0;
    for (int j = 0; j < k; ++j) sum += squares[j];
    return sum;
}

__device__ inline void complete_rows(double* rows, const Bookkeeping& book, int k) {
    for (int i = thread_index(); i < k; i += thread_count()) {
        double residual = 1.0;
        for (int j = 0; j < k; ++j)
            if (book.sigma[j] > 0.0) residual -= rows[j * k + i] * rows[j * k + i];
        book.residual[i] = residual;
    }
    for (int missing = 0; missing < k; ++missing) {
        if (book.sigma[missing] > 0.0) continue;
        double* row = rows + missing * k;
        __syncthreads();
        const int axis = warp_argmax(book.residual, k);
        for (int i = thread_index(); i < k; i += thread_count()) row[i] = i == axis ? 1.0 : 0.0;
        for (int pass = 0; pass < 2; ++pass) {
            __syncthreads();
            for (int j = warp_index(); j < k; j += warp_count()) {
                if (!(book.sigma[j] > 0.0 || j < missing)) continue;
                const double coefficient = warp_dot(rows + j * k, row, k);
                if (lane_index() == 0) book.coefficients[j] = coefficient;
            }
            __syncthreads();
            for (int i = thread_index(); i < k; i += thread_count()) {
                double value = row[i];
#pragma unroll 1
                for (int j = 0; j < k; ++j)
                    if (book.sigma[j] > 0.0 || j < missing) value -= book.coefficients[j] * rows[j * k + i];
                row[i] = value;
            }
        }
        __syncthreads();
        const double norm = sqrt(warp_dot(row, row, k));  // every warp for itself: no broadcast to wait for
        __syncthreads();
        for (int i = thread_index(); i < k; i += thread_count()) {
            row[i] /= norm;
            book.residual[i] -= row[i] * row[i];
        }
    }
    __syncthreads();
}

__device__ inline JacobiStatus decompose(const float* core, float* u, float* s, float* vh, int k,
                                         const JacobiOptions& options, double* rows, double* basis,
                                         const Bookkeeping& book) {
    if (!load(core, rows, basis, k)) {
        const float nan = nanf("");
        for (int i = thread_index(); i < k * k; i += thread_count()) u[i] = vh[i] = nan;
        for (int i = thread_index(); i < k; i += thread_count()) s[i] = nan;
        return JacobiStatus::kNonFinite;
    }
    const double negligible = negligible_square(sum_of_squares(rows, book.sigma, k), k);
    triangularise(rows, basis, book, negligible, k);

    bool rotated = true;
    for (int i = 0; rotated && i < options.max_sweeps; ++i)
        rotated = sweep(rows, basis, k, negligible, options.tolerance);

    for (int j = warp_index(); j < k; j += warp_count()) {
        double* row = rows + j * k;
        const double square = warp_dot(row, row, k);
        const double sigma = square > negligible ? sqrt(square) : 0.0;
        if (lane_index() == 0) book.sigma[j] = sigma;
        if (sigma > 0.0)
            for (int i = lane_index(); i < k; i += kLanes) row[i] /= sigma;
    }
    __syncthreads();
    complete_rows(rows, book, k);

    for (int j = warp_index(); j < k; j += warp_count()) {
        const int rank = descending_rank(book.sigma, k, j);
        if (lane_index() == 0) s[rank] = static_cast<float>(book.sigma[j]);
        for (int i = lane_index(); i < k; i += kLanes) {
            vh[rank * k + i] = static_cast<float>(rows[j * k + i]);
            u[i * k + rank] = static_cast<float>(basis[j * k + i]);
        }
    }
    return rotated ? JacobiStatus::kNotConverged : JacobiStatus::kOk;
}

// The matrices first, first + step, ... of a problem, by one block. `rows` and `basis` hold k * k numbers each.
__device__ inline void decompose_strided(const JacobiProblem& problem, const JacobiOptions& options, std::int64_t first,
                                         std::int64_t step, double* rows, double* basis, const Bookkeeping& book) {
    const std::int64_t k = problem.k;
    for (std::int64_t b = first; b < problem.batch; b += step) {
        const JacobiStatus status = decompose(problem.core + b * k * k, problem.u + b * k * k, problem.s + b * k,
                                              problem.vh + b * k * k, problem.k, options, rows, basis, book);
        if (thread_index() == 0) problem.status[b] = static_cast<std::int32_t>(status);
        __syncthreads();  // the next matrix overwrites what slower warps may still be reading
    }
}

}  // namespace loraga::cuda
