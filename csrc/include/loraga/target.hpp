// Where a function of the core runs and what memory it may use besides its arguments.
#pragma once

#include <cstddef>

namespace loraga {

struct Workspace {
    void* data;  // aligned to 8 bytes; may be null where no bytes are needed
    std::size_t bytes;
};

namespace cuda {

struct Target {
    int device;
    void* stream;  // a cudaStream_t; null is the default stream
};

// Throws CudaError unless the driver, the device and the compiled architectures fit together.
void check_device(int device);

}  // namespace cuda

}  // namespace loraga
