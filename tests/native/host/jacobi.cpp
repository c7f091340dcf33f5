// The host twin alone, without Python, to be built with sanitizers: buffers of exactly the documented sizes, every kind
// of core, and what must hold of the result. Exits with the number of cores that are wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>

#include "loraga/jacobi.hpp"

namespace {

enum Kind { kRandom, kZero, kRankOne, kGraded, kHuge, kTiny, kNotANumber, kKinds };

void fill(float* core, int k, int kind, std::mt19937& generator) {
    std::normal_distribution<float> normal;
    for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j) {
            float value = normal(generator);
            if (kind == kZero) value = 0.0f;
            if (kind == kRankOne) value = static_cast<float>((i + 1) * (j - 3));
            if (kind == kGraded) value *= std::pow(10.0f, -30.0f * static_cast<float>(i) / static_cast<float>(k));
            if (kind == kHuge) value *= 1e30f;
            if (kind == kTiny) value *= 1e-42f;
            core[i * k + j] = value;
        }
    if (kind == kNotANumber) core[0] = std::numeric_limits<float>::quiet_NaN();
}

bool right(const float* core, const float* u, const float* s, const float* vh, int status, int k, int kind) {
    if (kind == kNotANumber) return status == 2 && std::isnan(s[0]) && std::isnan(u[0]) && std::isnan(vh[0]);
    double worst = 0.0;
    const double largest = std::max<double>(s[0], std::numeric_limits<float>::denorm_min());
    for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j) {
            double product = 0.0, uu = i == j ? -1.0 : 0.0, vv = uu;
            for (int l = 0; l < k; ++l) {
                product += static_cast<double>(u[i * k + l]) * s[l] * vh[l * k + j];
                uu += static_cast<double>(u[l * k + i]) * u[l * k + j];
                vv += static_cast<double>(vh[i * k + l]) * vh[j * k + l];
            }
            // Near the smallest numbers of float32 the singular values are rounded to whole steps.
            const double step = kind == kTiny ? k * std::numeric_limits<float>::denorm_min() : 0.0;
            const double miss = std::max(0.0, std::fabs(product - core[i * k + j]) - step) / largest;
            worst = std::max({worst, miss, std::fabs(uu), std::fabs(vv)});
        }
    return status == 0 && worst <= 1e-6 && std::is_sorted(s, s + k, [](float a, float b) { return a > b; });
}

}  // namespace

int main() {
    int wrong = 0;
    std::mt19937 generator(0);
    for (const int k : {1, 2, 3, 8, 17, 33, 64, 65}) {
        const std::size_t square = static_cast<std::size_t>(k) * k;
        const auto core = std::make_unique<float[]>(kKinds * square), u = std::make_unique<float[]>(kKinds * square),
                   s = std::make_unique<float[]>(static_cast<std::size_t>(kKinds) * k),
                   vh = std::make_unique<float[]>(kKinds * square);
        const auto status = std::make_unique<std::int32_t[]>(kKinds);
        for (int kind = 0; kind < kKinds; ++kind) fill(core.get() + kind * square, k, kind, generator);
        const std::size_t bytes = loraga::cpu::jacobi_svd_workspace(kKinds, k);
        const auto workspace = std::make_unique<double[]>(bytes / sizeof(double));
        loraga::cpu::jacobi_svd({core.get(), u.get(), s.get(), vh.get(), status.get(), kKinds, k}, {},
                                {workspace.get(), bytes});
        for (int kind = 0; kind < kKinds; ++kind) {
            if (right(core.get() + kind * square, u.get() + kind * square, s.get() + kind * k, vh.get() + kind * square,
                      status[kind], k, kind))
                continue;
            std::printf("k %d, kind %d is wrong\n", k, kind);
            ++wrong;
        }
    }
    loraga::cpu::jacobi_svd({nullptr, nullptr, nullptr, nullptr, nullptr, 0, 5}, {}, {nullptr, 0});
    return wrong;
}
