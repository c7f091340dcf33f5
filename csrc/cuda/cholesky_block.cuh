// The Cholesky inverse of one matrix by one thread block. cpu/cholesky.cpp is the same algorithm in plain loops: read
// that first. This file holds device code only and launches nothing, so that the tests can run it on emulated threads
// (tests/native/emulation).
//
// A panel takes three phases with a barrier after each, and no more for its single steps: one warp factors the corner,
// the square where the panel meets the diagonal; then each column of the panel is finished by one thread alone, as it
// needs nothing but the corner; then the warps share the rows below.
#pragma once

#include "block.cuh"
#include "loraga/cholesky_steps.hpp"

namespace loraga::cuda {

constexpr int kPanel = 16;  // steps: of half a warp in the corner, and a column of the panel fits into registers
constexpr int kRows = 4;    // that a warp takes at a time: each number of the panel is read once for all of them

constexpr int kCholeskyMaxWarps = 16;  // with more, the columns of a panel do not fit into registers
static_assert(kCholeskyMaxWarps * kLanes >= kCholeskyMaxK, "each column of a panel needs a thread");

// Threads of a block: a warp for every kRows rows, as far as there may be so many.
inline int cholesky_threads(int k) {
    const int warps = (k + kRows - 1) / kRows;
    return (warps < kCholeskyMaxWarps ? warps : kCholeskyMaxWarps) * kLanes;
}

// Entries of a row of the panel: whole groups of kRows, so that a group is one aligned load.
LORAGA_HOST_DEVICE int cholesky_stride(int k) { return (k + kRows - 1) / kRows * kRows; }

template <class Real>
struct alignas(kRows * sizeof(Real)) RowFactors {
    Real of[kRows];
};

// The lower triangle of a k x k matrix: packed row after row in shared memory, or as a part of the whole matrix in
// global memory. Which of them is a constant of the kernel, so that the compiler knows the address space.
template <class Real, bool kInShared>
struct Triangle {
    Real* data;
    int k;

