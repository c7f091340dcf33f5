// Error checks and the device guard for CUDA sources.
#pragma once

#include <cuda_runtime.h>

#include "loraga/error.hpp"

namespace loraga::cuda {

inline void check(cudaError_t status, const char* call, const char* file, int line) {
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();  // or the next, unrelated call would report this error again
    std::ostringstream text;
    text << call << " failed: " << cudaGetErrorName(status) << ": " << cudaGetErrorString(status) << " (" << file << ":"
         << line << ")";
    throw CudaError(text.str());
}

// Makes a device current and puts the caller's back.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device);
    ~DeviceGuard() { (void)cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
};

}  // namespace loraga::cuda

#define LORAGA_CUDA_CHECK(call) ::loraga::cuda::check((call), #call, __FILE__, __LINE__)

namespace loraga::cuda {

inline DeviceGuard::DeviceGuard(int device) {
    LORAGA_CUDA_CHECK(cudaGetDevice(&previous_));
    LORAGA_CUDA_CHECK(cudaSetDevice(device));
}

}  // namespace loraga::cuda
