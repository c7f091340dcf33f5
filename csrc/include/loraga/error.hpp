// Exceptions of the native core. Each message carries what failed and where; bindings.cpp turns them into
// Python exceptions (std::invalid_argument -> ValueError, CudaError -> RuntimeError).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace loraga {

class CudaError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

}  // namespace loraga

// `message` is streamed, so it can hold the offending values: LORAGA_REQUIRE(k > 0, "k is " << k)
#define LORAGA_REQUIRE(condition, message)                                                                            \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            std::ostringstream loraga_text;                                                                           \
            loraga_text << message << " (" << #condition << " does not hold, " << __FILE__ << ":" << __LINE__ << ")"; \
            throw std::invalid_argument(loraga_text.str());                                                           \
        }                                                                                                             \
    } while (0)
