// The CUDA kernel of the Jacobi SVD on emulated threads, against the host twin: both must give the same bits, as they
// are the same algorithm and neither compiler flag here allows contractions.
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "cuda/jacobi_block.cuh"
#include "cuda_runtime.h"

namespace {

struct Result {
    std::vector<float> u, s, vh;
    std::vector<std::int32_t> status;

    bool operator==(const Result& other) const {
        const auto same = [](const auto& a, const auto& b) {  // bit for bit, NaN included
            return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
        };
        return same(u, other.u) && same(s, other.s) && same(vh, other.vh) && status == other.status;
    }
};

// A batch with one core of each kind: random, zero, rank one, graded, repeated rows, not finite.
std::vector<float> make_cores(int k) {
    std::mt19937 generator(static_cast<unsigned>(k));
    std::normal_distribution<float> normal;
    std::vector<float> cores(static_cast<std::size_t>(6) * k * k);
    for (int kind = 0; kind < 6; ++kind) {
        float* core = cores.data() + static_cast<std::size_t>(kind) * k * k;
        for (int i = 0; i < k; ++i)
            for (int j = 0; j < k; ++j) {
                float value = normal(generator);
                if (kind == 1) value = 0.0f;
                if (kind == 2) value = static_cast<float>((i + 1) * (j + 1));
                if (kind == 3) value *= std::pow(10.0f, -20.0f * static_cast<float>(i) / static_cast<float>(k));
                if (kind == 4 && i > 0) value = core[j];
                core[i * k + j] = value;
            }
        if (kind == 5) core[k * k - 1] = std::numeric_limits<float>::infinity();
    }
    return cores;
}

template <class Run>
Result solve(const std::vector<float>& cores, int k, const Run& run) {
    const auto count = cores.size();
    const auto batch = count / (static_cast<std::size_t>(k) * k);
    Result r{std::vector<float>(count), std::vector<float>(batch * k), std::vector<float>(count),
             std::vector<std::int32_t>(batch)};
    run(loraga::JacobiProblem{cores.data(), r.u.data(), r.s.data(), r.vh.data(), r.status.data(),
                              static_cast<std::int64_t>(batch), k});
    return r;
}

}  // namespace

int main(int count, char** arguments) {
    int wrong = 0;
    for (int a = 1; a < count; ++a) {
        const int k = std::stoi(arguments[a]);
        const auto cores = make_cores(k);
        const loraga::JacobiOptions options;
        const auto host = solve(cores, k, [&](const loraga::JacobiProblem& problem) {
            std::vector<char> workspace(loraga::cpu::jacobi_svd_workspace(problem.batch, k));
            loraga::cpu::jacobi_svd(problem, options, {workspace.data(), workspace.size()});
        });
        // With a single warp, that warp takes several pairs per round, as every warp of a full block does from k = 65.
        for (const int threads : {loraga::cuda::block_threads(k), loraga::kLanes}) {
            const auto emulated = solve(cores, k, [&](const loraga::JacobiProblem& problem) {
                std::vector<double> rows(static_cast<std::size_t>(k) * k), basis(rows.size());
                std::vector<double> vectors(static_cast<std::size_t>(loraga::cuda::Bookkeeping::kVectors) * k);
                const loraga::cuda::Bookkeeping book(vectors.data(), k);
                emulation::run_block(threads, [&] {
                    loraga::cuda::decompose_strided(problem, options, 0, 1, rows.data(), basis.data(), book);
                });
            });
            const bool right = host == emulated && host.status[0] == 0 && host.status[5] == 2;
            std::printf("k %d, %d threads: %s\n", k, threads, right ? "same bits" : "DIFFERENT");
            wrong += !right;
        }
    }
    return wrong;
}
