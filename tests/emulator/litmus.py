"""Small parallel programs: what the PTX memory model allows, and what the emulator does with them.

`explore` enumerates all executions of a program under the axioms of the PTX memory model (Lustig et
al., ASPLOS 2019; PTX ISA, chapter on memory consistency) and says which results are allowed and
whether some execution has a data race. `emulate` runs the same program as PTX.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.emulator.machine import Machine

SCOPES = ("cta", "gpu", "sys")
Pairs = set[tuple[int, int]]
Result = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One step of a thread: kind is ld, st, add (atomic), fence, bar (CTA) or warp (its lanes).

    `when` is (register, value): the step is taken only if an earlier load of that register of the
    same thread returned the value.
    """

    kind: str
    order: str = "weak"
    scope: str = "sys"
    place: str = ""
    value: int = 0
    register: str = ""
    when: tuple[str, int] | None = None


@dataclass(frozen=True)
class Thread:
    rank: int
    cta: int
    warp: int
    lane: int
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Program:
    """Threads, and the registers whose values are the result. Every place starts as 0."""

    threads: tuple[Thread, ...]
    registers: tuple[str, ...]
    name: str = ""

    @property
    def places(self) -> list[str]:
        return sorted({op.place for thread in self.threads for op in thread.ops if op.place})


@dataclass
class Event:
    number: int
    thread: int  # -1: the initial write
    position: int
    kind: str  # R, W, F, B
    op: Op
    pair: int = -1  # the read of an atomic's write
    value: int = 0


@dataclass
class Allowed:
    results: set[Result] = field(default_factory=set)
    has_race: bool = False


def closure(pairs: Pairs) -> Pairs:
    closed = set(pairs)
    while True:
        after: dict[int, set[int]] = {}
        for a, b in closed:
            after.setdefault(a, set()).add(b)
        new = {(a, c) for a, b in closed for c in after.get(b, ())} - closed
        if not new:
            return closed
        closed |= new


def compose(first: Pairs, second: Pairs) -> Pairs:
    after: dict[int, set[int]] = {}
    for a, b in second:
        after.setdefault(a, set()).add(b)
    return {(a, c) for a, b in first for c in after.get(b, ())}


class Execution:
    """The events of one choice of taken steps, and the orders that do not depend on values."""

    def __init__(self, program: Program, taken: dict[tuple[int, int], bool]) -> None:
        self.program = program
        self.events: list[Event] = []
        for place in program.places:
            self.events.append(Event(len(self.events), -1, 0, "W", Op("st", place=place)))
        for t, thread in enumerate(program.threads):
            for position, op in enumerate(thread.ops):
                if taken.get((t, position), True):
                    self.add(t, position, op)
        pairs = list(itertools.permutations(self.events, 2))
        self.order = {
            (a.number, b.number)
            for a, b in pairs
            if a.thread == b.thread >= 0 and a.position < b.position
        } | {(e.pair, e.number) for e in self.events if e.pair >= 0}
        self.strong = {(a.number, b.number) for a, b in pairs if self.morally_strong(a, b)}
        self.meets = {(a.number, b.number) for a, b in pairs if self.same_barrier(a, b)}

    def add(self, thread: int, position: int, op: Op) -> None:
        kinds = {"ld": "R", "st": "W", "add": "RW", "fence": "F", "bar": "B", "warp": "B"}[op.kind]
        for kind in kinds:
            number = len(self.events)
            pair = number - 1 if kinds == "RW" and kind == "W" else -1
            self.events.append(Event(number, thread, position, kind, op, pair))

    def thread(self, event: Event) -> Thread:
        return self.program.threads[event.thread]

    def includes(self, a: Event, b: Event) -> bool:
        x, y = self.thread(a), self.thread(b)
        if a.op.scope == "sys":
            return True
        return x.rank == y.rank and (a.op.scope == "gpu" or x.cta == y.cta)

    def morally_strong(self, a: Event, b: Event) -> bool:
        if a.thread < 0 or b.thread < 0 or "B" in (a.kind, b.kind):
            return False
        if "F" not in (a.kind, b.kind) and a.op.place != b.op.place:
            return False
        if a.thread == b.thread:
            return True
        strong = all(e.kind == "F" or e.op.order != "weak" for e in (a, b))
        return strong and self.includes(a, b) and self.includes(b, a)

    def same_barrier(self, a: Event, b: Event) -> bool:
        if a.kind != "B" or b.kind != "B" or a.thread == b.thread or a.op.kind != b.op.kind:
            return False
        x, y = self.thread(a), self.thread(b)
        together = (x.rank, x.cta) == (y.rank, y.cta)
        if a.op.kind == "warp":
            together = together and x.warp == y.warp
        return together and self.barrier_number(a) == self.barrier_number(b)

    def barrier_number(self, event: Event) -> int:
        ops = self.thread(event).ops[: event.position]
        return sum(op.kind == event.op.kind for op in ops)

    def releases(self) -> Pairs:
        """(first event, the write that others read) of every release pattern."""
        found = set()
        for w in self.events:
            if w.kind != "W" or w.op.order == "weak":
                continue
            for a in self.events:
                same = a.number == w.number or (a.number, w.number) in self.order
                if a.kind == "W" and a.op.order in ("release", "acq_rel"):
                    if same and a.op.place == w.op.place:
                        found.add((a.number, w.number))
                elif a.kind == "F" and (a.number, w.number) in self.order:
                    found.add((a.number, w.number))
        return found

    def acquires(self) -> Pairs:
        """(the read, last event) of every acquire pattern."""
        found = set()
        for r in self.events:
            if r.kind != "R" or r.op.order == "weak":
                continue
            for b in self.events:
                same = b.number == r.number or (r.number, b.number) in self.order
                if b.kind == "R" and b.op.order in ("acquire", "acq_rel"):
                    if same and b.op.place == r.op.place:
                        found.add((r.number, b.number))
                elif b.kind == "F" and (r.number, b.number) in self.order:
                    found.add((r.number, b.number))
        return found


