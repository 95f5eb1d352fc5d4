#include "races.h"

#include <cstring>
#include <sstream>

namespace ptx {
namespace {

constexpr size_t kMostRemembered = 128;  // accesses per cell beyond the last read and write

bool is_equal(const Access& a, const Access& b) {
    static_assert(std::has_unique_object_representations_v<Access>);
    return std::memcmp(&a, &b, sizeof a) == 0;
}

std::string name_of(int device) {
    return device < 0 ? "the host of rank " + std::to_string(host_of(device))
                      : "rank " + std::to_string(device);
}

bool is_same_step(const Access& a, const Access& b) {
    return a.lanes && a.slot == b.slot && a.time == b.time && a.site == b.site &&
           a.is_write == b.is_write && a.bytes == b.bytes;
}

}  // namespace

Races::Races(Machine& machine, int num_ranks) : machine_(machine), hosts_(size_t(num_ranks)) {
    for (int rank = 0; rank < num_ranks; ++rank) {
        slots_.push_back({1, ~0u, host_of(rank)});
        hosts_[size_t(rank)].seen = std::make_shared<Clock>();
    }
}

u32 Races::slot_of(const Launch& launch, u64 number) {
    // A stream's next kernel begins after the last one, so its warps may continue the same slots.
    const auto [place, is_new] =
        slot_numbers_.try_emplace({launch.rank, launch.stream, number}, u32(slots_.size()));
    if (is_new) slots_.push_back({1, 0, launch.device});
    slots_[place->second].device = launch.device;
    return place->second;
}

void Races::start_launch(Launch& launch, const Knowledge& stream) {
    launch.knowledge.join(stream);
    // The beginning of a kernel orders all that came before for every proxy.
    if (machine_.tracks_proxy()) launch.knowledge.proxied = launch.knowledge.seen;
}

void Races::start_warp(Warp& warp, u64 number_in_launch) {
    const Launch& launch = *warp.cta->launch;
    warp.slot = slot_of(launch, number_in_launch * 3);
    slots_[warp.slot].cta = warp.cta->id;
    warp.knowledge = std::make_unique<WarpKnowledge>();
    warp.knowledge->known.fill(launch.knowledge);
}

void Races::finish_warp(Warp& warp) {
    Knowledge& end = warp.cta->launch->knowledge;
    for (const Knowledge& known : warp.knowledge->known) end.join(known);
    auto clock = std::make_shared<Clock>(*end.seen);
    clock->raise_warp(warp.slot, slots_[warp.slot].time);
    for (const i32 slot : {warp.bulk_read_slot, warp.bulk_write_slot})
        if (slot >= 0) clock->raise_warp(u32(slot), slots_[size_t(slot)].time);
    end.seen = clock;
    tick(warp);
    warp.knowledge.reset();
}

Agent Races::agent_of(const Warp& warp, int lane) const {
    return {warp.slot,
            u32(lane),
            slots_[warp.slot].time,
            &warp.knowledge->known[size_t(lane)],
            warp.cta->id,
            warp.cta->launch->device,
            false};
}

void Races::complain(const char* kind,
                     const Access& old,
                     const Access& now,
                     const Agent& agent,
                     const Region& region,
                     u64 cell) {
    const Slot& other = slots_[old.slot];
    const std::string pair = std::to_string(std::min(old.site, now.site)) + "/" +
                             std::to_string(std::max(old.site, now.site));
    std::ostringstream text;
    text << (now.is_write ? "write" : "read") << (now.is_async ? " of the async proxy" : "")
         << " by " << name_of(agent.device) << " (" << machine_.describe(now.site) << ") and "
         << (old.is_write ? "write" : "read") << (old.is_async ? " of the async proxy" : "")
         << " by " << name_of(other.device) << " (" << machine_.describe(old.site) << ") at byte "
         << cell * 4 << " of '" << region.name << "' ";
    if (std::string(kind) == "proxy")
        text << "have no fence.proxy.async between them";
    else
        text << "are not ordered";
    if (old.slot == now.slot)
        text << "; lanes " << __builtin_ctz(old.lanes) << " and " << agent.lane << " of one warp";
    machine_.report(kind, std::string(kind) + pair, text.str());
}

bool Races::conflicts(
    const Access& old, const Access& now, const Agent& agent, Region& region, u64 cell) {
    if (!old.lanes || !(old.bytes & now.bytes) || !(old.is_write || now.is_write)) return false;
    const u32 others = old.slot == now.slot ? old.lanes & ~now.lanes : old.lanes;
    if (!others) return false;
    if (agent.knowledge->seen->covers(old.slot, others, old.time)) {
        // Between the proxies, an order needs a proxy fence as well, unless the older one only
        // read.
        if (!now.is_async || old.is_async || !old.is_write) return false;
        if (agent.knowledge->proxied &&
            agent.knowledge->proxied->covers(old.slot, others, old.time))
            return false;
        complain("proxy", old, now, agent, region, cell);
        return true;
    }
    if (old.strength && now.strength) {
        const Slot& other = slots_[old.slot];
        if (includes(Scope(old.strength - 1), other.cta, other.device, agent.cta, agent.device) &&
            includes(Scope(now.strength - 1), agent.cta, agent.device, other.cta, other.device))
            return false;
    }
    complain("race", old, now, agent, region, cell);
    return true;
}

void Races::remember(Cell& cell, const Access& access) {
    if (cell.more < 0) {
        cell.more = i32(more_.size());
        more_.emplace_back();
    }
    auto& list = more_[size_t(cell.more)];
    for (Access& old : list)
        if (old.slot == access.slot && old.lanes == access.lanes && old.bytes == access.bytes &&
            old.is_write == access.is_write) {
            old = access;
            return;
        }
    if (list.size() >= kMostRemembered) list.erase(list.begin());
    list.push_back(access);
}

void Races::record_read(Cell& cell, const Access& now, const Agent& agent) {
    Access& last = cell.read;
    if (is_same_step(last, now)) {
        last.lanes |= now.lanes;
        return;
    }
    const u32 others = last.slot == now.slot ? last.lanes & ~now.lanes : last.lanes;
    const bool replaces =
        !last.lanes || ((last.bytes & ~now.bytes) == 0 &&
                        (!others || agent.knowledge->seen->covers(last.slot, others, last.time)));
    if (!replaces) remember(cell, last);
    last = now;
}

void Races::record_write(Cell& cell, const Access& now) {
    Access& last = cell.write;
    if (is_same_step(last, now)) {
        last.lanes |= now.lanes;
    } else {
        if (last.lanes && (last.bytes & ~now.bytes)) remember(cell, last);
        last = now;
    }
    // Earlier accesses have been compared with this one; whoever comes later is compared with it.
    if ((cell.read.bytes & ~now.bytes) == 0) cell.read = {};
    if (cell.more >= 0)
        std::erase_if(more_[size_t(cell.more)],
                      [&](const Access& old) { return (old.bytes & ~now.bytes) == 0; });
}

void Races::access(const Agent& agent,
                   Region& region,
                   u64 offset,
                   u32 count,
                   bool is_write,
                   Order order,
                   Scope scope,
                   i32 site) {
    Access now{agent.slot,
               1u << agent.lane,
               agent.time,
               site,
               u8(order == Order::kWeak ? 0 : 1 + int(scope)),
               0,
               is_write,
               agent.is_async};
    Cell checked;  // a cell's past that has been compared with this access; empty ones need not be
    for (u64 index = offset / 4; index * 4 < offset + count; ++index) {
        const u64 begin = std::max(offset, index * 4),
                  end = std::min(offset + count, index * 4 + 4);
        const u8 bytes = u8(((1u << (end - begin)) - 1) << (begin - index * 4));
        if (bytes != now.bytes) checked = {};
        now.bytes = bytes;
        Cell& cell = region.cell(index);
        // Neighbouring cells mostly have the same past, which need be looked at once.
        if (!is_equal(cell.write, checked.write)) {
            conflicts(cell.write, now, agent, region, index);
            checked.write = cell.write;
        }
        if (is_write && !is_equal(cell.read, checked.read)) {
            conflicts(cell.read, now, agent, region, index);
            checked.read = cell.read;
        }
        if (cell.more >= 0)
            for (const Access& old : more_[size_t(cell.more)])
                conflicts(old, now, agent, region, index);
        if (is_write)
            record_write(cell, now);
        else
            record_read(cell, now, agent);
    }
}

Knowledge Races::publish(const Warp& warp, int lane) const {
    Knowledge known = warp.knowledge->known[size_t(lane)];
    auto clock = std::make_shared<Clock>(*known.seen);
    clock->raise_lane(warp.slot, u32(lane), slots_[warp.slot].time);
    known.seen = clock;
    return known;
}

Knowledge Races::publish(const Warp& warp, u32 lanes) const {
    Knowledge all;
    for_lanes(lanes, [&](int lane) { all.join(warp.knowledge->known[size_t(lane)]); });
    auto clock = std::make_shared<Clock>(*all.seen);
    const u32 time = slots_[warp.slot].time;
    if (lanes == warp.initial)
        clock->raise_warp(warp.slot, time);
    else
        for_lanes(lanes, [&](int lane) { clock->raise_lane(warp.slot, u32(lane), time); });
    all.seen = clock;
    return all;
}

void Races::arrive(Step& step, Knowledge& into) {
    into.join(publish(step.warp, step.active));
    tick(step.warp);
}

void Races::acquire(Step& step, const Knowledge& from) {
    for_lanes(step.active, [&](int lane) { acquire(step.warp, lane, from); });
}

void Races::sync_warp(Step& step) {
    const Knowledge together = publish(step.warp, step.active);
    for_lanes(step.active, [&](int lane) { step.warp.knowledge->known[size_t(lane)] = together; });
    tick(step.warp);
}

void Races::read_from(Warp& warp, int lane, Region& region, u64 offset, Order order, Scope scope) {
    const auto found = region.messages.find(offset);
    if (found == region.messages.end()) return;
    const u32 cta = warp.cta->id;
    const int device = warp.cta->launch->device;
    for (const Message& message : found->second) {
        if (!includes(message.scope, message.cta, message.device, cta, device)) continue;
        if (!includes(scope, cta, device, message.cta, message.device)) continue;
        if (order == Order::kAcquire || order == Order::kAcquireRelease) {
            acquire(warp, lane, message.knowledge);
        } else {
            const Scope needed = message.device != device ? Scope::kSys
                                 : message.cta != cta     ? Scope::kGpu
                                                          : Scope::kCta;
            warp.knowledge->pending[size_t(lane)][size_t(needed)].join(message.knowledge);
        }
    }
}

void Races::written_to(
    Warp& warp, int lane, Region& region, u64 offset, Order order, Scope scope, bool is_atomic) {
    // A plain store ends what could be acquired here; a read-modify-write hands it on.
    if (order == Order::kWeak) {
        region.messages.erase(offset);
        return;
    }
    std::vector<Message>& messages = region.messages[offset];
    if (!is_atomic) messages.clear();
    const auto add = [&](const Knowledge& knowledge, Scope reach) {
        for (Message& message : messages)
            if (message.scope == reach && message.cta == warp.cta->id) {
                message.knowledge.join(knowledge);
                return;
            }
        messages.push_back({knowledge, reach, warp.cta->id, warp.cta->launch->device});
    };
    if (order == Order::kRelease || order == Order::kAcquireRelease)
        add(publish(warp, lane), scope);
    for (int reach = 0; reach < 3; ++reach)
        if (const Knowledge& ready = warp.knowledge->released[size_t(lane)][size_t(reach)])
            add(ready, std::min(Scope(reach), scope));
    if (messages.empty()) region.messages.erase(offset);
}

void Races::fence(Step& step, Scope scope) {
    for_lanes(step.active, [&](int lane) {
        WarpKnowledge& knowledge = *step.warp.knowledge;
        for (int reach = 0; reach <= int(scope); ++reach) {
            Knowledge& pending = knowledge.pending[size_t(lane)][size_t(reach)];
            if (pending) acquire(step.warp, lane, pending);
            pending = {};
        }
        knowledge.released[size_t(lane)][size_t(scope)] = publish(step.warp, lane);
    });
    tick(step.warp);
}

void Races::proxy_fence(Step& step) {
    for_lanes(step.active, [&](int lane) {
        Knowledge& known = step.warp.knowledge->known[size_t(lane)];
        known.proxied = join(known.proxied, publish(step.warp, lane).seen);
    });
    tick(step.warp);
}

void Races::issue(Warp& warp, int lane, AsyncAgents& agents) {
    const Launch& launch = *warp.cta->launch;
    if (warp.bulk_read_slot < 0) {
        // Next to the warp's own slot in the numbering of start_warp.
        for (const auto& [key, slot] : std::map(slot_numbers_)) {
            if (slot != warp.slot) continue;
            warp.bulk_read_slot = i32(slot_of(launch, std::get<2>(key) + 1));
            warp.bulk_write_slot = i32(slot_of(launch, std::get<2>(key) + 2));
        }
        slots_[size_t(warp.bulk_read_slot)].cta = slots_[size_t(warp.bulk_write_slot)].cta =
            warp.cta->id;
    }
    // Copies share 32 names per warp, so a name comes back after 32 copies.
    const u32 name = warp.bulk_issued++ % kLanes;
    agents.issued = publish(warp, lane);
    const auto make = [&](i32 slot) {
        return Agent{u32(slot),     name, ++slots_[size_t(slot)].time, nullptr, warp.cta->id,
                     launch.device, true};
    };
    agents.reader = make(warp.bulk_read_slot);
    agents.writer = make(warp.bulk_write_slot);
    tick(warp);
}

Knowledge Races::completion(const Agent& agent, const Knowledge& issued) const {
    Knowledge known = issued;
    auto clock = std::make_shared<Clock>(*issued.seen);
    clock->raise_lane(agent.slot, agent.lane, agent.time);
    known.seen = clock;
    return known;
}

void Races::host_access(int rank, Region& region, u64 offset, u32 count, bool is_write) {
    // A host waits for words with acquire loads and writes them with release stores.
    const bool is_word = count <= 8;
    Knowledge& known = host(rank);
    if (is_word && !is_write)
        if (const auto found = region.messages.find(offset); found != region.messages.end())
            for (const Message& message : found->second)
                if (message.scope == Scope::kSys) known.join(message.knowledge);
    auto clock = std::make_shared<Clock>(*known.seen);
    clock->raise_warp(u32(rank), slots_[size_t(rank)].time);
    const Agent agent{u32(rank), 0, slots_[size_t(rank)].time, &known, ~0u, host_of(rank), false};
    access(agent, region, offset, count, is_write, is_word ? Order::kRelaxed : Order::kWeak,
           Scope::kSys, -1);
    known.seen = clock;
    if (is_word && is_write) region.messages[offset] = {{known, Scope::kSys, ~0u, host_of(rank)}};
    ++slots_[size_t(rank)].time;
}

void Races::meet() {
    Knowledge all;
    for (const Knowledge& known : hosts_) all.join(known);
    for (Knowledge& known : hosts_) known = all;
}

}  // namespace ptx
