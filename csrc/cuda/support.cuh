// Error checks, the device guard and the limit on shared memory for CUDA sources.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

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

// Makes a device current and puts the caller's back. Where it is current already nothing is set: since CUDA 12
// cudaSetDevice makes a context, half a gigabyte, on a device that has none. The caller's may be such a device;
// loraga/ops/native_core.py says why it is not.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device);
    ~DeviceGuard() {
        if (previous_ != device_) (void)cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int device_;
    int previous_ = 0;
};

}  // namespace loraga::cuda

#define LORAGA_CUDA_CHECK(call) ::loraga::cuda::check((call), #call, __FILE__, __LINE__)

namespace loraga::cuda {

inline DeviceGuard::DeviceGuard(int device) : device_(device) {
    LORAGA_CUDA_CHECK(cudaGetDevice(&previous_));
    if (previous_ != device_) LORAGA_CUDA_CHECK(cudaSetDevice(device_));
}

// Lets a kernel have all the dynamic shared memory that a block of the current device, `device`, may have, and says how
// many bytes that is. It is the same for every launch: the limit belongs to the kernel, and another host thread may
// stand between its own call of this and its launch.
template <class Kernel>
std::size_t allow_all_shared_memory(Kernel* kernel, int device) {
    int limit = 0;
    cudaFuncAttributes attributes;
    LORAGA_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    LORAGA_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    const int dynamic = limit - static_cast<int>(attributes.sharedSizeBytes);
    LORAGA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic));
    return static_cast<std::size_t>(dynamic);
}

}  // namespace loraga::cuda
