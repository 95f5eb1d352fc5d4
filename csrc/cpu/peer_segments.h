#pragma once
// The segments of a group: each rank makes its own and maps the others', who are asked whose they
// are before anything in them is used.
#include <memory>
#include <string>
#include <vector>

#include "cpu/control.h"
#include "cpu/segment.h"

namespace ep {

/// Make this rank's segment: a control part of `control_bytes`, committed, with `head` in front,
/// and room for `max_bytes` behind it. Throws std::invalid_argument for a rank or a number of ranks
/// that a host does not have.
std::shared_ptr<Segment> make_own_segment(const std::string& folder,
                                          const std::string& name,
                                          const SegmentHead& head,
                                          size_t control_bytes,
                                          size_t max_bytes);

/// Map the control parts of all peers, `names` by rank, into the empty places of `segments`.
/// `own` is this rank's head; theirs must be the same but for the rank.
void map_peer_segments(const std::string& folder,
                       const std::vector<std::string>& names,
                       const SegmentHead& own,
                       size_t control_bytes,
                       std::vector<std::shared_ptr<Segment>>& segments);

}  // namespace ep
