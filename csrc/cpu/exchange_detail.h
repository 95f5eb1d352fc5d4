#pragma once
// What dispatch (exchange.cpp) and combine (exchange_combine.cpp) have in common.
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/exchange.h"

namespace ep {

/// Every rank finds the same reason in the posts and throws it; no row has moved, and no rank
/// raises its flag for this call: the next call goes on.
struct AgreedFailure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

constexpr size_t kBytesPerThread = 256 << 10;  // fewer are not worth waking a second thread

inline size_t round_up(size_t count, size_t alignment) {
    return (count + alignment - 1) / alignment * alignment;
}

/// Rows of as many bytes that are worth a thread.
inline int64_t rows_per_thread(size_t row_bytes) {
    return static_cast<int64_t>(kBytesPerThread / std::max<size_t>(row_bytes, 1)) + 1;
}

inline void write_error(Post& post, ErrorKind kind, const std::string& error) {
    post.error_kind = kind;
    std::strncpy(post.error, error.c_str(), kErrorBytes - 1);
    post.error[kErrorBytes - 1] = 0;
}

/// Run what follows a post. Where it fails on this rank alone, the group ends: the others count on
/// what it would have done. They may write into `block`, and read it, long after: it stays.
template <class Call>
auto Exchange::take_part(const std::shared_ptr<Block>& block, const Call& call) {
    try {
        return call();
    } catch (const AgreedFailure&) {
        throw;
    } catch (const std::exception& error) {
        retired_ = block;
        if (meeting_->is_broken()) throw;
        meeting_->break_down(error.what());
    }
}

}  // namespace ep
