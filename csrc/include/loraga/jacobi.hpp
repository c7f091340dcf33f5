// Batched singular value decomposition of small dense cores by one-sided Jacobi rotations.
//
// The interface of the core: raw pointers, shapes and a stream, nothing of torch. The functions allocate
// nothing; the caller asks for the size of the workspace and brings it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "loraga/target.hpp"

namespace loraga {

constexpr int kJacobiMaxK = 512;

struct JacobiOptions {
    // Two rows count as orthogonal when the cosine of their angle is at most this. 1e-10 leaves the
    // singular values right to k * 1e-10 and costs no sweep more than 1e-7, as convergence is quadratic.
    double tolerance = 1e-10;
    int max_sweeps = 30;  // the hardest inputs tried take 12 (k = 256)
};

enum class JacobiStatus : std::int32_t { kOk = 0, kNotConverged = 1, kNonFinite = 2 };

// All arrays are dense and row-major; outputs must not overlap the input.
struct JacobiProblem {
    const float* core;     // (batch, k, k)
    float* u;              // (batch, k, k), orthonormal columns
    float* s;              // (batch, k), descending
    float* vh;             // (batch, k, k), orthonormal rows
    std::int32_t* status;  // (batch,), a JacobiStatus each
    std::int64_t batch;
    int k;  // 1 .. kJacobiMaxK
};

namespace cpu {

std::size_t jacobi_svd_workspace(std::int64_t batch, int k);
void jacobi_svd(const JacobiProblem& problem, const JacobiOptions& options, Workspace workspace);

}  // namespace cpu

namespace cuda {

std::size_t jacobi_svd_workspace(std::int64_t batch, int k, Target target);
// Queued on the stream; the host does not wait.
void jacobi_svd(const JacobiProblem& problem, const JacobiOptions& options, Workspace workspace, Target target);

}  // namespace cuda

}  // namespace loraga
