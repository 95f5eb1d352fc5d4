#pragma once
// A small generator (splitmix64): the same seed gives the same run everywhere.
#include "ptx.h"

namespace ptx {

class Random {
 public:
    explicit Random(u64 seed) : state_(seed * 0x9e3779b97f4a7c15 + 0x1234567) {}
    u64 next() {
        u64 z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    u64 below(u64 limit) { return (next() >> 32) * limit >> 32; }
    bool one_in(u64 n) { return below(n) == 0; }

 private:
    u64 state_;
};

}  // namespace ptx
