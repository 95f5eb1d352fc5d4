#pragma once
// The rows' part of a segment: blocks whose memory returns with the last tensor that views them.
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>

#include "cpu/segment.h"

namespace ep {

class Block;

/// Allocates blocks from the owner's segment, behind its control part. Thread-safe: tensors die
/// wherever autograd drops them.
class Arena : public std::enable_shared_from_this<Arena> {
 public:
    /// @param first_byte  where the arena starts in the segment; a multiple of kAlignment.
    Arena(std::shared_ptr<Segment> segment, size_t first_byte);

    /// A block of at least `num_bytes` bytes, committing more memory when no free part fits.
    /// Throws when the segment's limit or the file system's is reached.
    std::shared_ptr<Block> allocate(size_t num_bytes);
    /// The largest free part of the memory committed so far; null when there is none.
    std::shared_ptr<Block> allocate_largest();
    /// Give back what lies behind the first `num_bytes` bytes of `block`.
    void trim(Block& block, size_t num_bytes);
    /// Commit so that `num_bytes` are ready in all.
    void reserve(size_t num_bytes);

    bool contains(const void* address) const;
    size_t offset_of(const void* address) const;
    char* base() const { return segment_->base(); }
    size_t committed() const;
    size_t num_bytes_in_use() const;

    static constexpr size_t kAlignment = 4096;  // a page: blocks share no page table entry

 private:
    friend class Block;
    void release(size_t offset, size_t num_bytes);
    void grow(size_t num_bytes);
    std::shared_ptr<Block> take(std::map<size_t, size_t>::iterator part, size_t num_bytes);

    std::shared_ptr<Segment> segment_;
    const size_t first_byte_;
    mutable std::mutex mutex_;
    size_t end_;                     // committed bytes of the segment
    std::map<size_t, size_t> free_;  // offset -> bytes; neighbours are merged
    size_t num_in_use_ = 0;
};

/// A part of an arena; gives it back when destroyed. Offsets count from the segment's start.
class Block {
 public:
    Block(std::shared_ptr<Arena> arena, size_t offset, size_t num_bytes)
        : arena_(std::move(arena)), offset_(offset), num_bytes_(num_bytes) {}
    ~Block() { arena_->release(offset_, num_bytes_); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    char* data() const { return arena_->base() + offset_; }
    size_t offset() const { return offset_; }
    size_t num_bytes() const { return num_bytes_; }

 private:
    friend class Arena;
    std::shared_ptr<Arena> arena_;
    size_t offset_;
    size_t num_bytes_;
};

}  // namespace ep
