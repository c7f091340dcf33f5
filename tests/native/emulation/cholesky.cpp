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

using namespace loraga::cuda;

// A batch with one matrix of each kind: well conditioned, nearly singular, zero, indefinite in the middle, not finite.
constexpr int kKinds = 5;

template <class Real>
std::vector<Real> make_grams(int k) {
    std::mt19937 generator(static_cast<unsigned>(k));
    std::normal_distribution<Real> normal;
    const int square = k * k;
    std::vector<Real> grams(static_cast<std::size_t>(kKinds) * square);
    for (int kind = 0; kind < kKinds; ++kind) {
        Real* gram = grams.data() + static_cast<std::size_t>(kind) * square;
        for (int i = 0; i < k; ++i)
            for (int j = 0; j <= i; ++j)
                gram[i * k + j] = gram[j * k + i] = kind == 1 ? Real(1) : kind == 2 ? Real(0) : normal(generator);
        for (int i = 0; i < k; ++i) gram[i * k + i] += static_cast<Real>(kind == 1 ? 1e-6 * i : kind == 2 ? 0.0 : 3.0 * k);
        if (kind == 3) gram[(k / 2) * (k + 1)] = -1.0;
        if (kind == 4) gram[square - 1] = std::numeric_limits<Real>::infinity();
    }
    return grams;
}

template <class Real>
struct Result {
    std::vector<Real> inverse;
    std::vector<std::int32_t> status;
    bool operator==(const Result& other) const {  // bit for bit, NaN included
        return std::memcmp(inverse.data(), other.inverse.data(), inverse.size() * sizeof(Real)) == 0 &&
               status == other.status;
    }
};

template <class Real, class Run>
Result<Real> solve(const std::vector<Real>& grams, int k, double shift, const Run& run) {
    Result<Real> r{std::vector<Real>(grams.size(), Real(-1)), std::vector<std::int32_t>(kKinds, -1)};
    run(loraga::CholeskyProblem<Real>{grams.data(), r.inverse.data(), r.status.data(), kKinds, k, shift});
    return r;
}

template <class Real>
int compare(int k, double shift, const char* type) {
    int wrong = 0;
    const auto grams = make_grams<Real>(k);
    const auto host = solve(grams, k, shift, loraga::cpu::cholesky_inverse<Real>);
    // With few warps, each takes rows several times, as in a full block from k = 65 on.
    for (const int threads : {cholesky_threads(k), 2 * loraga::kLanes})
        for (const bool in_shared : {true, false}) {
            const auto emulated = solve(grams, k, shift, [&](const loraga::CholeskyProblem<Real>& problem) {
                std::vector<Real> memory(static_cast<std::size_t>(k) * (k + 1) / 2);
                std::vector<RowFactors<Real>> groups(kPanel * cholesky_stride(k) / kRows);
                Real* panel = groups.data()->of;
                CholeskyBookkeeping<Real> book;
                emulation::run_block(threads, [&] {
                    if (in_shared)
                        invert_strided<true>(problem, 0, 1, panel, memory.data(), book);
                    else
                        invert_strided<false, Real>(problem, 0, 1, panel, nullptr, book);
                });
            });
            const bool right = host == emulated && host.status[0] == 0 && host.status[2] == 1 &&
                               host.status[3] == (shift > 0 && k > 1 ? 0 : k / 2 + 1) &&
                               host.status[4] == 1;  // its trace is infinite
            std::printf("%s, k %d, %d threads, %s: %s\n", type, k, threads, in_shared ? "shared" : "in place",
                        right ? "same bits" : "DIFFERENT");
            wrong += !right;
        }
    return wrong;
}

}  // namespace

int main(int count, char** arguments) {
    int wrong = 0;
    for (int a = 1; a < count; ++a) {
        const int k = std::stoi(arguments[a]);
        const double shift = a % 2 == 0 ? 0.0 : 1e-9;
        wrong += compare<float>(k, shift, "float32") + compare<double>(k, shift, "float64");
    }
    return wrong;
}
