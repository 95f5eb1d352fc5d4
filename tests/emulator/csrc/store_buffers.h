#pragma once
// Weak mode: stores stay with their thread until something makes them visible further out.
//
// A store is first seen by its own lane only, then by the warp, the CTA, the rank, the system. It
// moves outwards when a barrier, fence or release of that reach follows, or at any time by chance.
#include "machine.h"

namespace ptx {

class StoreBuffers {
 public:
    explicit StoreBuffers(Machine& machine, int num_ranks)
        : machine_(machine), by_rank_(size_t(num_ranks)) {}

    void store(Warp& warp,
               int lane,
               Region& region,
               u64 offset,
               const u8* bytes,
               u32 count,
               Order order,
               Scope scope);
    /// Lay the pending stores that this lane may see over what memory holds.
    void overlay(
        const Warp& warp, int lane, const Region& region, u64 offset, u8* bytes, u32 count) const;
    /// What happened before in this lane becomes visible at `scope`.
    void release(const Warp& warp, u32 lanes, Scope scope);
    void warp_barrier(const Warp& warp, u32 lanes);
    void cta_barrier(const Warp& warp, u32 lanes);
    /// Everything pending on these bytes goes to memory.
    void flush(const Region& region, u64 offset, u64 count);
    void flush_cta(const Cta& cta);
    void flush_rank(int rank);
    /// One store goes to memory by chance.
    void drain_one();
    bool empty() const { return num_pending_ == 0; }

 private:
    enum Level : u8 { kLane, kWarp, kCta };
    struct Pending {
        Region* region;
        u64 offset;
        u32 count, warp;
        u8 lane;
        Level level;
        std::array<u8, 32> bytes;
        bool overlaps(const Region& other, u64 at, u64 size) const {
            return region == &other && offset < at + size && at < offset + count;
        }
    };
    using List = std::vector<Pending>;
    u32& filter(const Region& region, u64 offset) { return filter_[hash(region, offset)]; }
    static size_t hash(const Region& region, u64 offset) {
        return ((region.address + offset) >> 5) * 0x9e3779b97f4a7c15 >> 52;
    }
    bool may_hold(const Region& region, u64 offset) const {
        return filter_[hash(region, offset)] != 0;
    }
    void commit(List& list, size_t number);
    void move_to_rank(List& list, size_t number, int rank);
    template <class Choose>
    void commit_where(List& list, Choose choose);
    static void lay(const Pending& pending, u64 offset, u8* bytes, u32 count);

    Machine& machine_;
    std::map<const Cta*, List> by_cta_;
    std::vector<List> by_rank_;
    std::array<u32, 4096> filter_{};
    size_t num_pending_ = 0;
};

}  // namespace ptx