def explore(program: Program) -> Allowed:
    """Enumerate the consistent executions of a program."""
    allowed = Allowed()
    conditional = [
        (t, position)
        for t, thread in enumerate(program.threads)
        for position, op in enumerate(thread.ops)
        if op.when
    ]
    for choice in itertools.product((False, True), repeat=len(conditional)):
        execution = Execution(program, dict(zip(conditional, choice, strict=True)))
        for source in sources_of_reads(execution):
            check_values(execution, source, dict(zip(conditional, choice, strict=True)), allowed)
    return allowed


def sources_of_reads(execution: Execution) -> Iterator[dict[int, Event]]:
    reads = [e for e in execution.events if e.kind == "R"]
    choices = []
    for r in reads:
        writes = [w for w in execution.events if w.kind == "W" and w.op.place == r.op.place]
        choices.append([w for w in writes if (r.number, w.number) not in execution.order])
    for combination in itertools.product(*choices):
        yield {r.number: w for r, w in zip(reads, combination, strict=True)}


def check_values(
    execution: Execution,
    source: dict[int, Event],
    taken: dict[tuple[int, int], bool],
    allowed: Allowed,
) -> None:
    values: dict[int, int] = {}

    def value_of(write: Event, depth: int = 0) -> int:
        if depth > len(execution.events):
            raise RecursionError  # a value out of thin air
        if write.thread < 0:
            return 0
        if write.pair >= 0:
            return value_of(source[write.pair], depth + 1) + write.op.value
        return write.op.value

    try:
        for number, write in source.items():
            values[number] = value_of(write)
    except RecursionError:
        return
    registers = {}
    for event in execution.events:
        if event.kind == "R" and event.op.register:
            registers[(event.thread, event.op.register)] = values[event.number]
    for (t, position), is_taken in taken.items():
        when = execution.program.threads[t].ops[position].when
        assert when is not None
        if (registers.get((t, when[0])) == when[1]) != is_taken:
            return
    result = tuple(
        next((v for (_, name), v in registers.items() if name == wanted), -1)
        for wanted in execution.program.registers
    )
    for coherence in coherence_orders(execution):
        if is_consistent(execution, source, coherence, allowed):
            allowed.results.add(result)


