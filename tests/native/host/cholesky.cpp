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
void fill(double* gram, int k, int kind, std::mt19937& generator) {
    std::normal_distribution<double> normal;
    const int rows = 2 * k + 3;
    std::vector<double> tall(static_cast<std::size_t>(rows) * k);
    for (auto& value : tall) value = normal(generator);
    for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j) {
            double sum = 0.0;
            for (int row = 0; row < rows; ++row) sum += tall[row * k + i] * tall[row * k + j];
            if (kind == kGraded) sum *= std::pow(10.0, -static_cast<double>(i + j) / k);
            if (kind == kHuge) sum *= 1e290;
            if (kind == kTiny) sum *= 1e-290;
            if (kind == kZero) sum = 0.0;
            gram[i * k + j] = sum;
        }
    if (kind == kIndefinite) gram[k * k - 1] = -1.0;
    if (kind == kNotANumber) gram[(k - 1) * k] = std::numeric_limits<double>::quiet_NaN();
}

bool right(const double* gram, const double* inverse, int status, int k, int kind) {
    if (kind >= kZero) {
        const int expected = kind == kZero ? 1 : k;
        return status == expected && std::all_of(inverse, inverse + k * k, [](double v) { return std::isnan(v); });
    }
    double worst = 0.0;  // of X gram X' - 1
    std::vector<double> product(static_cast<std::size_t>(k) * k);
    for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j)
            for (int l = 0; l <= i; ++l) product[i * k + j] += inverse[i * k + l] * gram[l * k + j];
    for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j) {
            double sum = i == j ? -1.0 : 0.0;
            for (int l = 0; l < k; ++l) sum += product[i * k + l] * inverse[j * k + l];
            worst = std::max(worst, std::fabs(sum));
            if (j > i && inverse[i * k + j] != 0.0) return false;
        }
    return status == 0 && worst <= 1e-11;
}

}  // namespace

int main() {
    int wrong = 0;
    std::mt19937 generator(0);
    for (const int k : {1, 2, 3, 8, 17, 64, 256}) {
        const std::size_t square = static_cast<std::size_t>(k) * k;
        const auto gram = std::make_unique<double[]>(kKinds * square), inverse = std::make_unique<double[]>(kKinds * square);
        const auto status = std::make_unique<std::int32_t[]>(kKinds);
        for (int kind = 0; kind < kKinds; ++kind) fill(gram.get() + kind * square, k, kind, generator);
        loraga::cpu::cholesky_inverse({gram.get(), inverse.get(), status.get(), kKinds, k, 0.0});
        for (int kind = 0; kind < kKinds; ++kind) {
            if (right(gram.get() + kind * square, inverse.get() + kind * square, status[kind], k, kind)) continue;
            std::printf("k %d, kind %d is wrong\n", k, kind);
            ++wrong;
        }
    }
    loraga::cpu::cholesky_inverse({nullptr, nullptr, nullptr, 0, 5, 0.0});
    return wrong;
}
