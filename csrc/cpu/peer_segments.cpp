#include "cpu/peer_segments.h"

#include <stdexcept>

#include "core/errors.h"

namespace ep {
namespace {

SegmentHead& head_of(const Segment& segment) {
    return *reinterpret_cast<SegmentHead*>(segment.base());
}

}  // namespace

std::shared_ptr<Segment> make_own_segment(const std::string& folder,
                                          const std::string& name,
                                          const SegmentHead& head,
                                          size_t control_bytes,
                                          size_t max_bytes) {
    if (head.num_ranks < 1 || head.num_ranks > kMaxRanks || head.rank >= head.num_ranks)
        throw std::invalid_argument(text("shared_memory: expected 1 to ", kMaxRanks,
                                         " ranks on one host, got ",
                                         static_cast<int>(head.num_ranks)));
    auto segment = Segment::create(folder, name, control_bytes + max_bytes);
    segment->commit(control_bytes);
    head_of(*segment) = head;
    return segment;
}

void map_peer_segments(const std::string& folder,
                       const std::vector<std::string>& names,
                       const SegmentHead& own,
                       size_t control_bytes,
                       std::vector<std::shared_ptr<Segment>>& segments) {
    if (names.size() != segments.size())
        fail("Buffer: expected ", segments.size(), " segment names, got ", names.size());
    for (uint32_t rank = 0; rank < own.num_ranks; ++rank) {
        if (rank == own.rank) continue;
        const std::string& name = names[rank];
        auto segment = Segment::open(folder, name);
        if (segment->num_bytes() < control_bytes) fail(name, " is too small to be a segment");
        // Before the first look: a file cut short is an error here, and would be a SIGBUS there.
        segment->populate(control_bytes);
        const SegmentHead& head = head_of(*segment);
        if (head.magic != own.magic || head.rank != rank || head.num_ranks != own.num_ranks)
            fail(name, " is not the segment of rank ", rank, " of ", own.num_ranks);
        segments[rank] = std::move(segment);
    }
}

}  // namespace ep