def coherence_orders(execution: Execution) -> Iterator[Pairs]:
    by_place: dict[str, list[Event]] = {}
    for event in execution.events:
        if event.kind == "W" and event.thread >= 0:
            by_place.setdefault(event.op.place, []).append(event)
    initial = {e.op.place: e for e in execution.events if e.thread < 0}
    for orders in itertools.product(*(itertools.permutations(w) for w in by_place.values())):
        pairs: Pairs = set()
        for order in orders:
            chain = [initial[order[0].op.place], *order]
            pairs |= {(a.number, b.number) for a, b in itertools.combinations(chain, 2)}
        yield pairs


def is_consistent(
    execution: Execution, source: dict[int, Event], coherence: Pairs, allowed: Allowed
) -> bool:
    events, order, strong = execution.events, execution.order, execution.strong
    reads_from = {(w.number, r) for r, w in source.items()}
    from_reads = {(r, b) for r, w in source.items() for a, b in coherence if a == w.number}
    updates = {(e.pair, e.number) for e in events if e.pair >= 0}
    from_reads -= updates
    # Observation: strong reads-from, carried on by read-modify-writes.
    observes = reads_from & strong
    while True:
        new = compose(compose(observes, updates), observes) - observes
        if not new:
            break
        observes |= new
    acquires = execution.acquires()
    synchronises = {
        (a, b)
        for a, w in execution.releases()
        for r, b in acquires
        if (w, r) in observes and (a, b) in strong
    }
    base = closure(order | synchronises | execution.meets)
    same_place = {
        (a, b) for a, b in order if events[a].op.place and events[a].op.place == events[b].op.place
    }
    cause = base | compose(observes, base | same_place)
    writes = {e.number for e in events if e.kind == "W"}
    for a, b in cause:
        same = a in writes and b in writes and events[a].op.place == events[b].op.place
        if same and (b, a) in coherence:
            return False  # coherence
    if any((b, a) in cause for a, b in reads_from | from_reads):
        return False  # causality
    for r, w in updates:  # atomicity
        between = {x for a, x in from_reads if a == r and (x, w) in coherence}
        if any((r, x) in strong and (x, w) in strong for x in between):
            return False
    per_place = closure(((reads_from | from_reads | coherence) & strong) | same_place)
    if any(a == b for a, b in per_place):
        return False
    allowed.has_race |= any(races(a, b, strong, base) for a, b in itertools.combinations(events, 2))
    return True


def races(a: Event, b: Event, strong: Pairs, base: Pairs) -> bool:
    if a.thread < 0 or a.thread == b.thread or "W" not in (a.kind, b.kind):
        return False
    if not a.op.place or a.op.place != b.op.place:
        return False
    pair = (a.number, b.number)
    return pair not in strong and pair not in base and pair[::-1] not in base


def to_ptx(program: Program) -> str:
    """Write the program as one kernel; every warp's lanes run side by side between CTA barriers."""
    lines = [
        ".version 9.0\n.target sm_90a\n.address_size 64",
        ".visible .entry litmus(.param .u32 rank, .param .u64 places, .param .u64 results) {",
        ".reg .pred %p<4>; .reg .b32 %r<8>; .reg .b32 %v<64>; .reg .b64 %rd<4>;",
        "ld.param.u32 %r0, [rank]; ld.param.u64 %rd0, [places]; ld.param.u64 %rd1, [results];",
        "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %tid.x;",
    ]
    warps = sorted({(t.rank, t.cta, t.warp) for t in program.threads})
    for number, (rank, cta, warp) in enumerate(warps):
        lines += [
            f"setp.ne.u32 %p0, %r0, {rank}; @%p0 bra W{number};",
            f"setp.ne.u32 %p0, %r1, {cta}; @%p0 bra W{number};",
            f"shr.u32 %r3, %r2, 5; setp.ne.u32 %p0, %r3, {warp}; @%p0 bra W{number};",
        ]
        here = [t for t in program.threads if (t.rank, t.cta, t.warp) == (rank, cta, warp)]
        lines += warp_code(program, here, number)
        lines += ["ret;", f"W{number}:"]
    return "\n".join([*lines, "ret; }"])


