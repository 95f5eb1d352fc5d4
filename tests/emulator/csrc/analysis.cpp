// Basic blocks, liveness and register allocation of a parsed kernel.
//
// PTX has as many registers as the compiler likes; letting those that never live at once share a
// row keeps a warp's registers in the cache. The same analysis says which registers may be read
// before they are written on some path: only those need checks at run time.
#include <algorithm>
#include <queue>

#include "builder.h"
#include "handlers.h"

namespace ptx {
namespace {

class Bits {
 public:
    explicit Bits(size_t count) : words_((count + 63) / 64) {}
    bool get(size_t i) const { return words_[i / 64] >> (i % 64) & 1; }
    void set(size_t i) { words_[i / 64] |= u64{1} << (i % 64); }
    void clear(size_t i) { words_[i / 64] &= ~(u64{1} << (i % 64)); }
    bool add(const Bits& other) {  // true if anything is new
        bool grew = false;
        for (size_t i = 0; i < words_.size(); ++i) {
            grew |= (other.words_[i] & ~words_[i]) != 0;
            words_[i] |= other.words_[i];
        }
        return grew;
    }

 private:
    std::vector<u64> words_;
};

struct Block {
    u32 begin, end;
    std::vector<u32> successors;  // blocks
    Bits live_in, live_out;
};

template <class Function>
void for_reads(const Instruction& instruction, Function&& function) {
    for (int i = 0; i < instruction.num_sources; ++i)
        if (instruction.sources[i] >= 0) function(instruction.sources[i]);
    if (instruction.predicate >= 0) function(instruction.predicate);
}
template <class Function>
void for_writes(const Instruction& instruction, Function&& function) {
    for (int i = 0; i < instruction.num_destinations; ++i) function(instruction.destinations[i]);
}

bool ends_block(const Instruction& instruction) {
    return instruction.handler == branch || instruction.handler == branch_indexed ||
           instruction.handler == leave || instruction.handler == trap;
}

class Analysis {
 public:
    explicit Analysis(Kernel& kernel) : kernel_(kernel) {}

    void run() {
        if (kernel_.code.empty() || !ends_block(kernel_.code.back()) ||
            kernel_.code.back().predicate >= 0) {
            Instruction end;  // falling off the end is leaving
            end.handler = leave;
            end.splits = true;
            kernel_.code.push_back(end);
        }
        find_blocks();
        find_live();
        find_tracked();
        allocate_rows();
    }

 private:
    void find_blocks();
    void find_live();
    void find_tracked();
    void allocate_rows();
    void live_before(const Instruction& instruction, Bits& live) const {
        if (instruction.predicate < 0)
            for_writes(instruction, [&](i32 row) { live.clear(size_t(row)); });
        for_reads(instruction, [&](i32 row) { live.set(size_t(row)); });
    }

