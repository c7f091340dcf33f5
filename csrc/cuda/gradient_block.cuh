// The two passes of gradient_add. cpu/gradient.cpp is the same in plain loops: read that first. This file holds device
// code only and launches nothing, so that the tests can run it on emulated threads.
//
// A gradient with any strides takes a thread per entry. One whose entries lie in order, as most do, is read and the sum
// written in loads and stores of 16 bytes, a group of entries per thread.
#pragma once

#include "block.cuh"
#include "loraga/gradient_steps.hpp"

namespace loraga::cuda {

// Clears `finite` if one of the block's threads says `bad`. Blocks that find one all write the same.
__device__ inline void clear_where_bad(bool bad, std::uint8_t* finite) {
    bad = __syncthreads_or(bad);
    if (bad && thread_index() == 0) *finite = 0;
}

// Entries first, first + step, ... of the gradient.
template <class Source, class Index>
__device__ void check_strided(const typename Source::Stored* gradient, const Layout<Index>& where, Index entries,
                              Index first, Index step, std::uint8_t* finite) {
    bool bad = false;
    for (Index i = first; i < entries; i += step) bad |= !isfinite(Source::load(gradient[where.offset(i)]));
    clear_where_bad(bad, finite);
}

template <class Source, class Destination, class Index>
__device__ void add_strided(typename Destination::Stored* sum, const typename Source::Stored* gradient,
                            const Layout<Index>& where, Index entries, Index first, Index step, float scale) {
    for (Index i = first; i < entries; i += step)
        sum[i] = Destination::store(added(Destination::load(sum[i]), scale, Source::load(gradient[where.offset(i)])));
}

constexpr int kGroup = 8;  // entries: 16 bytes of the narrowest type, two times 16 of float32

// The entries of one group, as they are stored.
template <class Type>
struct Group {
    static constexpr int kWords = kGroup * sizeof(typename Type::Stored) / sizeof(uint4);
    union {
        uint4 words[kWords];
        typename Type::Stored entries[kGroup];
    };

    __device__ explicit Group(const typename Type::Stored* from) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
    }

    __device__ void write(typename Type::Stored* to) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(to)[i] = words[i];
    }
};

// Groups first, first + step, ... of a gradient in order, aligned to 16 bytes; what is left after the last whole group
// goes to the first threads, an entry each.
template <class Source, class Index>
__device__ void check_grouped(const typename Source::Stored* gradient, Index entries, Index first, Index step,
                              std::uint8_t* finite) {
    const Index groups = entries / kGroup, single = groups * kGroup + first;
    bool bad = single < entries && !isfinite(Source::load(gradient[single]));
    for (Index g = first; g < groups; g += step) {
        const Group<Source> values(gradient + g * kGroup);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) bad |= !isfinite(Source::load(values.entries[i]));
    }
    clear_where_bad(bad, finite);
}

template <class Source, class Destination, class Index>
__device__ void add_grouped(typename Destination::Stored* sum, const typename Source::Stored* gradient, Index entries,
                            Index first, Index step, float scale) {
    const Index groups = entries / kGroup, single = groups * kGroup + first;
    const auto add = [scale](typename Destination::Stored& to, typename Source::Stored value) {
        to = Destination::store(added(Destination::load(to), scale, Source::load(value)));
    };
    if (single < entries) add(sum[single], gradient[single]);
    for (Index g = first; g < groups; g += step) {
        const Group<Source> values(gradient + g * kGroup);
        Group<Destination> sums(sum + g * kGroup);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) add(sums.entries[i], values.entries[i]);
        sums.write(sum + g * kGroup);
    }
}

}  // namespace loraga::cuda
