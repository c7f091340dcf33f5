// What both homes of the Jacobi SVD ask of their arguments.
#pragma once

#include "loraga/error.hpp"
#include "loraga/jacobi.hpp"

namespace loraga {

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
