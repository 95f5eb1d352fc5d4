#include "memory.h"

#include <cstring>
#include <sstream>

namespace ptx {

namespace {

constexpr u64 kHuge = u64{1} << 30;

/// Zeros, for which the system finds memory when they are first written.
Bytes zeros(u64 count) {
    Bytes bytes(static_cast<u8*>(std::calloc(std::max<u64>(count, 1), 1)));
    if (!bytes) throw std::bad_alloc();
    return bytes;
}

}  // namespace

Region::Region(u64 address_, u64 num_bytes_, int rank_)
    : address(address_),
      num_bytes(num_bytes_),
      rank(rank_),
      data(zeros(num_bytes_)),
      written(zeros(num_bytes_)) {
    // So that unwritten memory is no plausible number; where it is huge, it stays sparse.
    if (num_bytes_ < kHuge) std::memset(data.get(), 0xcd, num_bytes_);
}

Region& Memory::allocate(int rank, u64 num_bytes, bool symmetric, std::string name) {
    const u64 address = kBase + (u64(pages_.size()) << kPageBits);
    const u64 num_pages = (num_bytes + (u64{1} << kPageBits) - 1) >> kPageBits;
    pages_.insert(pages_.end(), num_pages, i32(regions_.size()));
    pages_.push_back(-1);
    regions_.push_back(std::make_unique<Region>(address, num_bytes, rank));
    Region& region = *regions_.back();
    region.symmetric = symmetric;
    region.name = std::move(name);
    return region;
}

void Memory::free(u64 address) {
    Region* region = find(address);
    if (!region || region->address != address)
        throw std::invalid_argument("free: expected the address of an allocation, got " +
                                    explain(address, 1));
    const u64 first = (address - kBase) >> kPageBits;
    for (u64 page = first; page < pages_.size() && pages_[page] >= 0; ++page) pages_[page] = -1;
    region->freed = true;
    region->data.reset();
    region->written.reset();
    region->shadow.clear();
    region->messages.clear();
}

std::string Memory::explain(u64 address, u64 count) const {
    std::ostringstream text;
    text << count << " bytes at 0x" << std::hex << address << std::dec;
    const Region* nearest = nullptr;
    for (const auto& region : regions_)
        if (region->address <= address) nearest = region.get();
    if (!nearest) return text.str() + " (no allocation is near)";
    const u64 offset = address - nearest->address;
    text << " (offset " << offset << (nearest->freed ? " of the freed '" : " of '") << nearest->name
         << "', " << nearest->num_bytes << " bytes of rank " << nearest->rank << ")";
    return text.str();
}

}  // namespace ptx
