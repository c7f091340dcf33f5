// Stands in for CUDA's header of this name: runs the device code of one thread block on the host, a real thread for
// each of its threads: what a kernel computes, and with ThreadSanitizer whether a barrier is missing, can be checked
// without a GPU. Barriers must be reached by all threads of the block or the warp, else the program hangs and the
// test's timeout tells.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace emulation {

constexpr int kWarp = 32;

class Barrier {
  public:
    explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
    ~Barrier() { pthread_barrier_destroy(&barrier_); }
    Barrier(const Barrier&) = delete;
    Barrier& operator=(const Barrier&) = delete;
    void wait() { pthread_barrier_wait(&barrier_); }

  private:
    pthread_barrier_t barrier_;
};

struct Warp {
    Barrier barrier{kWarp};
    alignas(8) unsigned char mailbox[kWarp][8];
};

struct Block {
    explicit Block(int threads) : barrier(threads), votes(threads), warps(threads / kWarp) {
        for (auto& warp : warps) warp = std::make_unique<Warp>();
    }
    Barrier barrier;
    std::vector<int> votes;
    std::vector<std::unique_ptr<Warp>> warps;
};

struct Index {
    int x;
};

}  // namespace emulation

inline thread_local emulation::Index threadIdx, blockDim;
inline thread_local emulation::Block* this_block;

inline void __syncthreads() { this_block->barrier.wait(); }

inline int __syncthreads_or(int vote) {
    this_block->votes[threadIdx.x] = vote;
    __syncthreads();
    const bool any = std::any_of(this_block->votes.begin(), this_block->votes.end(), [](int v) { return v != 0; });
    __syncthreads();
    return any;
}

template <class T>
T __shfl_sync(unsigned, T value, int source_lane) {
    static_assert(sizeof(T) <= 8, "longer than a number");
    auto& warp = *this_block->warps[threadIdx.x / emulation::kWarp];
    std::memcpy(warp.mailbox[threadIdx.x % emulation::kWarp], &value, sizeof(T));
    warp.barrier.wait();
    std::memcpy(&value, warp.mailbox[source_lane], sizeof(T));
    warp.barrier.wait();
    return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
    return __shfl_sync(mask, value, threadIdx.x % emulation::kWarp ^ lane_mask);
}

namespace emulation {

template <class Body>
void run_block(int threads, const Body& body) {
    Block block(threads);
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i)
        running.emplace_back([&, i] {
            threadIdx.x = i;
            blockDim.x = threads;
            this_block = &block;
            body();
        });
    for (auto& thread : running) thread.join();
}

}  // namespace emulation

using std::isfinite;
using std::max;
using std::min;
using std::sqrt;
