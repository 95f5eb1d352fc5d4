#pragma once
// One rank's shared memory: a file in a memory file system, mapped by every rank of the host.
#include <cstddef>
#include <memory>
#include <string>

namespace ep {

/// A mapped segment. Its address space is reserved at full size; the owner allocates memory behind
/// it step by step (commit), so no pointer ever moves and a full file system is an error, not a
/// SIGBUS.
///
/// The owner holds a POSIX record lock on the file for as long as it lives: the kernel drops it
/// with the process, however that ends, which is how peers (and the sweep at the next start) know.
class Segment {
 public:
    /// Make this process's segment: mode 0600, a new name, nothing committed.
    static std::shared_ptr<Segment> create(const std::string& folder,
                                           const std::string& name,
                                           size_t num_bytes);
    /// Map a peer's segment; refuses files of another user or with other permissions.
    static std::shared_ptr<Segment> open(const std::string& folder, const std::string& name);
    ~Segment();
    Segment(const Segment&) = delete;
    Segment& operator=(const Segment&) = delete;

    char* base() const { return base_; }
    size_t num_bytes() const { return num_bytes_; }
    bool is_owner() const { return is_owner_; }

    /// Owner: allocate memory for the first `num_bytes` bytes and fault it in. Throws when the file
    /// system is full; what was committed before stays.
    void commit(size_t num_bytes);
    /// Peer: fault in the first `num_bytes` bytes, which the owner has committed. Throws where
    /// they are not there (a file cut short, a full file system) instead of a SIGBUS later.
    void populate(size_t num_bytes);
    /// Whether the process that made the segment lives and has not closed it.
    bool is_owner_alive() const;
    /// Owner: remove the name; mappings stay. Safe to call twice.
    void unlink();
    /// Close the file (for the owner: give up the lock); the mapping stays.
    void close_file();

 private:
    Segment(std::string path, int file, size_t num_bytes, bool is_owner);
    void map();
    void collapse(size_t num_bytes);

    std::string path_;
    int file_;
    size_t num_bytes_;
    bool is_owner_;
    bool has_name_;
    size_t num_ready_ = 0;  // bytes committed (owner) or faulted in (peer)
    char* base_ = nullptr;
};

/// Remove segments whose name starts with `prefix` and whose owner has died before it could.
/// Returns how many.
int remove_stale_segments(const std::string& folder, const std::string& prefix);

}  // namespace ep
