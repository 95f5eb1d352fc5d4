"""Refuse a schedule that cannot run or would compute something else, naming step and ranks."""

from collections import Counter
from collections.abc import Sequence

from ep_megatron.pipeline.action import Action, Kind, Schedule

Event = tuple[str, int, int, int]
"""("F" or "B", stage, direction, micro-batch): a forward, or a backward of inputs."""


def check(schedule: Schedule) -> None:
    """Refuse a schedule that would hang, skip work, do it twice, or in an order that is not stated.

    Checked, in this order: that every stage has one place; that each action exists; that each chunk
    runs every micro-batch of its direction forwards and backwards exactly once, with a W for every
    I, in ascending order (gradients are summed in micro-batch order, whatever the schedule); that a
    rank does not use what it computes later; that two ranks send and receive their messages in the
    same order; and by executing it, that no rank waits for ever. Sends are taken to be
    asynchronous.

    A schedule without any backward, as `Schedule.forward_only` makes, is checked for its forwards.

    Raises:
        ValueError: names the rank, the step and the action, and of a deadlock all that wait.
    """
    _check_places(schedule)
    for rank, step, action in schedule.steps():
        _check_action(schedule, rank, step, action)
    for rank in range(schedule.num_ranks):
        _check_rank(schedule, rank)
    _check_messages(schedule)
    execution_order(schedule)


def _at(rank: int, step: int, action: Action) -> str:
    return f"check: rank {rank}, step {step}, {action}"


def _check_places(schedule: Schedule) -> None:
    wanted = Counter(
        (stage, direction)
        for direction in range(schedule.num_directions)
        for stage in range(schedule.num_stages)
    )
    found = Counter(
        (stage, schedule.directions[chunk])
        for stages in schedule.stages
        for chunk, stage in enumerate(stages)
    )
    wrong = (wanted - found) + (found - wanted)
    if wrong or len(schedule.actions) != schedule.num_ranks:
        stage, direction = min(wrong, default=(0, 0))
        raise ValueError(
            f"check: expected each of {schedule.num_stages} stages to have one place per direction "
            f"on {len(schedule.actions)} ranks, got {found[stage, direction]} for stage {stage} of "
            f"direction {direction} in stages {schedule.stages}"
        )
    if schedule.num_microbatches % schedule.num_directions:
        raise ValueError(
            f"check: expected num_microbatches to be a multiple of {schedule.num_directions} "
            f"directions, got {schedule.num_microbatches}"
        )


def _check_action(schedule: Schedule, rank: int, step: int, action: Action) -> None:
    has_backward = (action.backward_chunk is not None, action.backward_microbatch is not None)
    if has_backward != (action.kind is Kind.FB,) * 2:
        raise ValueError(
            f"{_at(rank, step, action)}: expected backward_chunk and backward_microbatch to be "
            f"given for FB alone, got {action!r}"
        )
    for part in action.parts():
        if not 0 <= part.chunk < schedule.num_chunks:
            raise ValueError(
                f"{_at(rank, step, action)}: expected chunk to be below {schedule.num_chunks}, "
                f"got {part.chunk}"
            )
        known = schedule.microbatches_of(part.chunk)
        if part.microbatch not in known:
            raise ValueError(
                f"{_at(rank, step, action)}: expected microbatch of chunk {part.chunk} to be in "
                f"[{known.start}, {known.stop}), got {part.microbatch}"
            )


def _check_rank(schedule: Schedule, rank: int) -> None:
    """Check one rank's counts and their order."""
    done: dict[tuple[Kind, int], list[int]] = {}
    split: set[tuple[int, int]] = set()
    weights: dict[int, int] = {}  # [chunk], the last micro-batch whose weights' gradient was added
    for step, action in enumerate(schedule.actions[rank]):
        for part in action.parts():
            kind, chunk, microbatch = part.kind, part.chunk, part.microbatch
            where = _at(rank, step, action)
            if kind is Kind.W:
                if (chunk, microbatch) not in split:
                    raise ValueError(
                        f"{where}: expected I{chunk}.{microbatch} to come before it, once"
                    )
                split.remove((chunk, microbatch))
            else:
                _check_turn(schedule, part, done, where)
            if kind is Kind.I:
                split.add((chunk, microbatch))
            if kind in (Kind.B, Kind.W):
                if microbatch < weights.get(chunk, -1):
                    raise ValueError(
                        f"{where}: expected weights' gradients to be added in micro-batch order, "
                        f"got {microbatch} after {weights[chunk]}"
                    )
                weights[chunk] = microbatch
        if action.kind is Kind.FB and action.chunk == action.backward_chunk:
            _check_independent(schedule, rank, step, action)
    if split:
        chunk, microbatch = min(split)
        raise ValueError(f"check: rank {rank}: expected W{chunk}.{microbatch}, got none")
    kinds = [Kind.F]
    if any(part.kind is not Kind.F for _, _, a in schedule.steps() for part in a.parts()):
        kinds.append(Kind.B)
    for chunk in range(schedule.num_chunks):
        known = schedule.microbatches_of(chunk)
        for kind in kinds:
            missing = known[len(done.get((kind, chunk), [])) :]
            if missing:
                raise ValueError(
                    f"check: rank {rank}: expected {kind.value}{chunk}.{missing[0]}, got none"
                )