    __device__ Real* row(int i) const { return data + (kInShared ? i * (i + 1) / 2 : i * k); }
};

// What is in shared memory besides: the panel, kPanel rows of cholesky_stride(k) entries, and the corner's own numbers.
template <class Real>
struct CholeskyBookkeeping {
    Real corner[kPanel][kPanel];  // row p: 1 / L_pp on the diagonal, L_qp in the later columns q
    bool noise[kPanel];           // is column p of L zero below the diagonal?
    int status;
};

// Returns what was added to the diagonal, in every thread.
template <class Real, bool kInShared>
__device__ Real load_triangle(const Real* gram, const Triangle<Real, kInShared>& triangle, Real shift, Real* diagonal) {
    const int k = triangle.k;
    for (int j = thread_index(); j < k; j += thread_count()) diagonal[j] = gram[j * k + j];
    __syncthreads();
    Real trace = 0;
    for (int j = 0; j < k; ++j) trace += diagonal[j];
    for (int i = warp_index(); i < k; i += warp_count())
        for (int c = lane_index(); c <= i; c += kLanes)
            triangle.row(i)[c] = c == i ? gram[i * k + c] + shift * trace : gram[i * k + c];
    return shift * trace;
}

// By one warp, each lane with one column of the corner. Returns 0, or the order of the first leading minor that is no
// good, in every lane.
template <class Real, bool kInShared>
__device__ int factor_corner(const Triangle<Real, kInShared>& triangle, int start, int steps, Real shift, Real* panel,
                             int stride, CholeskyBookkeeping<Real>& book) {
    const int column = lane_index() % kPanel;
    Real w[kPanel];
#pragma unroll
    for (int p = 0; p < kPanel; ++p) {
        const bool inside = p < steps && column < steps;
        w[p] = inside ? triangle.row(start + max(p, column))[start + min(p, column)] : Real(0);
    }
    int bad = 0;
#pragma unroll
    for (int p = 0; p < kPanel; ++p) {
        const Real found = __shfl_sync(0xffffffffu, w[p], p);
        const bool noise = is_rounding(found, shift);
        const Real pivot = noise ? shift : found;
        if (p < steps && bad == 0 && !is_pivot(pivot)) bad = start + p + 1;  // what follows is of no use, nor is it used
        const Real factor = p < steps ? Real(1) / sqrt(pivot) : Real(0);
        w[p] = column == p ? factor : noise && column > p ? Real(0) : w[p] * factor;
        if (lane_index() == 0) book.noise[p] = noise;
#pragma unroll
        for (int q = 0; q < kPanel; ++q) {
            if (q <= p) continue;
            const Real l = __shfl_sync(0xffffffffu, w[p], q);
            w[q] = eliminated(column == p ? Real(0) : w[q], l, w[p]);
        }
    }
    if (lane_index() >= kPanel) return bad;
#pragma unroll
    for (int p = 0; p < kPanel; ++p) {
        book.corner[p][column] = w[p];
        if (p >= steps || column >= steps) continue;
        panel[p * stride + start + column] = column <= p ? w[p] : Real(0);
    }
    return bad;
}

// By one thread: column c of the panel, outside of the corner.
template <class Real, bool kInShared>
__device__ void finish_column(const Triangle<Real, kInShared>& triangle, int start, int steps, int c, Real* panel,
                              int stride, const CholeskyBookkeeping<Real>& book) {
    Real w[kPanel];
#pragma unroll
    for (int p = 0; p < kPanel; ++p) {
        w[p] = Real(0);
        if (p < steps) w[p] = c < start ? triangle.row(start + p)[c] : triangle.row(c)[start + p];
    }
#pragma unroll
    for (int p = 0; p < kPanel; ++p) {
        w[p] = book.noise[p] && c >= start ? Real(0) : w[p] * book.corner[p][p];
#pragma unroll
        for (int q = 0; q < kPanel; ++q)
            if (q > p) w[q] = eliminated(w[q], book.corner[p][q], w[p]);
    }
#pragma unroll
    for (int p = 0; p < kPanel; ++p) panel[p * stride + c] = w[p];
}

// Writes the rows of X that the panel has made.
template <class Real>
__device__ void give_rows(Real* inverse, int start, int steps, int k, const Real* panel, int stride) {
    for (int p = warp_index(); p < steps; p += warp_count())
        for (int c = lane_index(); c < k; c += kLanes)
            inverse[(start + p) * k + c] = c < start + steps ? panel[p * stride + c] : Real(0);
}

// By one warp: the rows first .. first + kRows - 1, below the panel, as far as there are so many.
template <class Real, bool kInShared>
__device__ void subtract_panel(const Triangle<Real, kInShared>& triangle, int start, int first, const Real* panel,
                               int stride) {
    const int last = min(first + kRows, triangle.k) - 1;
    for (int c = lane_index(); c <= last; c += kLanes) {
        const bool fresh = c >= start && c < start + kPanel;  // it starts from zero
        Real value[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            value[r] = !fresh && first + r <= last && c <= first + r ? triangle.row(first + r)[c] : Real(0);
#pragma unroll 2  // not all of it: the compiler would keep the factors of all steps, more than there are registers
        for (int p = 0; p < kPanel; ++p) {
            const Real w = panel[p * stride + c];
            const auto factors = *reinterpret_cast<const RowFactors<Real>*>(panel + p * stride + first);
#pragma unroll
            for (int r = 0; r < kRows; ++r) value[r] = eliminated(value[r], factors.of[r], w);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r)
            if (first + r <= last && c <= first + r) triangle.row(first + r)[c] = value[r];
    }
}

template <class Real, bool kInShared>
__device__ int invert(const Real* gram, Real* inverse, const Triangle<Real, kInShared>& triangle, Real shift, Real* panel,
                      CholeskyBookkeeping<Real>& book) {
    const int k = triangle.k, stride = cholesky_stride(k);
    if (thread_index() == 0) book.status = 0;
    const Real added = load_triangle(gram, triangle, shift, panel);
    for (int start = 0; start < k; start += kPanel) {
        const int steps = min(kPanel, k - start);
        __syncthreads();
        if (warp_index() == 0) {
            const int bad = factor_corner(triangle, start, steps, added, panel, stride, book);
            if (bad != 0 && lane_index() == 0) book.status = bad;
        }
        __syncthreads();
        if (book.status != 0) return book.status;
        const int c = thread_index();
        if (c < start || (c >= start + steps && c < k)) finish_column(triangle, start, steps, c, panel, stride, book);
        __syncthreads();
        give_rows(inverse, start, steps, k, panel, stride);
        for (int first = start + kPanel + kRows * warp_index(); first < k; first += kRows * warp_count())
            subtract_panel(triangle, start, first, panel, stride);
    }
    return 0;
}

// The matrices first, first + step, ... of a problem, by one block. `panel` holds kPanel * cholesky_stride(k) numbers.
// Where kInShared, `memory` holds k (k + 1) / 2 numbers; else the output is worked on in place.
template <bool kInShared, class Real>
__device__ void invert_strided(const CholeskyProblem<Real>& problem, std::int64_t first, std::int64_t step, Real* panel,
                               Real* memory, CholeskyBookkeeping<Real>& book) {
    const int k = problem.k;
    const std::int64_t square = static_cast<std::int64_t>(k) * k;
    for (std::int64_t b = first; b < problem.batch; b += step) {
        Real* inverse = problem.inverse + b * square;
        const Triangle<Real, kInShared> triangle{kInShared ? memory : inverse, k};
        const int status =
            invert(problem.gram + b * square, inverse, triangle, static_cast<Real>(problem.shift), panel, book);
        if (status != 0)
            for (std::int64_t i = thread_index(); i < square; i += thread_count())
                inverse[i] = static_cast<Real>(nanf(""));
        if (thread_index() == 0) problem.status[b] = status;
        __syncthreads();  // the next matrix overwrites what slower warps may still be reading
    }
}

}  // namespace loraga::cuda
