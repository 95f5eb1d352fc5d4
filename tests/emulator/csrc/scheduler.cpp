// Who runs next, and for how long: seeded, with all CTAs of all running kernels side by side.
#include <sstream>

#include "bulk.h"
#include "handlers.h"
#include "machine.h"
#include "races.h"
#include "store_buffers.h"

namespace ptx {

void Machine::start_ready_launches() {
    for (auto& [key, queue] : streams_)
        if (!queue.empty() && !queue.front()->started) start(*queue.front());
}

void Machine::start(Launch& launch) {
    launch.started = true;
    if (races_) races_->start_launch(launch, stream_knowledge_[{launch.rank, launch.stream}]);
    const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
    u64 number = 0;
    for (u32 z = 0; z < launch.grid[2]; ++z)
        for (u32 y = 0; y < launch.grid[1]; ++y)
            for (u32 x = 0; x < launch.grid[0]; ++x) {
                auto cta = std::make_unique<Cta>();
                cta->launch = &launch;
                cta->id = num_ctas_++;
                cta->index = {x, y, z};
                cta->shared = std::make_unique<Region>(
                    0, launch.kernel->shared_bytes + launch.dynamic_shared, launch.rank);
                cta->shared->is_shared = true;
                cta->shared->name = "shared memory";
                for (u32 index = 0; index * kLanes < threads; ++index) {
                    cta->warps.push_back(make_warp(launch, *cta, index));
                    if (races_) races_->start_warp(*cta->warps.back(), number++);
                    wake(*cta->warps.back());
                }
                cta->live_warps = u32(cta->warps.size());
                launch.ctas.push_back(std::move(cta));
            }
    launch.live_ctas = u32(launch.ctas.size());
    made_progress();
}

std::unique_ptr<Warp> Machine::make_warp(Launch& launch, Cta& cta, u32 index) {
    auto warp = std::make_unique<Warp>();
    const u32 threads = launch.block[0] * launch.block[1] * launch.block[2];
    const u32 lanes = std::min(u32(kLanes), threads - index * kLanes);
    warp->cta = &cta;
    warp->index = index;
    warp->initial = warp->live = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
    warp->registers.assign(size_t(launch.kernel->num_rows) * kLanes, 0xdead'beef'dead'beef);
    warp->defined.assign(size_t(launch.kernel->num_rows), 0);
    warp->groups.push_back({0, warp->live});
    warp->local.assign(size_t(launch.kernel->local_bytes) * kLanes, 0xcd);
    fill_presets(launch, cta, *warp);
    return warp;
}

void Machine::fill_presets(const Launch& launch, const Cta& cta, Warp& warp) {
    const auto& [bx, by, bz] = launch.block;
    for (const Preset& preset : launch.kernel->presets) {
        u64* row = warp.registers.data() + size_t(preset.row) * kLanes;
        const std::string& name = preset.name;
        for (u32 lane = 0; lane < u32(kLanes); ++lane) {
            const u32 thread = warp.index * kLanes + lane;
            const u32 position = name.back() == 'x' ? 0 : name.back() == 'y' ? 1 : 2;
            u64 value = 0;
            if (name.starts_with("%tid."))
                value = std::array{thread % bx, thread / bx % by, thread / bx / by}[position];
            else if (name.starts_with("%ntid."))
                value = launch.block[position];
            else if (name.starts_with("%ctaid."))
                value = cta.index[position];
            else if (name.starts_with("%nctaid."))
                value = launch.grid[position];
            else if (name == "%laneid")
                value = lane;
            else if (name == "%warpid")
                value = warp.index;
            else if (name == "%nwarpid")
                value = (bx * by * bz + kLanes - 1) / kLanes;
            else if (name == "%smid")
                value = cta.index[0];
            else if (name == "%nsmid")
                value = 132;
            else if (name == "%gridid")
                value = launch.number;
            else if (name == "%lanemask_eq")
                value = 1u << lane;
            else if (name == "%lanemask_lt")
                value = (1u << lane) - 1;
            else if (name == "%lanemask_le")
                value = u32((u64{2} << lane) - 1);
            else if (name == "%lanemask_gt")
                value = ~u32((u64{2} << lane) - 1);
            else if (name == "%lanemask_ge")
                value = ~((1u << lane) - 1);
            else if (name == "%dynamic_smem_size")
                value = launch.dynamic_shared;
            else if (name == "%total_smem_size")
                value = launch.kernel->shared_bytes + launch.dynamic_shared;
            else if (name == "%cluster_ctarank")
                value = 0;
            else if (name == "%cluster_nctarank")
                value = 1;
            else
                value = global_variable(launch.rank, name);
            row[lane] = value;
        }
    }
}

void Machine::wake(Warp& warp) {
    if (warp.is_runnable || warp.live == 0) return;
    warp.is_runnable = true;
    runnable_.push_back(&warp);
}

Machine::Progress Machine::run_slice(u64 max_instructions) {
    const u64 limit = steps_ + max_instructions;
    if (noted_progress_ != last_progress_)
        noted_progress_ = last_progress_, noted_at_ = std::chrono::steady_clock::now();
    start_ready_launches();
    while (steps_ < limit && num_hosts_calling_ == 0) {
        if (!bulk_copies_->empty() && (runnable_.empty() || random_.one_in(6)))
            bulk_copies_->step();
        if (store_buffers_ && !store_buffers_->empty() && random_.one_in(drain_interval_)) {
            store_buffers_->drain_one();
            made_progress();
        }
        if (runnable_.empty()) {
            if (!bulk_copies_->empty()) continue;
            return is_idle(-1, -1) ? Progress::kIdle : Progress::kStuck;
        }
        const size_t number = random_.below(runnable_.size());
        Warp& warp = *runnable_[number];
        // Short and long bursts: some bugs need one instruction between two others, some hundreds.
        run_burst(warp, u64{1} << random_.below(burst_kinds_));
        if (!warp.is_runnable) {
            runnable_[number] = runnable_.back();
            runnable_.pop_back();
            if (warp.live == 0) finish_warp(warp);
        }
        if (steps_ - last_progress_ > options_.patience) {
            if (last_time_read_ > last_progress_ && !is_host_late()) return Progress::kRan;
            if (!let_time_pass()) return Progress::kStuck;
        }
    }
    return Progress::kRan;
}

/// Let one warp execute up to `budget` instructions. Clears `is_runnable` when it cannot go on.
void Machine::run_burst(Warp& warp, u64 budget) {
    Launch& launch = *warp.cta->launch;
    const u64 begin = steps_;
    u64 lanes = 0;
    const Kernel& kernel = *launch.kernel;
    Step step{*this, warp, *warp.cta, warp.registers.data(), kernel.constants.data()};
    while (budget-- > 0) {
        const int chosen = choose_group(warp);
        if (chosen < 0) {
            warp.is_runnable = false;
            break;
        }
        Group& group = warp.groups[size_t(chosen)];
        const u32 pc = group.pc;
        const Instruction& instruction = kernel.code[pc];
        step.group = size_t(chosen);
        step.active = group.mask;
        if (instruction.predicate >= 0) {
            const u64* predicate = step.registers + size_t(instruction.predicate) * kLanes;
            u32 chosen_lanes = 0;
            if (instruction.checks_definedness)
                check_defined(warp, instruction, group.mask, kernel);
            for_lanes(group.mask, [&](int lane) {
                chosen_lanes |= u32((predicate[lane] != 0) != instruction.negated) << lane;
            });
            step.active = chosen_lanes;
        } else if (instruction.checks_definedness) {
            check_defined(warp, instruction, group.mask, kernel);
        }
        Outcome outcome = Outcome::kAdvance;
        if (step.active != 0) {
            if (instruction.splits && step.active != group.mask) {
                // The others go on; those that take part form a group of their own.
                warp.groups.push_back({pc, step.active});
                warp.groups[size_t(chosen)].mask &= ~step.active;
                warp.groups[size_t(chosen)].pc = pc + 1;
                step.group = warp.groups.size() - 1;
            }
            lanes += u64(std::popcount(step.active));
            outcome = instruction.handler(step, instruction);
            if (outcome != Outcome::kBlocked) {
                ++launch.kernel->executed[pc];
                if (instruction.checks_definedness)
                    mark_defined(warp, instruction, step.active, kernel);
            }
        }
        ++steps_;
        if (outcome != Outcome::kBlocked) ++launch.kernel->reached[pc];
        if (outcome == Outcome::kAdvance) warp.groups[step.group].pc = pc + 1;
        if (warp.groups.size() > 1) merge_groups(warp);
        if (warp.live == 0) {
            warp.is_runnable = false;
            break;
        }
    }
    launch.counts->warp_instructions += steps_ - begin;
    launch.counts->lane_instructions += lanes;
}

/// The group to execute next, or -1 when all wait.
int Machine::choose_group(Warp& warp) {
    const auto can_run = [&](const Group& group) {
        switch (group.wait) {
            case Wait::kNone:
                return true;
            case Wait::kLanes:
                return false;
            case Wait::kBarrier:
                return warp.cta->barriers[group.barrier].generation != group.generation;
            default:
                return true;  // kBulk: the instruction looks again
        }
    };
    if (warp.groups.size() == 1) {
        Group& group = warp.groups[0];
        if (!can_run(group)) return -1;
        if (group.wait == Wait::kBulk) return look_at_bulk(warp, 0);
        return 0;
    }
    // Mostly the group that is furthest behind, so that lanes meet again; sometimes any of them.
    int best = -1;
    const bool any = random_.one_in(8);
    const size_t offset = any ? random_.below(warp.groups.size()) : 0;
    for (size_t i = 0; i < warp.groups.size(); ++i) {
        const size_t index = (i + offset) % warp.groups.size();
        if (!can_run(warp.groups[index])) continue;
        if (warp.groups[index].wait == Wait::kBulk && look_at_bulk(warp, int(index)) < 0) continue;
        if (any) return int(index);
        if (best < 0 || warp.groups[index].pc < warp.groups[size_t(best)].pc) best = int(index);
    }
    return best;
}

int Machine::look_at_bulk(Warp& warp, int index) {
    Group& group = warp.groups[size_t(index)];
    const Instruction& instruction = warp.cta->launch->kernel->code[group.pc];
    Step step{*this, warp, *warp.cta, warp.registers.data(),
              warp.cta->launch->kernel->constants.data()};
    const u64 keep = step.source(instruction, 0)[std::countr_zero(group.mask)];
    if (!bulk_copies_->groups_are_done(warp, keep, instruction.variant != 0)) return -1;
    group.wait = Wait::kNone;
    return index;
}

/// Groups at the same instruction become one, unless they wait in a barrier.
void Machine::merge_groups(Warp& warp) {
    for (size_t i = 0; i < warp.groups.size(); ++i)
        for (size_t j = i + 1; j < warp.groups.size();) {
            Group &a = warp.groups[i], &b = warp.groups[j];
            if (a.pc != b.pc || a.wait == Wait::kBarrier || b.wait == Wait::kBarrier) {
                ++j;
                continue;
            }
            a.mask |= b.mask;
            a.wait = Wait::kNone;
            warp.groups.erase(warp.groups.begin() + i64(j));
        }
}

void Machine::check_defined(Warp& warp,
                            const Instruction& instruction,
                            u32 active,
                            const Kernel& kernel) {
    const auto require = [&](i32 row) {
        if (row < 0 || !kernel.tracked[size_t(row)]) return;
        if (const u32 undefined = active & ~warp.defined[size_t(row)])
            fault(warp, std::countr_zero(undefined), instruction,
                  "expected registers that have been written, one has not");
    };
    if (instruction.predicate >= 0) require(instruction.predicate);
    // Copies pass undefined values on; only what they select by or shuffle with must be defined.
    for (int i = 0; i < instruction.num_sources; ++i)
        if (!instruction.copies ||
            (instruction.num_sources > 1 && i > (instruction.handler == shuffle ? 0 : 1)))
            require(instruction.sources[size_t(i)]);
}

void Machine::mark_defined(Warp& warp,
                           const Instruction& instruction,
                           u32 active,
                           const Kernel& kernel) {
    const auto is_defined = [&](i32 row) {
        return row < 0 || !kernel.tracked[size_t(row)] ? kAllLanes : warp.defined[size_t(row)];
    };
    u32 result = kAllLanes;
    if (instruction.handler == shuffle) return;  // does it itself
    if (instruction.copies && instruction.num_sources == 1)
        result = is_defined(instruction.sources[0]);
    if (instruction.copies && instruction.num_sources == 3) {
        const i32 row = instruction.sources[2];
        const u64* condition = row >= 0 ? warp.registers.data() + size_t(row) * kLanes
                                        : kernel.constants[size_t(~row)].data();
        const u32 a = is_defined(instruction.sources[0]), b = is_defined(instruction.sources[1]);
        result = 0;
        for_lanes(active, [&](int lane) { result |= (condition[lane] ? a : b) & (1u << lane); });
    }
    for (int i = 0; i < instruction.num_destinations; ++i) {
        u32& defined = warp.defined[size_t(instruction.destinations[size_t(i)])];
        defined = (defined & ~active) | (result & active);
    }
}

void Machine::finish_warp(Warp& warp) {
    Cta& cta = *warp.cta;
    Launch& launch = *cta.launch;
    if (races_) races_->finish_warp(warp);
    warp.registers = {};
    warp.local = {};
    --cta.live_warps;
    for (u32 number = 0; number < cta.barriers.size(); ++number) check_barrier(cta, number);
    if (cta.live_warps > 0) return;
    // Nobody waits for what still reads or writes the CTA's shared memory; it happens all the same.
    while (bulk_copies_->use_shared_memory_of(cta)) bulk_copies_->step();
    if (store_buffers_) store_buffers_->flush_cta(cta);
    cta.shared.reset();
    --launch.live_ctas;
    copy_ended(launch);
}

void Machine::copy_ended(Launch& launch) {
    if (launch.live_ctas == 0 && !bulk_copies_->any_of(launch)) finish_launch(launch);
}

void Machine::finish_launch(Launch& launch) {
    if (store_buffers_ && launch.device >= 0) store_buffers_->flush_rank(launch.rank);
    if (races_) stream_knowledge_[{launch.rank, launch.stream}] = launch.knowledge;
    if (launch.kernel->local_bytes > 0 && launch.counts->local_written > 0)
        report("local", launch.kernel->name,
               "kernel " + launch.kernel->name + " writes its stack frame of " +
                   std::to_string(launch.kernel->local_bytes) + " bytes");
    Queue& queue = streams_[{launch.rank, launch.stream}];
    launch.ctas.clear();
    launch.parameters.clear();
    retired_.push_back(std::move(queue.front()));
    queue.pop_front();
    made_progress();
    start_ready_launches();
}

/// Whether nothing has moved for so long that a host which computes would have come by now. Waits
/// of kernels run on the machine's clock, but how long a host takes is the system's business.
bool Machine::is_host_late() {
    const std::chrono::duration<double> away = std::chrono::steady_clock::now() - noted_at_;
    return away.count() > options_.late_seconds;
}

/// Nothing moves. Perhaps only time must pass for somebody who watches the clock.
bool Machine::let_time_pass() {
    if (runnable_.empty() || last_time_read_ <= last_progress_ || num_time_jumps_ >= 20)
        return false;
    skipped_nanoseconds_ += u64{1'000'000'000} << num_time_jumps_++;
    // Everyone gets the time to look at the clock again.
    const u64 grace = std::min<u64>(options_.patience, 2000 * runnable_.size());
    last_progress_ = steps_ - (options_.patience - grace);
    return true;
}

std::string Machine::describe_waiting() const {
    std::map<std::string, u64> counts;  // who waits where -> how many lanes
    for (const auto& [key, queue] : streams_) {
        if (queue.empty() || !queue.front()->started) continue;
        const Launch& launch = *queue.front();
        for (const auto& cta : launch.ctas)
            for (const auto& warp : cta->warps)
                for (const Group& group : warp->groups) {
                    const Instruction& instruction = launch.kernel->code[group.pc];
                    std::ostringstream text;
                    text << "rank " << launch.rank << " block " << cta->index[0] << " warp "
                         << warp->index << " mask 0x" << std::hex << group.mask << std::dec
                         << " at " << launch.module->opcodes[size_t(instruction.opcode)] << " ("
                         << describe(instruction.site) << ")";
                    if (group.wait == Wait::kLanes) text << " for lanes that are elsewhere";
                    if (group.wait == Wait::kBarrier) {
                        const Barrier& barrier = cta->barriers[group.barrier];
                        text << " in barrier " << group.barrier << ", where " << barrier.arrived
                             << " threads of "
                             << (barrier.expected ? barrier.expected : cta->live_warps * kLanes)
                             << " are";
                    }
                    if (group.wait == Wait::kBulk) text << " for bulk copies";
                    counts[text.str()] += u64(std::popcount(group.mask));
                }
    }
    std::string all;
    size_t number = 0;
    for (const auto& [text, lanes] : counts) {
        if (++number > 40) return all + "; and " + std::to_string(counts.size() - 40) + " more";
        all += (all.empty() ? "" : "; ") + text;
    }
    return all;
}

}  // namespace ptx
