// The host twin of gradient_add alone, without Python, to be built with sanitizers: buffers of exactly the documented
// sizes, layouts with gaps, and the three floating types. Exits with the number of cases that are wrong.
#include <cmath>
#include <cstdio>
#include <vector>

#include "loraga/gradient_steps.hpp"

namespace {

using loraga::Element;

int wrong = 0;

void expect(bool right, const char* what) {
    if (right) return;
    std::printf("%s\n", what);
    ++wrong;
}

// Every half-precision number, through float32 and back by the definition of the format.
void half_is_what_the_format_says() {
    for (unsigned bits = 0; bits < 0x10000u; ++bits) {
        const auto value = loraga::Float16::load(static_cast<std::uint16_t>(bits));
        const int exponent = static_cast<int>(bits >> 10 & 31u), fraction = static_cast<int>(bits & 1023u);
        const float sign = bits & 0x8000u ? -1.0f : 1.0f;
        if (exponent == 31)
            expect(fraction ? std::isnan(value) : value == sign * INFINITY, "special half");
        else
            expect(value == sign * std::ldexp(exponent ? 1024.0f + fraction : 1.0f * fraction,
                                              exponent ? exponent - 25 : -24), "half");
    }
}

void bfloat16_rounds_to_nearest() {
    for (unsigned bits = 0; bits < 0x10000u; ++bits) {
        const auto stored = static_cast<std::uint16_t>(bits);
        const float value = loraga::BFloat16::load(stored);
        if (std::isnan(value)) {
            expect(std::isnan(loraga::BFloat16::load(loraga::BFloat16::store(value))), "NaN");
            continue;
        }
        expect(loraga::BFloat16::store(value) == stored, "bfloat16 there and back");
        if (!std::isfinite(value)) continue;
        const auto word = loraga::same_bits<std::uint32_t>(value);
        const auto stored_at = [&](std::uint32_t add) { return loraga::BFloat16::store(loraga::same_bits<float>(word + add)); };
        expect(stored_at(0x7fffu) == stored && stored_at(0x8001u) == stored + 1, "nearest");
        expect(stored_at(0x8000u) == stored + (stored & 1u), "tie");
    }
}

void strided() {
    // 2 x 3 x 2 out of a buffer with gaps; expanded; transposed; empty; a single number
    std::vector<float> gradient(40);
    for (int i = 0; i < 40; ++i) gradient[i] = static_cast<float>(i);
    std::vector<float> sum(12, 1.0f);
    std::uint8_t finite = 7;
    loraga::GradientProblem problem{sum.data(), gradient.data(), &finite, Element::kFloat32, Element::kFloat32, 3,
                                    {2, 3, 2},  {20, 1, 7},      0.5f,    false};
    gradient[38] = NAN;  // in a gap
    loraga::cpu::gradient_add(problem);
    expect(finite == 1 && sum[0] == 1.0f && sum[1] == 4.5f && sum[2] == 1.5f && sum[11] == 1.0f + 0.5f * 29, "strided");
    gradient[29] = NAN;
    loraga::cpu::gradient_add(problem);
    expect(finite == 0 && sum[11] == 1.0f + 0.5f * 29 && sum[1] == 4.5f, "nothing is added");
    problem.finite_is_given = true;
    finite = 1;
    loraga::cpu::gradient_add(problem);
    expect(finite == 1 && std::isnan(sum[11]) && sum[1] == 8.0f, "the caller decides");
    loraga::GradientProblem one{sum.data(), gradient.data() + 4, &finite, Element::kFloat32, Element::kFloat32, 0,
                                {},         {},                  1.0f,    false};
    sum[0] = 2.0f;
    loraga::cpu::gradient_add(one);
    expect(sum[0] == 6.0f, "a number");
    finite = 9;
    loraga::cpu::gradient_add({nullptr, nullptr, &finite, Element::kBFloat16, Element::kFloat16, 2, {0, 5}, {5, 1}, 1.0f, false});
    expect(finite == 1, "empty");
}

}  // namespace

int main() {
    half_is_what_the_format_says();
    bfloat16_rounds_to_nearest();
    strided();
    return wrong;
}
