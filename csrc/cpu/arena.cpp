#include "cpu/arena.h"

#include <algorithm>
#include <utility>

namespace ep {
namespace {

constexpr size_t kGrowth = size_t{2} << 20;

size_t round_up(size_t count, size_t alignment) {
    return (count + alignment - 1) / alignment * alignment;
}

}  // namespace

Arena::Arena(std::shared_ptr<Segment> segment, size_t first_byte)
    : segment_(std::move(segment)), first_byte_(first_byte), end_(first_byte) {}

std::shared_ptr<Block> Arena::allocate(size_t num_bytes) {
    num_bytes = round_up(std::max<size_t>(num_bytes, 1), kAlignment);
    const std::lock_guard lock(mutex_);
    const auto fits = [&](const auto& part) { return part.second >= num_bytes; };
    auto part = std::find_if(free_.begin(), free_.end(), fits);
    if (part == free_.end()) {
        // Only what the last free part lacks is new.
        size_t missing = num_bytes;
        if (!free_.empty()) {
            const auto& [offset, size] = *free_.rbegin();
            if (offset + size == end_) missing -= size;
        }
        grow(end_ + missing);
        part = std::prev(free_.end());
    }
    return take(part, num_bytes);
}

std::shared_ptr<Block> Arena::allocate_largest() {
    const std::lock_guard lock(mutex_);
    const auto smaller = [](const auto& a, const auto& b) { return a.second < b.second; };
    const auto part = std::max_element(free_.begin(), free_.end(), smaller);
    return part == free_.end() ? nullptr : take(part, part->second);
}

std::shared_ptr<Block> Arena::take(std::map<size_t, size_t>::iterator part, size_t num_bytes) {
    const auto [offset, size] = *part;
    free_.erase(part);
    if (size > num_bytes) free_.emplace(offset + num_bytes, size - num_bytes);
    num_in_use_ += num_bytes;
    return std::make_shared<Block>(shared_from_this(), offset, num_bytes);
}

void Arena::trim(Block& block, size_t num_bytes) {
    num_bytes = round_up(std::max<size_t>(num_bytes, 1), kAlignment);
    if (num_bytes >= block.num_bytes_) return;
    const size_t rest = block.num_bytes_ - num_bytes;
    block.num_bytes_ = num_bytes;
    release(block.offset_ + num_bytes, rest);
}

void Arena::release(size_t offset, size_t num_bytes) {
    const std::lock_guard lock(mutex_);
    num_in_use_ -= num_bytes;
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && offset + num_bytes == next->first) {
        num_bytes += next->second;
        next = free_.erase(next);
    }
    if (next != free_.begin()) {
        const auto previous = std::prev(next);
        if (previous->first + previous->second == offset) {
            previous->second += num_bytes;
            return;
        }
    }
    free_.emplace(offset, num_bytes);
}

void Arena::reserve(size_t num_bytes) {
    const std::lock_guard lock(mutex_);
    if (first_byte_ + num_bytes > end_) grow(first_byte_ + num_bytes);
}

void Arena::grow(size_t end) {
    // A quarter more than asked for, so that slowly rising sizes do not grow it at every call; if
    // that much is not to be had, what is needed.
    const size_t exact = std::min(round_up(end, kGrowth), segment_->num_bytes());
    const size_t generous =
        std::min(round_up(end + (end - first_byte_) / 4, kGrowth), segment_->num_bytes());
    size_t new_end = std::max(generous, end);  // beyond the limit commit() says so
    try {
        segment_->commit(new_end);
    } catch (const std::exception&) {
        new_end = std::max(exact, end);
        segment_->commit(new_end);
    }
    const size_t old_end = std::exchange(end_, new_end);
    if (!free_.empty()) {
        auto& [offset, size] = *free_.rbegin();
        if (offset + size == old_end) {
            size += new_end - old_end;
            return;
        }
    }
    free_.emplace(old_end, new_end - old_end);
}

bool Arena::contains(const void* address) const {
    const auto* byte = static_cast<const char*>(address);
    return byte >= base() + first_byte_ && byte < base() + segment_->num_bytes();
}

size_t Arena::offset_of(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) - base());
}

size_t Arena::committed() const {
    const std::lock_guard lock(mutex_);
    return end_;
}

size_t Arena::num_bytes_in_use() const {
    const std::lock_guard lock(mutex_);
    return num_in_use_;
}

}  // namespace ep
