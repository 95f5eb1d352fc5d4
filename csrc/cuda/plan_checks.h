#pragma once
// Checks of what kernels are launched with: each throws std::invalid_argument that names the
// operation, the thing, what was expected and what came.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/errors.h"

namespace ep::cuda {

inline void require(bool is_met,
                    const char* operation,
                    const char* what,
                    const std::string& expected,
                    int64_t actual) {
    if (!is_met)
        throw std::invalid_argument(
            text(operation, ": expected ", what, " to be ", expected, ", got ", actual));
}

inline void require_range(
    const char* operation, const char* what, int64_t actual, int64_t low, int64_t high) {
    require(low <= actual && actual <= high, operation, what, text("from ", low, " to ", high),
            actual);
}

inline void require_multiple(const char* operation, const char* what, int64_t actual, int64_t of) {
    require(actual % of == 0, operation, what, text("a multiple of ", of), actual);
}

inline void require_aligned(const char* operation,
                            const char* what,
                            const void* pointer,
                            int64_t bytes) {
    require_multiple(operation, what, static_cast<int64_t>(reinterpret_cast<intptr_t>(pointer)),
                     bytes);
}

}  // namespace ep::cuda
