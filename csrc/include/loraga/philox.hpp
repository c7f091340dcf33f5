// Uniform numbers from a counter-based stream, for tensors on the host: Philox4x32-10 (Salmon, Moraes, Dror, Shaw:
// Parallel random numbers: as easy as 1, 2, 3; SC 2011).
#pragma once

#include <cstdint>

namespace loraga::cpu {

// out[i], i < count, becomes word i mod 4 at counter i div 4 under the key `seed`, as a number in [-1, 1) with 24 bits.
void fill_uniform(float* out, std::int64_t count, std::uint64_t seed);

}  // namespace loraga::cpu
