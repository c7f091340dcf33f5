// The CUDA kernel of the Cholesky inverse on emulated threads, against the host twin: both must give the same bits, as
// they are the same algorithm and neither compiler flag here allows contractions.
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "cuda/cholesky_block.cuh"
#include "cuda_runtime.h"

namespace {

// A batch with one matrix of each kind: well conditioned, nearly singular, zero, indefinite in the middle, not finite.
constexpr int kKinds = 5;

std::vector<double> make_grams(int k) {
    std::mt19937 generator(static_cast<unsigned>(k));
    std::normal_distribution<double> normal;
    const int square = k * k;
    std::vector<double> grams(static_cast<std::size_t>(kKinds) * square);
    for (int kind = 0; kind < kKinds; ++kind) {
        double* gram = grams.data() + static_cast<std::size_t>(kind) * square;
        for (int i = 0; i < k; ++i)
            for (int j = 0; j <= i; ++j)
                gram[i * k + j] = gram[j * k + i] = kind == 1 ? 1.0 : kind == 2 ? 0.0 : normal(generator);
        for (int i = 0; i < k; ++i) gram[i * k + i] += kind == 1 ? 1e-6 * i : kind == 2 ? 0.0 : 3.0 * k;
        if (kind == 3) gram[(k / 2) * (k + 1)] = -1.0;
        if (kind == 4) gram[square - 1] = std::numeric_limits<double>::infinity();
    }
    return grams;
}

struct Result {
    std::vector<double> inverse;
    std::vector<std::int32_t> status;
    bool operator==(const Result& other) const {  // bit for bit, NaN included
        return std::memcmp(inverse.data(), other.inverse.data(), inverse.size() * sizeof(double)) == 0 &&
               status == other.status;
    }
};

template <class Run>
Result solve(const std::vector<double>& grams, int k, double shift, const Run& run) {
    Result r{std::vector<double>(grams.size(), -1.0), std::vector<std::int32_t>(kKinds, -1)};
    run(loraga::CholeskyProblem{grams.data(), r.inverse.data(), r.status.data(), kKinds, k, shift});
    return r;
}

}  // namespace

int main(int count, char** arguments) {
    int wrong = 0;
    for (int a = 1; a < count; ++a) {
        const int k = std::stoi(arguments[a]);
        const double shift = a % 2 == 0 ? 0.0 : 1e-9;
        const auto grams = make_grams(k);
        const auto host = solve(grams, k, shift, loraga::cpu::cholesky_inverse);
        // With a single warp, that warp takes several rows per step, as every warp of a full block does.
        for (const int threads : {loraga::cuda::cholesky_threads(k), 2 * loraga::kLanes})
            for (const bool in_shared : {true, false}) {
                const auto emulated = solve(grams, k, shift, [&](const loraga::CholeskyProblem& problem) {
                    std::vector<double> shared(static_cast<std::size_t>(k) * (k + 1) / 2);
                    loraga::cuda::CholeskyBookkeeping book;
                    emulation::run_block(threads, [&] {
                        loraga::cuda::invert_strided(problem, 0, 1, in_shared ? shared.data() : nullptr, book);
                    });
                });
                const bool right = host == emulated && host.status[0] == 0 && host.status[2] == 1 &&
                                   host.status[3] == k / 2 + 1 && host.status[4] == 1;  // its trace is infinite
                std::printf("k %d, %d threads, %s: %s\n", k, threads, in_shared ? "shared" : "in place",
                            right ? "same bits" : "DIFFERENT");
                wrong += !right;
            }
    }
    return wrong;
}