def warp_code(program: Program, threads: list[Thread], number: int) -> list[str]:
    phases = 1 + max(sum(op.kind == "bar" for op in thread.ops) for thread in threads)
    lines: list[str] = []
    mask = sum(1 << thread.lane for thread in threads)
    for phase in range(phases):
        for thread in threads:
            end = f"E{number}_{phase}_{thread.lane}"
            lines.append(f"and.b32 %r4, %r2, 31; setp.ne.u32 %p0, %r4, {thread.lane};")
            lines.append(f"@%p0 bra {end};")
            for position, op in phase_ops(thread, phase):
                lines += op_code(program, thread, position, op, mask, end)
            if phase == phases - 1:
                lines += result_code(program, thread)
            lines.append(f"{end}:")
        if phase < phases - 1:
            lines.append("bar.sync 0;")
    return lines


def phase_ops(thread: Thread, phase: int) -> list[tuple[int, Op]]:
    found, current = [], 0
    for position, op in enumerate(thread.ops):
        if op.kind == "bar":
            current += 1
        elif current == phase:
            found.append((position, op))
    return found


def register_of(thread: Thread, name: str) -> str:
    return f"%v{sorted({op.register for op in thread.ops if op.register}).index(name)}"


def op_code(
    program: Program, thread: Thread, position: int, op: Op, mask: int, end: str
) -> list[str]:
    label = f"{end}_{position}"
    lines = []
    if op.when:
        register = register_of(thread, op.when[0])
        lines.append(f"setp.ne.u32 %p1, {register}, {op.when[1]}; @%p1 bra {label};")
    place = f"[%rd0+{4 * program.places.index(op.place)}]" if op.place else ""
    suffix = "weak" if op.order == "weak" else f"{op.order}.{op.scope}"
    if op.kind == "ld":
        lines.append(f"ld.{suffix}.global.u32 {register_of(thread, op.register)}, {place};")
    elif op.kind == "st":
        lines.append(f"st.{suffix}.global.u32 {place}, {op.value};")
    elif op.kind == "add":
        target = register_of(thread, op.register) if op.register else "_"
        lines.append(f"atom.{suffix}.global.add.u32 {target}, {place}, {op.value};")
    elif op.kind == "fence":
        lines.append(f"fence.acq_rel.{op.scope};")
    else:
        lines.append(f"bar.warp.sync {mask};")
    return [*lines, f"{label}:"]


def result_code(program: Program, thread: Thread) -> list[str]:
    lines = []
    for op in thread.ops:
        if op.register in program.registers:
            place = f"[%rd1+{4 * program.registers.index(op.register)}]"
            end = f"R{thread.rank}{thread.cta}{thread.warp}{thread.lane}{op.register}"
            if op.when:  # only if it was loaded
                register = register_of(thread, op.when[0])
                lines.append(f"setp.ne.u32 %p1, {register}, {op.when[1]}; @%p1 bra {end};")
            lines.append(f"st.global.u32 {place}, {register_of(thread, op.register)}; {end}:")
    return lines


def emulate(program: Program, seed: int, mode: str) -> tuple[Result, list[tuple[str, str]]]:
    """Run the program once; return its result and the emulator's reports."""
    num_ranks = 1 + max(thread.rank for thread in program.threads)
    machine = Machine(num_ranks, seed, mode)
    machine.load(to_ptx(program))
    places: Any = np.zeros(len(program.places), np.uint32)
    place = machine.place(0, places, True, "places")
    results = machine.place(
        0, np.full(len(program.registers), 0xFFFFFFFF, np.uint32), True, "results"
    )
    machine.meet()
    for rank in range(num_ranks):
        here = [thread for thread in program.threads if thread.rank == rank]
        grid = 1 + max(thread.cta for thread in here)
        block = 32 * (1 + max(thread.warp for thread in here))
        packed = machine.pack("litmus", rank, place, results)
        machine.launch(rank, "litmus", grid, block, 0, packed)
    machine.run()
    values = machine.fetch(0, results, len(program.registers), np.int32)
    return tuple(int(value) for value in values), machine.report()
