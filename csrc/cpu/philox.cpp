#include "loraga/philox.hpp"

#include <algorithm>

namespace loraga::cpu {
namespace {

struct Words {
    std::uint32_t word[4];
};

Words philox(std::uint64_t counter, std::uint64_t seed) {
    std::uint32_t c0 = static_cast<std::uint32_t>(counter), c1 = static_cast<std::uint32_t>(counter >> 32);
    std::uint32_t c2 = 0, c3 = 0;
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c0, p1 = std::uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<std::uint32_t>(p1);
        c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<std::uint32_t>(p0);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
}

}  // namespace

void fill_uniform(float* out, std::int64_t count, std::uint64_t seed) {
    for (std::int64_t i = 0; i < count; i += 4) {
        const Words words = philox(static_cast<std::uint64_t>(i / 4), seed);
        const std::int64_t left = std::min<std::int64_t>(4, count - i);
        for (std::int64_t j = 0; j < left; ++j) {
            out[i + j] = static_cast<float>(words.word[j] >> 8) * 0x1p-23f - 1.0f;
        }
    }
}

}  // namespace loraga::cpu
