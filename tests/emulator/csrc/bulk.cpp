#include "bulk.h"

#include <cstring>

#include "handlers.h"
#include "resolve.h"
#include "store_buffers.h"
#include "transactions.h"

namespace ptx {

void BulkCopies::start(Copy copy) {
    copy.bytes.resize(copy.num_bytes);
    flying_.push_back(std::move(copy));
}

void BulkCopies::read_some(Copy& copy, u32 count) {
    const u64 offset = copy.from_offset + copy.num_read;
    if (Races* races = machine_.races()) {
        Agent agent = copy.agents.reader;
        agent.knowledge = &copy.agents.issued;
        races->access(agent, *copy.from, offset, count, false, Order::kWeak, Scope::kCta,
                      copy.instruction->site);
    }
    if (std::memchr(copy.from->written.get() + offset, 0, count))
        machine_.report("uninitialised", std::to_string(copy.instruction->site),
                        "bulk copy reads '" + copy.from->name + "' near byte " +
                            std::to_string(offset) + ", which nobody has written, by " +
                            machine_.where(*copy.warp, 0, *copy.instruction));
    std::memcpy(copy.bytes.data() + copy.num_read, copy.from->data.get() + offset, count);
    copy.num_read += count;
}

void BulkCopies::write_some(Copy& copy, u32 count) {
    const u64 offset = copy.to_offset + copy.num_written;
    if (Races* races = machine_.races()) {
        Agent agent = copy.agents.writer;
        agent.knowledge = &copy.agents.issued;
        races->access(agent, *copy.to, offset, count, true, Order::kWeak, Scope::kCta,
                      copy.instruction->site);
    }
    if (machine_.store_buffers()) machine_.store_buffers()->flush(*copy.to, offset, count);
    std::memcpy(copy.to->data.get() + offset, copy.bytes.data() + copy.num_written, count);
    std::memset(copy.to->written.get() + offset, 1, count);
    copy.num_written += count;
}

void BulkCopies::finish(Copy& copy) {
    Counts& counts = *copy.warp->cta->launch->counts;
    (copy.is_store ? counts.bulk_written : counts.bulk_read) += copy.num_bytes;
    machine_.made_progress();
    Knowledge done;
    if (Races* races = machine_.races()) {
        done = races->completion(copy.agents.reader, copy.agents.issued);
        done.join(races->completion(copy.agents.writer, copy.agents.issued));
    }
    if (!copy.is_store) {
        complete_bytes(machine_, *copy.warp, *copy.instruction, copy.barrier, copy.num_bytes, done);
    } else {
        if (machine_.races()) copy.warp->bulk_writes_done.emplace_back(copy.group, done);
        machine_.wake(*copy.warp);
        machine_.copy_ended(*copy.warp->cta->launch);
    }
}

void BulkCopies::step() {
    if (flying_.empty()) return;
    machine_.made_progress();
    const size_t number = machine_.random().below(flying_.size());
    Copy& copy = flying_[number];
    // Mostly in one go, sometimes in pieces of 16 bytes.
    u32 count = 16 + 16 * u32(machine_.random().below(8));
    if (machine_.random().one_in(2)) count = copy.num_bytes;
    if (copy.num_read < copy.num_bytes) {
        read_some(copy, std::min(count, copy.num_bytes - copy.num_read));
        if (copy.num_read < copy.num_bytes) return;
        if (copy.is_store) {  // the source may be written again from here on
            if (Races* races = machine_.races())
                copy.warp->bulk_reads_done.emplace_back(
                    copy.group, races->completion(copy.agents.reader, copy.agents.issued));
            machine_.wake(*copy.warp);
            return;
        }
    }
    write_some(copy, std::min(count, copy.num_bytes - copy.num_written));
    if (copy.num_written < copy.num_bytes) return;
    Copy finished = std::move(copy);
    flying_.erase(flying_.begin() + i64(number));
    finish(finished);
}

bool BulkCopies::groups_are_done(const Warp& warp, u64 keep, bool only_read) const {
    for (const Copy& copy : flying_)
        if (copy.warp == &warp && copy.is_store && copy.group + keep < warp.bulk_group &&
            (!only_read || copy.num_read < copy.num_bytes))
            return false;
    return true;
}

bool BulkCopies::use_shared_memory_of(const Cta& cta) const {
    return std::ranges::any_of(flying_, [&](const Copy& copy) {
        return copy.warp->cta == &cta && (!copy.is_store || copy.num_read < copy.num_bytes);
    });
}

bool BulkCopies::any_of(const Launch& launch) const {
    return std::ranges::any_of(flying_,
                               [&](const Copy& copy) { return copy.warp->cta->launch == &launch; });
}

namespace {

/// Check one end of a copy and return its region.
Region* find_end(Step& step,
                 const Instruction& instruction,
                 int lane,
                 u64 address,
                 u32 num_bytes,
                 bool is_shared,
                 u64& offset) {
    if (address % 16 != 0 || num_bytes % 16 != 0)
        step.machine.fault(step.warp, lane, instruction,
                           "expected addresses and a size that are multiples of 16, got " +
                               std::to_string(address) + " and " + std::to_string(num_bytes));
    if (is_shared) address = u32(address);
    Region* region = is_shared ? step.cta.shared.get() : step.machine.memory().find(address);
    if (!region || !region->contains(address, num_bytes))
        step.machine.fault(
            step.warp, lane, instruction,
            "out of bounds: " + (is_shared ? "shared memory at " + std::to_string(address)
                                           : step.machine.memory().explain(address, num_bytes)));
    if (region->rank != step.cta.launch->rank && !region->symmetric)
        step.machine.fault(
            step.warp, lane, instruction,
            "expected memory the rank can reach, got private memory '" + region->name + "'");
    offset = address - region->address;
    return region;
}

Outcome start_copies(Step& step, const Instruction& instruction, bool is_store) {
    const u64 *to = step.source(instruction, 0), *from = step.source(instruction, 1),
              *size = step.source(instruction, 2);
    for_lanes(step.active, [&](int lane) {
        BulkCopies::Copy copy{};
        copy.warp = &step.warp;
        copy.instruction = &instruction;
        copy.num_bytes = u32(size[lane]);
        copy.is_store = is_store;
        copy.from = find_end(step, instruction, lane, from[lane], copy.num_bytes, is_store,
                             copy.from_offset);
        copy.to =
            find_end(step, instruction, lane, to[lane], copy.num_bytes, !is_store, copy.to_offset);
        if (!is_store) copy.barrier = u32(step.source(instruction, 3)[lane]);
        copy.group = step.warp.bulk_group;
        Counts& counts = *step.cta.launch->counts;
        const Region& global = is_store ? *copy.to : *copy.from;
        const bool is_peer = global.rank != step.cta.launch->rank;
        if (is_store)
            (is_peer ? counts.peer_written : counts.global_written) += copy.num_bytes;
        else
            (is_peer ? counts.peer_read : counts.global_read) += copy.num_bytes;
        if (Races* races = step.machine.races()) races->issue(step.warp, lane, copy.agents);
        step.machine.bulk_copies().start(std::move(copy));
    });
    return Outcome::kAdvance;
}

}  // namespace

Outcome bulk_load(Step& step, const Instruction& instruction) {
    return start_copies(step, instruction, false);
}
Outcome bulk_store(Step& step, const Instruction& instruction) {
    return start_copies(step, instruction, true);
}

Outcome bulk_commit(Step& step, const Instruction&) {
    ++step.warp.bulk_group;
    return Outcome::kAdvance;
}

Outcome bulk_wait(Step& step, const Instruction& instruction) {
    const u64 keep = step.source(instruction, 0)[step.first_lane()];
    const bool only_read = instruction.variant != 0;
    Warp& warp = step.warp;
    if (!step.machine.bulk_copies().groups_are_done(warp, keep, only_read)) {
        warp.groups[step.group].wait = Wait::kBulk;
        return Outcome::kBlocked;
    }
    if (Races* races = step.machine.races()) {
        const auto learn = [&](std::vector<std::pair<u64, Knowledge>>& done) {
            std::erase_if(done, [&](const auto& entry) {
                if (entry.first + keep >= warp.bulk_group) return false;
                races->acquire(step, entry.second);
                return true;
            });
        };
        learn(warp.bulk_reads_done);
        if (!only_read) learn(warp.bulk_writes_done);
    }
    return Outcome::kAdvance;
}

}  // namespace ptx
