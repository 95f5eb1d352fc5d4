#pragma once
// Memory as regions: allocations of a rank, shared memory of a CTA.
#include <cstdlib>
#include <unordered_map>

#include "clocks.h"

namespace ptx {

/// One access as race detection remembers it.
struct Access {
    u32 slot = 0;
    u32 lanes = 0;  // 0: no access
    u32 time = 0;
    i32 site = 0;
    u16 bytes = 0;    // which of the line's
    u8 strength = 0;  // 0 weak, else 1 + scope
    bool is_write = false;
    bool is_async = false;  // by the async proxy
};

/// What has been done to some bytes of a line.
struct Cell {
    Access write, read;
    i32 more = -1;  // further accesses that are not ordered with these; index into a pool
};

/// The shadow of sixteen bytes. Rows move by lines, so one cell mostly does for all of them; what
/// is accessed in smaller pieces has a cell for every four bytes, until a whole line is written.
struct Line {
    Cell whole;
    i32 words = -1;  // four cells; index into a pool
    bool is_split = false;
};

constexpr u64 kLineBytes = 16;

/// Something an acquire of the location can synchronise with.
struct Message {
    Knowledge knowledge;
    Scope scope;
    u32 cta;
    int device;
};

struct Free {
    void operator()(u8* bytes) const { std::free(bytes); }
};
using Bytes = std::unique_ptr<u8[], Free>;

struct Region {
    static constexpr u64 kLinesPerPage = 256;

    u64 address = 0;  // 0-based for shared memory
    u64 num_bytes = 0;
    int rank = 0;
    bool is_shared = false;  // a CTA's shared memory
    bool symmetric = false;  // peers may access it
    bool freed = false;
    std::string name;
    Bytes data;
    Bytes written;  // 1 where something has been written
    std::vector<std::unique_ptr<Line[]>> shadow;
    std::unordered_map<u64, std::vector<Message>> messages;  // by offset

    Region(u64 address_, u64 num_bytes_, int rank_);
    Line& line(u64 index) {
        if (shadow.empty()) shadow.resize(num_bytes / kLineBytes / kLinesPerPage + 1);
        auto& page = shadow[index / kLinesPerPage];
        if (!page) page = std::make_unique<Line[]>(kLinesPerPage);
        return page[index % kLinesPerPage];
    }
    bool contains(u64 at, u64 count) const {
        return at >= address && at - address <= num_bytes && count <= num_bytes - (at - address);
    }
};

/// The global address space of all ranks. Addresses are never used twice, and between two
/// allocations lies at least one page of nothing.
class Memory {
 public:
    Region& allocate(int rank, u64 num_bytes, bool symmetric, std::string name);
    void free(u64 address);
    /// The region that holds this address, or null.
    Region* find(u64 address) const {
        const u64 page = (address - kBase) >> kPageBits;
        if (address < kBase || page >= pages_.size() || pages_[page] < 0) return nullptr;
        Region* region = regions_[size_t(pages_[page])].get();
        return address - region->address < region->num_bytes ? region : nullptr;
    }
    /// Why `count` bytes at `address` are not memory: for error messages.
    std::string explain(u64 address, u64 count) const;

 private:
    static constexpr u64 kBase = 0x7f00'0000'0000;
    static constexpr int kPageBits = 12;
    std::vector<std::unique_ptr<Region>> regions_;
    std::vector<i32> pages_;  // page -> region, or -1
};

}  // namespace ptx
