// What code shared by the host twins and the kernels needs.
#pragma once

#ifdef __CUDACC__
#define LORAGA_HOST_DEVICE_MEMBER __host__ __device__
#else
#define LORAGA_HOST_DEVICE_MEMBER
#endif
#define LORAGA_HOST_DEVICE LORAGA_HOST_DEVICE_MEMBER inline

namespace loraga {

constexpr int kLanes = 32;  // of a warp

}  // namespace loraga
