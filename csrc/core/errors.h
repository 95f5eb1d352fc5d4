#pragma once
// Errors as exceptions: std::invalid_argument becomes Python's ValueError, std::runtime_error
// becomes RuntimeError.
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

namespace ep {

template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    throw std::runtime_error(text(parts...));
}

/// `what` failed in the system: with the system's reason.
[[noreturn]] inline void fail_errno(const std::string& what, int error) {
    fail(what, ": ", std::strerror(error));
}

}  // namespace ep
