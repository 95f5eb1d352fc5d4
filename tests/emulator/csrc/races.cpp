#include "races.h"

#include <sstream>

namespace ptx {
namespace {

constexpr size_t kMostRemembered = 128;  // accesses per cell beyond the last read and write
constexpr u32 kWholeLine = 0xffff;

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
                     u64 line) {
    const Slot& other = slots_[old.slot];
    const std::string pair = std::to_string(std::min(old.site, now.site)) + "/" +
                             std::to_string(std::max(old.site, now.site));
    std::ostringstream text;
    text << (now.is_write ? "write" : "read") << (now.is_async ? " of the async proxy" : "")
         << " by " << name_of(agent.device) << " (" << machine_.describe(now.site) << ") and "
         << (old.is_write ? "write" : "read") << (old.is_async ? " of the async proxy" : "")
         << " by " << name_of(other.device) << " (" << machine_.describe(old.site) << ") at byte "
         << line * kLineBytes + u64(std::countr_zero(u32(old.bytes & now.bytes))) << " of '"
         << region.name << "' ";
    if (std::string(kind) == "proxy")
        text << "have no fence.proxy.async between them";
    else
        text << "are not ordered";
    if (old.slot == now.slot)
        text << "; lanes " << __builtin_ctz(old.lanes) << " and " << agent.lane << " of one warp";
    machine_.report(kind, std::string(kind) + pair, text.str());
}

/// Complain unless these are ordered, or strong enough for each other.
void Races::compare(
    const Access& old, const Access& now, const Agent& agent, const Region& region, u64 line) {
    if (!old.lanes || !(old.bytes & now.bytes) || !(old.is_write || now.is_write)) return;
    const u32 others = old.slot == now.slot ? old.lanes & ~now.lanes : old.lanes;
    if (!others) return;
    if (agent.knowledge->seen->covers(old.slot, others, old.time)) {
        // Between the proxies, an order needs a proxy fence as well, unless the older one only
        // read.
        if (!now.is_async || old.is_async || !old.is_write) return;
        if (agent.knowledge->proxied &&
            agent.knowledge->proxied->covers(old.slot, others, old.time))
            return;
        complain("proxy", old, now, agent, region, line);
        return;
    }
    if (old.strength && now.strength) {
        const Slot& other = slots_[old.slot];
        if (includes(Scope(old.strength - 1), other.cta, other.device, agent.cta, agent.device) &&
            includes(Scope(now.strength - 1), agent.cta, agent.device, other.cta, other.device))
            return;
    }
    complain("race", old, now, agent, region, line);
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

void Races::access_cell(
    Cell& cell, const Access& now, const Agent& agent, Region& region, u64 line) {
    compare(cell.write, now, agent, region, line);
    if (now.is_write) compare(cell.read, now, agent, region, line);
    if (cell.more >= 0)
        for (const Access& old : more_[size_t(cell.more)]) compare(old, now, agent, region, line);
    if (now.is_write)
        record_write(cell, now);
    else
        record_read(cell, now, agent);
}

/// From now on, remember every four bytes for themselves.
void Races::split(Line& line) {
    if (line.words < 0) {
        line.words = i32(words_.size());
        words_.emplace_back();
    }
    for (u32 word = 0; word < 4; ++word) {
        const auto part = [&](Access access) {
            access.bytes &= u16(0xf << 4 * word);
            return access.bytes ? access : Access{};
        };
        Cell& cell = words_[size_t(line.words)][word];
        cell.write = part(line.whole.write), cell.read = part(line.whole.read);
        if (line.whole.more >= 0)
            for (const Access& old : std::vector(more_[size_t(line.whole.more)]))
                if (part(old).lanes) remember(cell, part(old));
    }
    if (line.whole.more >= 0) more_[size_t(line.whole.more)].clear();
    line.is_split = true;
}

void Races::access(const Agent& agent,
                   Region& region,
                   u64 offset,
                   u32 count,
                   bool is_write,
                   Order order,
                   Scope scope,
                   i32 site) {
    Access now{agent.slot, 1u << agent.lane,
               agent.time, site,
               0,          u8(order == Order::kWeak ? 0 : 1 + int(scope)),
               is_write,   agent.is_async};
    for (u64 index = offset / kLineBytes; index * kLineBytes < offset + count; ++index) {
        const u64 start = index * kLineBytes;
        const u64 begin = std::max(offset, start),
                  end = std::min(offset + count, start + kLineBytes);
        const u32 bytes = ((1u << (end - begin)) - 1) << (begin - start);
        Line& line = region.line(index);
        if (bytes != kWholeLine && !line.is_split) split(line);
        now.bytes = u16(bytes);
        if (!line.is_split) {
            access_cell(line.whole, now, agent, region, index);
            continue;
        }
        std::array<Cell, 4>& words = words_[size_t(line.words)];
        for (u32 word = 0; word < 4; ++word) {
            now.bytes = u16(bytes & 0xf << 4 * word);
            if (now.bytes) access_cell(words[word], now, agent, region, index);
        }
        if (!is_write || bytes != kWholeLine) continue;
        // The words' past has been compared with this write; whoever comes later is compared with
        // it alone.
        now.bytes = kWholeLine;
        line.whole.write = now, line.whole.read = {};
        line.is_split = false;
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
