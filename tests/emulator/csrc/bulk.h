#pragma once
// Bulk copies: asynchronous agents that read and write memory piece by piece, whenever they like.
#include "races.h"

namespace ptx {

class BulkCopies {
 public:
    explicit BulkCopies(Machine& machine) : machine_(machine) {}

    struct Copy {
        Warp* warp;
        const Instruction* instruction;
        Region *from, *to;
        u64 from_offset, to_offset;
        u32 num_bytes;
        u64 barrier;  // shared address of the barrier that counts the bytes; loads only
        u64 group;    // bulk group; stores only
        bool is_store;
        u32 num_read = 0, num_written = 0;
        std::vector<u8> bytes;
        Races::AsyncAgents agents;
    };
    void start(Copy copy);
    /// One copy, chosen by chance, moves on a little.
    void step();
    bool empty() const { return flying_.empty(); }
    /// Whether the warp's committed groups, all but the `keep` latest, have come so far.
    bool groups_are_done(const Warp& warp, u64 keep, bool only_read) const;
    bool use_shared_memory_of(const Cta& cta) const;
    bool any_of(const Launch& launch) const;

 private:
    void read_some(Copy& copy, u32 count);
    void write_some(Copy& copy, u32 count);
    void finish(Copy& copy);

    Machine& machine_;
    std::vector<Copy> flying_;
};

}  // namespace ptx