def _check_turn(
    schedule: Schedule, part: Action, done: dict[tuple[Kind, int], list[int]], where: str
) -> None:
    """Check that a forward or backward is its chunk's next, and a backward's forward is done."""
    kind = Kind.F if part.kind is Kind.F else Kind.B
    sequence = done.setdefault((kind, part.chunk), [])
    known = schedule.microbatches_of(part.chunk)
    turn = known.start + len(sequence)
    if part.microbatch != turn:
        expected = turn if turn in known else "none"
        raise ValueError(
            f"{where}: expected the next {'forward' if kind is Kind.F else 'backward'} of chunk "
            f"{part.chunk} to be of micro-batch {expected}, got {part.microbatch}"
        )
    sequence.append(part.microbatch)
    if kind is Kind.B and part.microbatch not in done.get((Kind.F, part.chunk), []):
        raise ValueError(f"{where}: expected F{part.chunk}.{part.microbatch} to come before it")


def _check_independent(schedule: Schedule, rank: int, step: int, action: Action) -> None:
    if action.microbatch == action.backward_microbatch:
        raise ValueError(
            f"{_at(rank, step, action)}: expected the halves of a pair to be independent, got the "
            "backward of its own forward"
        )


def _check_messages(schedule: Schedule) -> None:
    """Check that both ends of every channel (sender, receiver, F or B) list the same messages."""
    sent: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
    received: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
    for rank, _, action in schedule.steps():
        for part in action.parts():
            if part.kind is Kind.W:
                continue
            way = "F" if part.kind is Kind.F else "B"
            back, ahead = (
                schedule.previous(rank, part.chunk),
                schedule.following(rank, part.chunk),
            )
            source, target = (back, ahead) if way == "F" else (ahead, back)
            if source is not None and source[0] != rank:
                messages = received.setdefault((source[0], rank, way), [])
                messages.append((source[1], part.microbatch))
            if target is not None and target[0] != rank:
                sent.setdefault((rank, target[0], way), []).append((part.chunk, part.microbatch))
    for channel in sorted(sent.keys() | received.keys()):
        out, into = sent.get(channel, []), received.get(channel, [])
        sender, receiver, way = channel
        for index, (one, other) in enumerate(zip(out, into, strict=True)):
            if one != other:
                raise ValueError(
                    f"check: expected rank {receiver} to receive {way} messages in the order in "
                    f"which rank {sender} sends them, got {way}{other[0]}.{other[1]} where "
                    f"{way}{one[0]}.{one[1]} is sent (message {index})"
                )


def execution_order(schedule: Schedule) -> list[tuple[int, int, Action]]:
    """Execute a schedule without time: rank, step and action in an order in which they can run.

    Raises:
        ValueError: when ranks wait for each other for ever; names all that wait and for what.
    """
    done: set[Event] = set()
    position = [0] * schedule.num_ranks
    order: list[tuple[int, int, Action]] = []
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                if any(event not in done for event in needs(schedule, rank, action)):
                    break
                done |= set(gives(schedule, rank, action))
                order.append((rank, position[rank], action))
                position[rank] += 1
                moved = True
    stuck = [
        (rank, step, schedule.actions[rank][step])
        for rank, step in enumerate(position)
        if step < len(schedule.actions[rank])
    ]
    if stuck:
        waits = "; ".join(
            f"rank {rank} at step {step}, {action}, for "
            + ", ".join(
                f"{way} of micro-batch {microbatch} on rank {schedule.rank_of(stage, direction)}"
                for way, stage, direction, microbatch in needs(schedule, rank, action)
                if (way, stage, direction, microbatch) not in done
            )
            for rank, step, action in stuck
        )
        raise ValueError(f"check: expected every rank to finish, got a deadlock: {waits}")
    return order


def needs(schedule: Schedule, rank: int, action: Action) -> list[Event]:
    """Return the events that must have happened before an action can begin."""
    events: list[Event] = []
    for part in action.parts():
        stage = schedule.stage_of(rank, part.chunk)
        direction = schedule.directions[part.chunk]
        if part.kind is Kind.F:
            if stage > 0:
                events.append(("F", stage - 1, direction, part.microbatch))
        elif part.kind is Kind.W:
            events.append(("B", stage, direction, part.microbatch))
        else:
            events.append(("F", stage, direction, part.microbatch))
            if stage < schedule.num_stages - 1:
                events.append(("B", stage + 1, direction, part.microbatch))
    return events


def gives(schedule: Schedule, rank: int, action: Action) -> list[Event]:
    """Return the events that happen when an action ends."""
    return [
        (
            "F" if part.kind is Kind.F else "B",
            schedule.stage_of(rank, part.chunk),
            schedule.directions[part.chunk],
            part.microbatch,
        )
        for part in action.parts()
        if part.kind is not Kind.W
    ]


def peak_activations(
    schedule: Schedule,
    kept_by_weights: float = 1.0,
    sizes: Sequence[Sequence[float]] | None = None,
) -> tuple[float, ...]:
    """Return for each rank the most activations that it holds at one time.

    Counted are forwards whose backward has not ended; both halves of a pair count while it runs.

    Args:
        schedule: one that `check` accepts.
        kept_by_weights: share of a chunk's activations that is still held between I and W.
        sizes: `[rank][chunk]`, of a chunk's activations; each counts 1 without.
    """
    peaks = []
    for rank, actions in enumerate(schedule.actions):
        held = peak = 0.0
        of_chunk = sizes[rank] if sizes is not None else [1.0] * schedule.num_chunks
        for action in actions:
            held += sum(of_chunk[p.chunk] for p in action.parts() if p.kind is Kind.F)
            peak = max(peak, held)
            for part in action.parts():
                freed = {Kind.B: 1.0, Kind.I: 1 - kept_by_weights, Kind.W: kept_by_weights}
                held -= freed.get(part.kind, 0.0) * of_chunk[part.chunk]
        peaks.append(peak)
    return tuple(peaks)
