// Loads, stores, atomics and fences.
#include <cstring>
#include <sstream>

#include "handlers.h"
#include "numbers.h"
#include "races.h"
#include "resolve.h"
#include "store_buffers.h"

namespace ptx {

void Resolver::misaligned(int lane, u64 address) const {
    std::ostringstream text;
    text << "expected an address that is a multiple of " << num_bytes_ << ", got 0x" << std::hex
         << address;
    step_.machine.fault(step_.warp, lane, instruction_, text.str());
}

void Resolver::out_of_bounds(int lane, u64 address) const {
    const Region* shared = step_.cta.shared.get();
    if (region == shared && shared)
        step_.machine.fault(step_.warp, lane, instruction_,
                            "out of bounds: " + std::to_string(num_bytes_) + " bytes at " +
                                std::to_string(address) + " of " +
                                std::to_string(shared->num_bytes) + " bytes of shared memory");
    step_.machine.fault(step_.warp, lane, instruction_,
                        "out of bounds: " + step_.machine.memory().explain(address, num_bytes_));
}

void Resolver::not_mapped(int lane) const {
    step_.machine.fault(step_.warp, lane, instruction_,
                        "expected memory that rank " + std::to_string(step_.cta.launch->rank) +
                            " can reach, got private memory '" + region->name + "' of rank " +
                            std::to_string(region->rank));
}

namespace {

void check_written(Step& step,
                   const Instruction& instruction,
                   int lane,
                   const Region& region,
                   u64 offset,
                   u32 count) {
    const u8* written = region.written.get() + offset;
    if (std::memchr(written, 0, count) == nullptr) return;
    step.machine.report("uninitialised", std::to_string(instruction.site),
                        "read of '" + region.name + "' at byte " + std::to_string(offset) +
                            ", which nobody has written, by " +
                            step.machine.where(step.warp, lane, instruction));
}

u64 get(const u8* bytes, int count) {
    u64 value = 0;
    switch (count) {
        case 1:
            return *bytes;
        case 2:
            std::memcpy(&value, bytes, 2);
            return value;
        case 4:
            std::memcpy(&value, bytes, 4);
            return value;
        default:
            std::memcpy(&value, bytes, 8);
            return value;
    }
}
void put(u8* bytes, u64 value, int count) {
    switch (count) {
        case 1:
            *bytes = u8(value);
            break;
        case 2:
            std::memcpy(bytes, &value, 2);
            break;
        case 4:
            std::memcpy(bytes, &value, 4);
            break;
        default:
            std::memcpy(bytes, &value, 8);
            break;
    }
}

u8* local_memory(Step& step, const Instruction& instruction, int lane, u64 offset, u32 count) {
    const u64 size = step.cta.launch->kernel->local_bytes;
    if (offset > size || count > size - offset)
        step.machine.fault(step.warp, lane, instruction,
                           "out of bounds: byte " + std::to_string(offset) + " of " +
                               std::to_string(size) + " bytes of local memory");
    return step.warp.local.data() + size_t(lane) * size + offset;
}

const u8* parameter_memory(
    Step& step, const Instruction& instruction, int lane, u64 offset, u32 count) {
    const auto& parameters = step.cta.launch->parameters;
    if (offset > parameters.size() || count > parameters.size() - offset)
        step.machine.fault(step.warp, lane, instruction,
                           "out of bounds: byte " + std::to_string(offset) + " of " +
                               std::to_string(parameters.size()) + " bytes of parameters");
    return parameters.data() + offset;
}

void put_elements(Step& step, const Instruction& instruction, int lane, const u8* bytes) {
    const int size = instruction.element_bytes;
    for (int element = 0; element < instruction.num_elements; ++element) {
        u64 value = get(bytes + element * size, size);
        if (instruction.is_signed)
            value = keep_bits(sign_extend(value, size * 8), int(instruction.immediate));
        step.destination(instruction, element)[lane] = value;
    }
}

}  // namespace

Outcome load(Step& step, const Instruction& instruction) {
    const u32 count = u32(instruction.element_bytes) * instruction.num_elements;
    const u64* address = step.source(instruction, 0);
    Resolver at(step, instruction, count);
    Races* races = step.machine.races();
    StoreBuffers* buffers = step.machine.store_buffers();
    u64 own = 0, peer = 0, shared = 0, local = 0;
    for_lanes(step.active, [&](int lane) {
        const auto kind = at.resolve(lane, address[lane] + u64(instruction.offset));
        if (kind != Resolver::Kind::kRegion) {
            const u8* bytes = kind == Resolver::Kind::kLocal
                                  ? local_memory(step, instruction, lane, at.offset, count)
                                  : parameter_memory(step, instruction, lane, at.offset, count);
            put_elements(step, instruction, lane, bytes);
            local += kind == Resolver::Kind::kLocal ? count : 0;
            return;
        }
        Region& region = *at.region;
        (region.is_shared ? shared : at.is_peer() ? peer : own) += count;
        check_written(step, instruction, lane, region, at.offset, count);
        if (races) {
            if (instruction.order != Order::kWeak)
                races->read_from(step.warp, lane, region, at.offset, instruction.order,
                                 instruction.scope);
            races->access(races->agent_of(step.warp, lane), region, at.offset, count, false,
                          instruction.order, instruction.scope, instruction.site);
        }
        if (buffers) {
            std::array<u8, 32> bytes;
            std::memcpy(bytes.data(), region.data.get() + at.offset, count);
            buffers->overlay(step.warp, lane, region, at.offset, bytes.data(), count);
            put_elements(step, instruction, lane, bytes.data());
        } else {
            put_elements(step, instruction, lane, region.data.get() + at.offset);
        }
    });
    Counts& counts = *step.cta.launch->counts;
    counts.global_read += own, counts.peer_read += peer;
    counts.shared_read += shared, counts.local_read += local;
    return Outcome::kAdvance;
}

Outcome load_parameter(Step& step, const Instruction& instruction) {
    const u32 count = u32(instruction.element_bytes) * instruction.num_elements;
    const u64* address = step.source(instruction, 0);
    for_lanes(step.active, [&](int lane) {
        const u64 offset = address[lane] + u64(instruction.offset);
        if (offset % count != 0)
            step.machine.fault(step.warp, lane, instruction, "misaligned parameter");
        put_elements(step, instruction, lane,
                     parameter_memory(step, instruction, lane, offset, count));
    });
    return Outcome::kAdvance;
}

Outcome store(Step& step, const Instruction& instruction) {
    const int size = instruction.element_bytes;
    const u32 count = u32(size) * instruction.num_elements;
    const u64* address = step.source(instruction, 0);
    Resolver at(step, instruction, count);
    Races* races = step.machine.races();
    StoreBuffers* buffers = step.machine.store_buffers();
    u64 own = 0, peer = 0, shared = 0, local = 0;
    bool changed = false;
    for_lanes(step.active, [&](int lane) {
        std::array<u8, 32> bytes;
        for (int element = 0; element < instruction.num_elements; ++element)
            put(bytes.data() + element * size, step.source(instruction, 1 + element)[lane], size);
        const auto kind = at.resolve(lane, address[lane] + u64(instruction.offset));
        if (kind == Resolver::Kind::kLocal) {
            std::memcpy(local_memory(step, instruction, lane, at.offset, count), bytes.data(),
                        count);
            local += count;
            return;
        }
        if (kind == Resolver::Kind::kParameter)
            step.machine.fault(step.warp, lane, instruction, "store to a parameter");
        Region& region = *at.region;
        (region.is_shared ? shared : at.is_peer() ? peer : own) += count;
        std::memset(region.written.get() + at.offset, 1, count);
        if (races) {
            races->access(races->agent_of(step.warp, lane), region, at.offset, count, true,
                          instruction.order, instruction.scope, instruction.site);
            if (instruction.order != Order::kWeak || !region.messages.empty())
                races->written_to(step.warp, lane, region, at.offset, instruction.order,
                                  instruction.scope, false);
        }
        u8* place = region.data.get() + at.offset;
        changed = changed || std::memcmp(place, bytes.data(), count) != 0;
        if (buffers)
            buffers->store(step.warp, lane, region, at.offset, bytes.data(), count,
                           instruction.order, instruction.scope);
        else
            std::memcpy(place, bytes.data(), count);
    });
    if (races && instruction.order == Order::kRelease) races->tick(step.warp);
    Counts& counts = *step.cta.launch->counts;
    counts.global_written += own, counts.peer_written += peer;
    counts.shared_written += shared, counts.local_written += local;
    if (changed) step.machine.made_progress();
    return Outcome::kAdvance;
}

namespace {

template <class Format>
u32 add_pairs(u32 a, u32 b) {
    const auto add = [](u32 x, u32 y) {
        return Format::narrow(add_to_odd(Format::widen(x), Format::widen(y)), false);
    };
    return add(a >> 16, b >> 16) << 16 | add(a & 0xffff, b & 0xffff);
}

u64 combine(u8 operation, u64 old, u64 value, u64 other, int bits) {
    const auto is = [&](u64 x) { return i64(sign_extend(x, bits)); };
    switch (operation) {
        case kExchange:
            return value;
        case kCompareSwap:
            return old == keep_bits(value, bits) ? other : old;
        case kAtomicAdd:
            return old + value;
        case kAtomicAddFloat:
            return to_bits(from_bits<float>(old) + from_bits<float>(value));
        case kAtomicAddDouble:
            return to_bits(from_bits<double>(old) + from_bits<double>(value));
        case kAtomicAddHalves:
            return add_pairs<Half>(u32(old), u32(value));
        case kAtomicAddBrains:
            return add_pairs<Brain>(u32(old), u32(value));
        case kAtomicMinSigned:
            return is(old) < is(value) ? old : value;
        case kAtomicMaxSigned:
            return is(old) > is(value) ? old : value;
        case kAtomicMinUnsigned:
            return std::min(old, keep_bits(value, bits));
        case kAtomicMaxUnsigned:
            return std::max(old, keep_bits(value, bits));
        case kAtomicAnd:
            return old & value;
        case kAtomicOr:
            return old | value;
        case kAtomicXor:
            return old ^ value;
        case kIncrement:
            return old >= keep_bits(value, bits) ? 0 : old + 1;
        default:
            return old == 0 || old > keep_bits(value, bits) ? value : old - 1;
    }
}

}  // namespace

Outcome atomic(Step& step, const Instruction& instruction) {
    const int size = instruction.element_bytes;
    const u64* address = step.source(instruction, 0);
    const u64* value = step.source(instruction, 1);
    const u64* other = instruction.num_sources > 2 ? step.source(instruction, 2) : value;
    u64* d = step.destination(instruction, 0);
    Resolver at(step, instruction, u32(size));
    Races* races = step.machine.races();
    StoreBuffers* buffers = step.machine.store_buffers();
    const bool releases =
        instruction.order == Order::kRelease || instruction.order == Order::kAcquireRelease;
    bool changed = false;
    for_lanes(step.active, [&](int lane) {
        if (at.resolve(lane, address[lane] + u64(instruction.offset)) != Resolver::Kind::kRegion)
            step.machine.fault(step.warp, lane, instruction, "atomic on local memory");
        Region& region = *at.region;
        check_written(step, instruction, lane, region, at.offset, u32(size));
        if (races) {
            races->read_from(step.warp, lane, region, at.offset, instruction.order,
                             instruction.scope);
            races->access(races->agent_of(step.warp, lane), region, at.offset, u32(size), true,
                          instruction.order, instruction.scope, instruction.site);
            races->written_to(step.warp, lane, region, at.offset, instruction.order,
                              instruction.scope, true);
        }
        if (buffers) {  // performed in memory
            if (releases) buffers->release(step.warp, 1u << lane, instruction.scope);
            buffers->flush(region, at.offset, u64(size));
        }
        u8* place = region.data.get() + at.offset;
        const u64 old = get(place, size);
        const u64 result = combine(instruction.variant, old, value[lane], other[lane], size * 8);
        put(place, result, size);
        changed |= keep_bits(result, size * 8) != old;
        d[lane] = old;
    });
    if (races && releases) races->tick(step.warp);
    step.cta.launch->counts->atomics += u64(std::popcount(step.active));
    if (changed) step.machine.made_progress();
    return Outcome::kAdvance;
}

Outcome fence(Step& step, const Instruction& instruction) {
    if (step.machine.races()) step.machine.races()->fence(step, instruction.scope);
    if (step.machine.store_buffers())
        step.machine.store_buffers()->release(step.warp, step.active, instruction.scope);
    return Outcome::kAdvance;
}

Outcome proxy_fence(Step& step, const Instruction&) {
    if (step.machine.races()) step.machine.races()->proxy_fence(step);
    // The async proxy reads memory, not store buffers.
    if (step.machine.store_buffers())
        step.machine.store_buffers()->release(step.warp, step.active, Scope::kSys);
    return Outcome::kAdvance;
}

}  // namespace ptx
