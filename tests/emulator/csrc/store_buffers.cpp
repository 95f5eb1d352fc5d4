#include "store_buffers.h"

#include <cstring>

namespace ptx {
namespace {

constexpr size_t kMostPending = 256;  // per CTA or rank; the oldest goes to memory beyond that

}  // namespace

void StoreBuffers::store(Warp& warp,
                         int lane,
                         Region& region,
                         u64 offset,
                         const u8* bytes,
                         u32 count,
                         Order order,
                         Scope scope) {
    const bool is_direct = order == Order::kRelease && (scope == Scope::kSys || region.is_shared);
    if (order == Order::kRelease) release(warp, 1u << lane, scope);
    if (is_direct) {
        flush(region, offset, count);
        std::memcpy(region.data.get() + offset, bytes, count);
        return;
    }
    List& list = by_cta_[warp.cta];
    if (list.size() >= kMostPending) commit(list, 0);
    Pending pending{&region, offset, count, warp.index, u8(lane), kLane, {}};
    std::memcpy(pending.bytes.data(), bytes, count);
    list.push_back(pending);
    ++filter(region, offset);
    ++num_pending_;
    if (order == Order::kRelease)
        release(warp, 1u << lane, scope);  // the flag itself, at its reach
}

void StoreBuffers::lay(const Pending& pending, u64 offset, u8* bytes, u32 count) {
    const u64 begin = std::max(offset, pending.offset);
    const u64 end = std::min(offset + count, pending.offset + pending.count);
    std::memcpy(bytes + (begin - offset), pending.bytes.data() + (begin - pending.offset),
                end - begin);
}

void StoreBuffers::overlay(
    const Warp& warp, int lane, const Region& region, u64 offset, u8* bytes, u32 count) const {
    if (!may_hold(region, offset)) return;
    if (const int device = warp.cta->launch->device; device >= 0)
        for (const Pending& pending : by_rank_[size_t(device)])
            if (pending.overlaps(region, offset, count)) lay(pending, offset, bytes, count);
    const auto found = by_cta_.find(warp.cta);
    if (found == by_cta_.end()) return;
    for (const Pending& pending : found->second) {
        if (!pending.overlaps(region, offset, count)) continue;
        const bool same_warp = pending.warp == warp.index;
        if (pending.level == kCta ||
            (same_warp && (pending.level == kWarp || pending.lane == lane)))
            lay(pending, offset, bytes, count);
    }
}

/// Older stores to the same bytes go first, so that one thread's stores to one place keep their
/// order.
void StoreBuffers::commit(List& list, size_t number) {
    const Pending pending = list[number];
    list.erase(list.begin() + i64(number));  // first, so that what follows cannot meet it again
    const auto overlaps = [&](const Pending& other) {
        return other.overlaps(*pending.region, pending.offset, pending.count);
    };
    const auto commit_first = [&](List& from, size_t end) {
        for (size_t i = 0; i < std::min(end, from.size());)
            if (overlaps(from[i])) {
                const size_t before = from.size();
                commit(from, i);
                end -= std::min(end, before - from.size());
                i = 0;
            } else {
                ++i;
            }
    };
    commit_first(list, number);
    for (List& rank : by_rank_)
        if (&rank != &list) commit_first(rank, rank.size());
    std::memcpy(pending.region->data.get() + pending.offset, pending.bytes.data(), pending.count);
    --filter(*pending.region, pending.offset);
    --num_pending_;
}

void StoreBuffers::move_to_rank(List& list, size_t number, int rank) {
    if (list[number].region->is_shared) return commit(list, number);
    by_rank_[size_t(rank)].push_back(list[number]);
    list.erase(list.begin() + i64(number));
    if (by_rank_[size_t(rank)].size() > kMostPending) commit(by_rank_[size_t(rank)], 0);
}

template <class Choose>
void StoreBuffers::commit_where(List& list, Choose choose) {
    for (size_t i = 0; i < list.size();)
        if (choose(list[i]))
            commit(list, i), i = 0;
        else
            ++i;
}

void StoreBuffers::release(const Warp& warp, u32 lanes, Scope scope) {
    const auto found = by_cta_.find(warp.cta);
    const int device = warp.cta->launch->device;
    if (device < 0 && scope == Scope::kGpu) scope = Scope::kSys;  // there is nobody in between
    const auto is_before = [&](const Pending& pending) {
        if (pending.level == kCta) return true;
        return pending.warp == warp.index &&
               (pending.level == kWarp || (lanes >> pending.lane & 1));
    };
    if (found != by_cta_.end()) {
        List& list = found->second;
        if (scope == Scope::kSys) {
            commit_where(list, is_before);
        } else {
            for (size_t i = 0; i < list.size();) {
                if (!is_before(list[i]))
                    ++i;
                else if (scope == Scope::kGpu)
                    move_to_rank(list, i, device);
                else
                    list[i++].level = kCta;
            }
        }
    }
    if (scope == Scope::kSys && device >= 0)
        commit_where(by_rank_[size_t(device)], [](const Pending&) { return true; });
}

void StoreBuffers::warp_barrier(const Warp& warp, u32 lanes) {
    if (const auto found = by_cta_.find(warp.cta); found != by_cta_.end())
        for (Pending& pending : found->second)
            if (pending.level == kLane && pending.warp == warp.index && (lanes >> pending.lane & 1))
                pending.level = kWarp;
}

void StoreBuffers::cta_barrier(const Warp& warp, u32 lanes) { release(warp, lanes, Scope::kCta); }

void StoreBuffers::flush(const Region& region, u64 offset, u64 count) {
    if (empty()) return;
    const auto overlaps = [&](const Pending& pending) {
        return pending.overlaps(region, offset, count);
    };
    for (List& list : by_rank_) commit_where(list, overlaps);
    for (auto& [cta, list] : by_cta_) commit_where(list, overlaps);
}

void StoreBuffers::flush_cta(const Cta& cta) {
    const auto found = by_cta_.find(&cta);
    if (found == by_cta_.end()) return;
    commit_where(found->second, [](const Pending&) { return true; });
    by_cta_.erase(found);
}

void StoreBuffers::flush_rank(int rank) {
    commit_where(by_rank_[size_t(rank)], [](const Pending&) { return true; });
}

void StoreBuffers::drain_one() {
    if (empty()) return;
    u64 number = machine_.random().below(num_pending_);
    const auto take_from = [&](List& list) {
        if (number < list.size()) {
            commit(list, number);
            return true;
        }
        number -= list.size();
        return false;
    };
    for (List& list : by_rank_)
        if (take_from(list)) return;
    for (auto& [cta, list] : by_cta_)
        if (take_from(list)) return;
}

}  // namespace ptx
