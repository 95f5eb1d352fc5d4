#pragma once
// Data races: two accesses of one place, one of them a write, not both strong enough for each
// other, and neither known to happen before the other. README.md describes the model.
#include "machine.h"

namespace ptx {

/// Who accesses memory.
struct Agent {
    u32 slot = 0;
    u32 lane = 0;
    u32 time = 0;
    const Knowledge* knowledge = nullptr;
    u32 cta = 0;
    int device = 0;
    bool is_async = false;
};

class Races {
 public:
    explicit Races(Machine& machine, int num_ranks);

    // Warps.
    void start_launch(Launch& launch, const Knowledge& stream);
    void start_warp(Warp& warp, u64 number_in_launch);
    void finish_warp(Warp& warp);

    // Accesses.
    void access(const Agent& agent,
                Region& region,
                u64 offset,
                u32 count,
                bool is_write,
                Order order,
                Scope scope,
                i32 site);
    Agent agent_of(const Warp& warp, int lane) const;

    // Synchronisation. `tick` ends the step of a warp that published something.
    void tick(const Warp& warp) { ++slots_[warp.slot].time; }
    Knowledge publish(const Warp& warp, int lane) const;
    Knowledge publish(const Warp& warp, u32 lanes) const;
    void arrive(Step& step, Knowledge& into);
    void acquire(Step& step, const Knowledge& from);
    void acquire(Warp& warp, int lane, const Knowledge& from) {
        warp.knowledge->known[size_t(lane)].join(from);
    }
    void sync_warp(Step& step);
    void read_from(Warp& warp, int lane, Region& region, u64 offset, Order order, Scope scope);
    void written_to(
        Warp& warp, int lane, Region& region, u64 offset, Order order, Scope scope, bool is_atomic);
    void fence(Step& step, Scope scope);
    void proxy_fence(Step& step);

    // The async proxy: each copy is an agent of its own for reading and one for writing.
    struct AsyncAgents {
        Agent reader, writer;
        Knowledge issued;
    };
    void issue(Warp& warp, int lane, AsyncAgents& agents);
    /// What whoever waits for this agent comes to know.
    Knowledge completion(const Agent& agent, const Knowledge& issued) const;

    // Hosts.
    Knowledge& host(int rank) { return hosts_[size_t(rank)]; }
    void host_access(int rank, Region& region, u64 offset, u32 count, bool is_write);
    void host_synchronized(int rank, const Knowledge& launch) { host(rank).join(launch); }
    void meet();

 private:
    struct Slot {
        u32 time = 1;
        u32 cta = 0;
        int device = 0;
    };
    static bool includes(Scope scope, u32 cta, int device, u32 other_cta, int other_device) {
        if (scope == Scope::kSys) return true;
        return device == other_device && (scope == Scope::kGpu || cta == other_cta);
    }
    u32 slot_of(const Launch& launch, u64 number);
    void compare(
        const Access& old, const Access& now, const Agent& agent, const Region& region, u64 line);
    void access_cell(Cell& cell, const Access& now, const Agent& agent, Region& region, u64 line);
    void split(Line& line);
    void record_read(Cell& cell, const Access& now, const Agent& agent);
    void record_write(Cell& cell, const Access& now);
    void remember(Cell& cell, const Access& access);
    void complain(const char* kind,
                  const Access& old,
                  const Access& now,
                  const Agent& agent,
                  const Region& region,
                  u64 line);

    Machine& machine_;
    std::vector<Slot> slots_;
    std::map<std::tuple<int, int, u64>, u32> slot_numbers_;
    std::vector<Knowledge> hosts_;
    std::vector<std::vector<Access>> more_;
    std::deque<std::array<Cell, 4>> words_;
};

}  // namespace ptx
