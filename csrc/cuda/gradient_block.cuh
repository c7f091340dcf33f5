// The two passes of gradient_add, a thread per entry. cpu/gradient.cpp is the same in plain loops: read that first.
// This file holds device code only and launches nothing, so that the tests can run it on emulated threads.
#pragma once

#include "block.cuh"
#include "loraga/gradient_steps.hpp"

namespace loraga::cuda {

// Entries first, first + step, ... of the gradient: clears `finite` where one of the block's is NaN or Inf. Blocks that
// find one all write the same.
template <class Source, class Index>
__device__ void check_strided(const typename Source::Stored* gradient, const Layout<Index>& where, Index entries,
                              Index first, Index step, std::uint8_t* finite) {
    bool bad = false;
    for (Index i = first; i < entries; i += step) bad |= !isfinite(Source::load(gradient[where.offset(i)]));
    bad = __syncthreads_or(bad);
    if (bad && thread_index() == 0) *finite = 0;
}

template <class Source, class Destination, class Index>
__device__ void add_strided(typename Destination::Stored* sum, const typename Source::Stored* gradient,
                            const Layout<Index>& where, Index entries, Index first, Index step, float scale) {
    for (Index i = first; i < entries; i += step)
        sum[i] = Destination::store(added(Destination::load(sum[i]), scale, Source::load(gradient[where.offset(i)])));
}

}  // namespace loraga::cuda
