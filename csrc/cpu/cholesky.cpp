// The host twin of csrc/cuda/cholesky_block.cuh: the same algorithm in the same order, one matrix after the other.
#include <algorithm>
#include <limits>
#include <vector>

#include "loraga/cholesky_steps.hpp"

// Compiled once for each width of vector registers, of which the widest that the processor has is taken. CMakeLists.txt
// defines LORAGA_EVERY_WIDTH where compiler and system can do it.
#if defined(LORAGA_EVERY_WIDTH)
#define LORAGA_WIDTHS __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define LORAGA_WIDTHS
#endif

// For what such a function calls: a function of its own would be compiled for the narrowest registers only.
#if defined(__GNUC__)
#define LORAGA_INLINE __attribute__((always_inline)) inline
#else
#define LORAGA_INLINE inline
#endif

namespace loraga::cpu {
namespace {

constexpr int kPanel = 8;   // steps; of 4, 8 and 16 the fastest from k = 64 on
constexpr int kChunk = 16;  // rows of the working arrays are processed in whole chunks of so many entries

constexpr int in_chunks(int entries) { return (entries + kChunk - 1) / kChunk * kChunk; }

template <class Real>
struct alignas(64) Chunk {  // a line of the cache
    Real entries[kChunk];
};

// The working arrays, in rows of `stride` entries. What lies right of the diagonal is never part of the result.
template <class Real>
struct Arrays {
    Real* triangle;  // k rows
    Real* panel;     // kPanel rows
    int stride;

    LORAGA_INLINE Real* row(int i) const { return triangle + i * stride; }
    LORAGA_INLINE Real* step(int p) const { return panel + p * stride; }
};

// Returns what was added to the diagonal.
template <class Real>
LORAGA_INLINE Real load(const Real* gram, const Arrays<Real>& arrays, int k, Real shift) {
    Real trace = 0;
    for (int j = 0; j < k; ++j) trace += gram[j * k + j];
    for (int i = 0; i < k; ++i) {
        Real* row = arrays.row(i);
        std::copy(gram + i * k, gram + i * k + i + 1, row);
        std::fill(row + i + 1, row + in_chunks(i + 1), Real(0));
        row[i] += shift * trace;
    }
    return shift * trace;
}

// Moves the rows and columns of the steps into the panel; the columns start from zero.
template <class Real>
LORAGA_INLINE void take_panel(const Arrays<Real>& arrays, int start, int steps, int k) {
    for (int p = 0; p < steps; ++p) {
        Real* w = arrays.step(p);
        std::copy(arrays.row(start + p), arrays.row(start + p) + start + p + 1, w);
        for (int i = start + p + 1; i < start + steps; ++i) w[i] = arrays.row(i)[start + p];
        std::fill(w + k, w + in_chunks(k), Real(0));
    }
    for (int i = start + steps; i < k; ++i)
        for (int p = 0; p < steps; ++p) {
            arrays.step(p)[i] = arrays.row(i)[start + p];
            arrays.row(i)[start + p] = 0;
        }
}

// Returns 0, or the order of the first leading minor that is no good.
template <class Real>
LORAGA_INLINE int factor_panel(const Arrays<Real>& arrays, int start, int steps, int k, Real shift) {
    const int end = in_chunks(k);
    for (int p = 0; p < steps; ++p) {
        const int j = start + p;
        Real* __restrict w = arrays.step(p);
        const bool noise = is_rounding(w[j], shift);
        const Real pivot = noise ? shift : w[j];
        if (!is_pivot(pivot)) return j + 1;
        const Real factor = Real(1) / std::sqrt(pivot);
        for (int c = 0; c < end; ++c) w[c] *= factor;
        if (noise) std::fill(w + j + 1, w + end, Real(0));
        w[j] = factor;
        for (int q = p + 1; q < steps; ++q) {
            Real* __restrict later = arrays.step(q);
            const Real l = w[start + q];
            for (int c = 0; c < end; ++c) later[c] = eliminated(later[c], l, w[c]);
            later[j] = eliminated(Real(0), l, factor);
        }
    }
    return 0;
}

// Writes the rows of X that the panel has made, and leaves in it what the rows below subtract.
template <class Real>
LORAGA_INLINE void give_rows(const Arrays<Real>& arrays, Real* inverse, int start, int steps, int k) {
    for (int p = 0; p < steps; ++p) {
        Real *w = arrays.step(p), *row = inverse + (start + p) * k;
        std::copy(w, w + start + p + 1, row);
        std::fill(row + start + p + 1, row + k, Real(0));
        std::fill(w + start + p + 1, w + start + steps, Real(0));
    }
}

template <class Real>
LORAGA_INLINE void subtract_panel(Real* __restrict row, const Real* __restrict panel, int stride, int i) {
    Real factor[kPanel];
    for (int p = 0; p < kPanel; ++p) factor[p] = panel[p * stride + i];
    const int end = in_chunks(i + 1);
    for (int c = 0; c < end; ++c) {
        Real value = row[c];
        for (int p = 0; p < kPanel; ++p) value = eliminated(value, factor[p], panel[p * stride + c]);
        row[c] = value;
    }
}

template <class Real>
LORAGA_INLINE int invert(const Real* gram, Real* inverse, const Arrays<Real>& arrays, int k, Real shift) {
    const Real added = load(gram, arrays, k, shift);
    for (int start = 0; start < k; start += kPanel) {
        const int steps = std::min(kPanel, k - start);
        take_panel(arrays, start, steps, k);
        if (const int bad = factor_panel(arrays, start, steps, k, added)) {
            std::fill(inverse, inverse + k * k, std::numeric_limits<Real>::quiet_NaN());
            return bad;
        }
        give_rows(arrays, inverse, start, steps, k);
        for (int i = start + kPanel; i < k; ++i) subtract_panel(arrays.row(i), arrays.panel, arrays.stride, i);
    }
    return 0;
}

LORAGA_WIDTHS int invert_one(const float* gram, float* inverse, const Arrays<float>& arrays, int k, float shift) {
    return invert(gram, inverse, arrays, k, shift);
}

LORAGA_WIDTHS int invert_one(const double* gram, double* inverse, const Arrays<double>& arrays, int k, double shift) {
    return invert(gram, inverse, arrays, k, shift);
}

}  // namespace

template <class Real>
void cholesky_inverse(const CholeskyProblem<Real>& problem) {
    check_cholesky_call(problem);
    if (problem.batch == 0) return;
    const int k = problem.k;
    const std::int64_t square = static_cast<std::int64_t>(k) * k;
    // One chunk more than needed: rows a power of two apart would all fall into the same few lines of the cache.
    const int stride = in_chunks(k) + kChunk;
    std::vector<Chunk<Real>> memory(static_cast<std::size_t>(k + kPanel) * (stride / kChunk));
    auto* const start = reinterpret_cast<Real*>(memory.data());
    const Arrays<Real> arrays{start, start + static_cast<std::size_t>(k) * stride, stride};
    for (std::int64_t b = 0; b < problem.batch; ++b)
        problem.status[b] = invert_one(problem.gram + b * square, problem.inverse + b * square, arrays, k,
                                       static_cast<Real>(problem.shift));
}

template void cholesky_inverse(const CholeskyProblem<float>&);
template void cholesky_inverse(const CholeskyProblem<double>&);

}  // namespace loraga::cpu
