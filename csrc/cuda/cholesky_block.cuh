// The Cholesky inverse of one matrix by one thread block, a warp per row. cpu/cholesky.cpp is the same algorithm in
// plain loops: read that first. This file holds device code only and launches nothing, so that the tests can run it on
// emulated threads (tests/native/emulation).
#pragma once

#include "block.cuh"
#include "loraga/cholesky_steps.hpp"

namespace loraga::cuda {

// Threads of a block: a warp for every fourth row. More would wait at the barriers for rows that are too short for
// them, fewer would leave the latency of a step in the open.
inline int cholesky_threads(int k) {
    const int warps = (k + 3) / 4;
    return (warps < kMaxWarps ? warps : kMaxWarps) * kLanes;
}

template <class Real>
struct CholeskyBookkeeping {
    Real w[kCholeskyMaxK];
};

template <class Real>
__device__ int invert(const Real* gram, const Triangle<Real>& triangle, Real shift, CholeskyBookkeeping<Real>& book) {
    const int k = triangle.k;
    for (int j = thread_index(); j < k; j += thread_count()) book.w[j] = gram[j * k + j];
    __syncthreads();
    Real trace = 0;
    for (int j = 0; j < k; ++j) trace += book.w[j];
    for (int i = warp_index(); i < k; i += warp_count())
        for (int c = lane_index(); c <= i; c += kLanes)
            triangle.row(i)[c] = c == i ? gram[i * k + c] + shift * trace : gram[i * k + c];
    for (int j = 0; j < k; ++j) {
        __syncthreads();
        const Real pivot = triangle.row(j)[j];
        if (!is_pivot(pivot)) return j + 1;  // the same value in every thread
        const Real factor = Real(1) / sqrt(pivot);
        for (int i = thread_index(); i < k; i += thread_count()) {
            Real value = factor;
            if (i < j) value = triangle.row(j)[i] *= factor;
            if (i > j) value = triangle.row(i)[j] * factor;
            book.w[i] = value;
        }
        __syncthreads();
        if (thread_index() == 0) triangle.row(j)[j] = book.w[j];  // not earlier: it is the pivot that others read
        for (int i = j + 1 + warp_index(); i < k; i += warp_count()) {
            Real* row = triangle.row(i);
            for (int c = lane_index(); c <= i; c += kLanes)
                row[c] = eliminated(c == j ? Real(0) : row[c], book.w[i], book.w[c]);
        }
    }
    __syncthreads();
    return 0;
}

// The matrices first, first + step, ... of a problem, by one block. `shared` holds k (k + 1) / 2 numbers, or is null:
// then the output is worked on in place.
template <class Real>
__device__ void invert_strided(const CholeskyProblem<Real>& problem, std::int64_t first, std::int64_t step,
                               Real* shared, CholeskyBookkeeping<Real>& book) {
    const int k = problem.k;
    const std::int64_t square = static_cast<std::int64_t>(k) * k;
    for (std::int64_t b = first; b < problem.batch; b += step) {
        Real* inverse = problem.inverse + b * square;
        const Triangle<Real> triangle{shared != nullptr ? shared : inverse, k, shared != nullptr};
        const int status = invert(problem.gram + b * square, triangle, static_cast<Real>(problem.shift), book);
        if (status != 0) __syncthreads();  // a slower warp may not have read the bad pivot yet
        for (int i = warp_index(); i < k; i += warp_count())
            for (int c = lane_index(); c < k; c += kLanes)
                inverse[i * k + c] = status != 0 ? static_cast<Real>(nanf("")) : c <= i ? triangle.row(i)[c] : Real(0);
        if (thread_index() == 0) problem.status[b] = status;
        // The first barrier of the next matrix lets no warp write into the triangle before all have read it here.
    }
}

}  // namespace loraga::cuda