    Kernel& kernel_;
    std::vector<Block> blocks_;
    std::vector<bool> tracked_;
};

void Analysis::find_blocks() {
    const auto& code = kernel_.code;
    std::vector<bool> starts(code.size() + 1, false);
    starts[0] = true;
    for (size_t pc = 0; pc < code.size(); ++pc) {
        if (!ends_block(code[pc])) continue;
        starts[pc + 1] = true;
        if (code[pc].handler == branch) starts[size_t(code[pc].target)] = true;
    }
    for (const auto& table : kernel_.branch_tables)
        for (const i32 target : table) starts[size_t(target)] = true;
    std::vector<u32> block_of(code.size());
    for (u32 pc = 0; pc < code.size(); ++pc) {
        if (starts[pc]) {
            const size_t count = size_t(kernel_.num_virtual_registers);
            blocks_.push_back({pc, pc, {}, Bits(count), Bits(count)});
            kernel_.block_starts.push_back(pc);
        }
        block_of[pc] = u32(blocks_.size() - 1);
        blocks_.back().end = pc + 1;
    }
    for (Block& block : blocks_) {
        const Instruction& last = code[block.end - 1];
        const bool falls_through = !ends_block(last) || last.predicate >= 0;
        if (falls_through && block.end < code.size())
            block.successors.push_back(block_of[block.end]);
        if (last.handler == branch) block.successors.push_back(block_of[size_t(last.target)]);
        if (last.handler == branch_indexed)
            for (const i32 target : kernel_.branch_tables[last.immediate])
                block.successors.push_back(block_of[size_t(target)]);
    }
}

void Analysis::find_live() {
    for (bool grew = true; grew;) {
        grew = false;
        for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
            for (const u32 next : block->successors) block->live_out.add(blocks_[next].live_in);
            Bits live = block->live_out;
            for (u32 pc = block->end; pc-- > block->begin;) live_before(kernel_.code[pc], live);
            grew |= block->live_in.add(live);
        }
    }
}

void Analysis::find_tracked() {
    const size_t count = size_t(kernel_.num_virtual_registers);
    tracked_.assign(count, false);
    for (size_t row = 0; row < count; ++row) tracked_[row] = blocks_[0].live_in.get(row);
    for (const Preset& preset : kernel_.presets) tracked_[size_t(preset.row)] = false;
    for (bool grew = true; grew;) {  // copies may hand an undefined value on
        grew = false;
        for (const Instruction& instruction : kernel_.code) {
            if (!instruction.copies) continue;
            bool from_tracked = false;
            for_reads(instruction, [&](i32 row) { from_tracked |= tracked_[size_t(row)]; });
            if (!from_tracked || tracked_[size_t(instruction.destinations[0])]) continue;
            grew = tracked_[size_t(instruction.destinations[0])] = true;
        }
    }
}

void Analysis::allocate_rows() {
    struct Interval {
        i32 reg;
        i64 begin, end;
    };
    const size_t count = size_t(kernel_.num_virtual_registers);
    std::vector<Interval> intervals(count);
    for (size_t i = 0; i < count; ++i) intervals[i] = {i32(i), INT64_MAX, -1};
    const auto extend = [&](size_t reg, i64 at) {
        intervals[reg].begin = std::min(intervals[reg].begin, at);
        intervals[reg].end = std::max(intervals[reg].end, at);
    };
    for (const Block& block : blocks_) {
        for (size_t reg = 0; reg < count; ++reg) {
            if (block.live_in.get(reg)) extend(reg, block.begin);
            if (block.live_out.get(reg)) extend(reg, block.end - 1);
        }
        // Results and operands of one instruction overlap: handlers may write before they read all.
        for (u32 pc = block.begin; pc < block.end; ++pc) {
            for_reads(kernel_.code[pc], [&](i32 reg) { extend(size_t(reg), pc); });
            for_writes(kernel_.code[pc], [&](i32 reg) { extend(size_t(reg), pc); });
        }
    }
    for (const Preset& preset : kernel_.presets) extend(size_t(preset.row), -1);
    for (size_t reg = 0; reg < count; ++reg)
        if (tracked_[reg]) extend(reg, -1), extend(reg, i64(kernel_.code.size()));
    std::ranges::sort(intervals, {}, &Interval::begin);
    std::vector<i32> row_of(count, 0);
    std::priority_queue<std::pair<i64, i32>, std::vector<std::pair<i64, i32>>, std::greater<>> busy;
    std::vector<i32> free_rows;
    kernel_.num_rows = 0;
    for (const Interval& interval : intervals) {
        if (interval.end < interval.begin) continue;  // never used
        while (!busy.empty() && busy.top().first < interval.begin) {
            free_rows.push_back(busy.top().second);
            busy.pop();
        }
        i32 row = kernel_.num_rows;
        if (free_rows.empty())
            ++kernel_.num_rows;
        else
            row = free_rows.back(), free_rows.pop_back();
        row_of[size_t(interval.reg)] = row;
        busy.emplace(interval.end, row);
    }
    kernel_.tracked.assign(size_t(kernel_.num_rows), false);
    for (size_t reg = 0; reg < count; ++reg)
        if (tracked_[reg]) kernel_.tracked[size_t(row_of[reg])] = true;
    for (Preset& preset : kernel_.presets) preset.row = row_of[size_t(preset.row)];
    for (Instruction& instruction : kernel_.code) {
        for_reads(instruction,
                  [&](i32 reg) { instruction.checks_definedness |= tracked_[size_t(reg)]; });
        for_writes(instruction,
                   [&](i32 reg) { instruction.checks_definedness |= tracked_[size_t(reg)]; });
        for (int i = 0; i < instruction.num_sources; ++i)
            if (instruction.sources[i] >= 0)
                instruction.sources[i] = row_of[size_t(instruction.sources[i])];
        for (int i = 0; i < instruction.num_destinations; ++i)
            instruction.destinations[i] = row_of[size_t(instruction.destinations[i])];
        if (instruction.predicate >= 0)
            instruction.predicate = row_of[size_t(instruction.predicate)];
    }
}

}  // namespace

void analyse(Kernel& kernel) { Analysis(kernel).run(); }

}  // namespace ptx
