// The threads of a block, for device code that the tests also run on emulated threads.
#pragma once

#include <cuda_runtime.h>

#include "loraga/portable.hpp"

namespace loraga::cuda {

constexpr int kMaxWarps = 32;

__device__ inline int thread_index() { return threadIdx.x; }
__device__ inline int thread_count() { return blockDim.x; }
__device__ inline int lane_index() { return threadIdx.x % kLanes; }
__device__ inline int warp_index() { return threadIdx.x / kLanes; }
__device__ inline int warp_count() { return blockDim.x / kLanes; }

}  // namespace loraga::cuda
