// The uniform numbers of the host, without Python, to be built with sanitizers: buffers of exactly the documented
// sizes, the known answer of Philox4x32-10 at counter 0 under key 0 (Random123's kat_vectors), and independence of the length.
// Exits with the number that are wrong.
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <memory>

#include "loraga/philox.hpp"

int main() {
    constexpr std::uint32_t kKnown[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    int wrong = 0;
    for (std::int64_t count : std::initializer_list<std::int64_t>{0, 1, 2, 3, 4, 5, 63, 64, 1001}) {
        for (std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{7}, ~std::uint64_t{0}}) {
            std::unique_ptr<float[]> out(new float[count]), longer(new float[count + 3]);
            loraga::cpu::fill_uniform(out.get(), count, seed);
            loraga::cpu::fill_uniform(longer.get(), count + 3, seed);
            for (std::int64_t i = 0; i < count; ++i) {
                bool right = out[i] == longer[i] && out[i] >= -1.0f && out[i] < 1.0f;
                if (seed == 0 && i < 4) right &= out[i] == static_cast<float>(kKnown[i] >> 8) / 8388608.0f - 1.0f;
                if (!right) std::printf("number %lld of %lld under %llu: %g\n", static_cast<long long>(i),
                                        static_cast<long long>(count), static_cast<unsigned long long>(seed), out[i]);
                wrong += !right;
            }
        }
    }
    return wrong > 100 ? 100 : wrong;
}
