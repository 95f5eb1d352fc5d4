#pragma once
// Vector clocks: what an agent knows to have happened before its next step.
//
// Agents are threads, named slot * 32 + lane. Most knowledge is about whole warps ("everything all
// lanes of this warp did up to then"), so a clock holds one time per warp slot and a short list of
// lanes that are known further than their warp. Clocks never change once shared, so a warp whose
// lanes know the same shares one.
#include <algorithm>
#include <memory>
#include <vector>

#include "ptx.h"

namespace ptx {

class Clock {
 public:
    u32 get(u32 slot, u32 lane) const {
        const u32 whole = slot < warps_.size() ? warps_[slot] : 0;
        if (lanes_.empty()) return whole;
        const u32 agent = slot * kLanes + lane;
        const auto place = find(agent);
        return place != lanes_.end() && place->agent == agent ? std::max(whole, place->time)
                                                              : whole;
    }
    /// Whether every one of `lanes` of the slot is known up to `time`.
    bool covers(u32 slot, u32 lanes, u32 time) const {
        if (slot < warps_.size() && warps_[slot] >= time) return true;
        if (lanes_.empty()) return false;
        for (; lanes; lanes &= lanes - 1)
            if (get(slot, u32(__builtin_ctz(lanes))) < time) return false;
        return true;
    }
    void raise_warp(u32 slot, u32 time) {
        if (slot >= warps_.size()) warps_.resize(slot + 1, 0);
        warps_[slot] = std::max(warps_[slot], time);
        std::erase_if(lanes_, [&](const Entry& e) {
            return e.agent / kLanes == slot && e.time <= warps_[slot];
        });
    }
    void raise_lane(u32 slot, u32 lane, u32 time) {
        if (slot < warps_.size() && warps_[slot] >= time) return;
        const u32 agent = slot * kLanes + lane;
        auto place = lanes_.begin() + (find(agent) - lanes_.cbegin());
        if (place != lanes_.end() && place->agent == agent)
            place->time = std::max(place->time, time);
        else
            lanes_.insert(place, {agent, time});
    }
    void join(const Clock& other) {
        if (warps_.size() < other.warps_.size()) warps_.resize(other.warps_.size(), 0);
        for (size_t i = 0; i < other.warps_.size(); ++i)
            warps_[i] = std::max(warps_[i], other.warps_[i]);
        for (const Entry& e : other.lanes_) raise_lane(e.agent / kLanes, e.agent % kLanes, e.time);
        std::erase_if(lanes_, [&](const Entry& e) {
            return e.agent / kLanes < warps_.size() && warps_[e.agent / kLanes] >= e.time;
        });
    }
    bool contains(const Clock& other) const {
        for (size_t i = 0; i < other.warps_.size(); ++i)
            if ((i < warps_.size() ? warps_[i] : 0) < other.warps_[i]) return false;
        for (const Entry& e : other.lanes_)
            if (get(e.agent / kLanes, e.agent % kLanes) < e.time) return false;
        return true;
    }

 private:
    struct Entry {
        u32 agent, time;
    };
    std::vector<Entry>::const_iterator find(u32 agent) const {
        return std::lower_bound(lanes_.begin(), lanes_.end(), agent,
                                [](const Entry& e, u32 wanted) { return e.agent < wanted; });
    }
    std::vector<u32> warps_;    // by slot
    std::vector<Entry> lanes_;  // sorted by agent; only what goes beyond warps_
};

using ClockRef = std::shared_ptr<const Clock>;

inline ClockRef join(const ClockRef& a, const ClockRef& b) {
    if (!a || a == b) return b;
    if (!b || a->contains(*b)) return a;
    if (b->contains(*a)) return b;
    auto both = std::make_shared<Clock>(*a);
    both->join(*b);
    return both;
}

/// What happened before, and which part of it the async proxy is sure to see as well.
struct Knowledge {
    ClockRef seen;
    ClockRef proxied;
    void join(const Knowledge& other) {
        seen = ptx::join(seen, other.seen);
        proxied = ptx::join(proxied, other.proxied);
    }
    explicit operator bool() const { return seen != nullptr; }
};

}  // namespace ptx
