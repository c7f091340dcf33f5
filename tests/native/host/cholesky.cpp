// The host twin of the Cholesky inverse alone, without Python, to be built with sanitizers: buffers of exactly the
// documented sizes, every kind of Gram matrix, and what must hold of the result. Exits with the number that are wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "loraga/cholesky.hpp"

namespace {

enum Kind { kRandom, kGraded, kHuge, kTiny, kZero, kIndefinite, kNotANumber, kKinds };

// A'A of a random tall A, scaled; then spoilt where the kind says so.
template <class Real>
void fill(Real* gram, int k, int kind, std::mt19937& generator) {
    std::normal_distribution<double> normal;
    const int rows = 2 * k + 3;
    std::vector<double> tall(static_cast<std::size_t>(rows) * k);
    for (auto& value : tall) value = normal(generator);
    for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j) {
            double sum = 0.0;
            for (int row = 0; row < rows; ++row) sum += tall[row * k + i] * tall[row * k + j];
            if (kind == kGraded) sum *= std::pow(10.0, -static_cast<double>(i + j) / k);
            if (kind == kHuge) sum *= sizeof(Real) == 8 ? 1e290 : 1e30;
            if (kind == kTiny) sum *= sizeof(Real) == 8 ? 1e-290 : 1e-30;
            if (kind == kZero) sum = 0.0;
            gram[i * k + j] = static_cast<Real>(sum);
        }
    if (kind == kIndefinite) gram[k * k - 1] = -1;
    if (kind == kNotANumber) gram[(k - 1) * k] = std::numeric_limits<Real>::quiet_NaN();
}

template <class Real>
bool right(const Real* gram, const Real* inverse, int status, int k, int kind) {
    if (kind >= kZero) {
        const int expected = kind == kZero ? 1 : k;
        return status == expected && std::all_of(inverse, inverse + k * k, [](Real v) { return std::isnan(v); });
    }
    double worst = 0.0;  // of X gram X' - 1
    std::vector<double> product(static_cast<std::size_t>(k) * k);
    for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j)
            for (int l = 0; l <= i; ++l) product[i * k + j] += double(inverse[i * k + l]) * gram[l * k + j];
    for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j) {
            double sum = i == j ? -1.0 : 0.0;
            for (int l = 0; l < k; ++l) sum += product[i * k + l] * inverse[j * k + l];
            worst = std::max(worst, std::fabs(sum));
            if (j > i && inverse[i * k + j] != 0) return false;
        }
    return status == 0 && worst <= 5e4 * std::numeric_limits<Real>::epsilon();  // of k = 256 and condition 1e4
}

template <class Real>
int count_wrong() {
    int wrong = 0;
    std::mt19937 generator(0);
    for (const int k : {1, 2, 3, 8, 17, 64, 256}) {
        const std::size_t square = static_cast<std::size_t>(k) * k;
        const auto gram = std::make_unique<Real[]>(kKinds * square), inverse = std::make_unique<Real[]>(kKinds * square);
        const auto status = std::make_unique<std::int32_t[]>(kKinds);
        for (int kind = 0; kind < kKinds; ++kind) fill(gram.get() + kind * square, k, kind, generator);
        loraga::cpu::cholesky_inverse<Real>({gram.get(), inverse.get(), status.get(), kKinds, k, 0.0});
        for (int kind = 0; kind < kKinds; ++kind) {
            if (right(gram.get() + kind * square, inverse.get() + kind * square, status[kind], k, kind)) continue;
            std::printf("k %d, kind %d is wrong\n", k, kind);
            ++wrong;
        }
    }
    loraga::cpu::cholesky_inverse<Real>({nullptr, nullptr, nullptr, 0, 5, 0.0});
    return wrong;
}

}  // namespace

int main() { return count_wrong<float>() + count_wrong<double>(); }
