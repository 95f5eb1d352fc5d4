"""The emulated machine: warps, barriers, atomics, streams, host threads, time, and misuse."""

import itertools
import random
import threading
from typing import Any

import numpy as np
import pytest

from tests.emulator.machine import Fault, Machine

Array = np.ndarray[Any, Any]
HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"
REGISTERS = """.reg .pred %p<8>; .reg .b16 %h<4>; .reg .b32 %r<32>; .reg .b64 %d<16>;
.reg .f32 %f<4>; ld.param.u64 %d0, [out]; mov.u32 %r0, %tid.x;
mul.wide.u32 %d1, %r0, 4; add.u64 %d1, %d1, %d0;"""


def kernel(body: str, before: str = "", name: str = "k") -> str:
    """Return a module whose kernel has its thread in %r0 and `&out[thread]` in %d1."""
    head = f"{HEAD}{before}\n.visible .entry {name}(.param .u64 out, .param .u32 n) {{\n"
    return head + REGISTERS + body + "\nret;\n}\n"


def run(
    text: str, block: Any = 32, grid: Any = 1, n: int = 0, words: int = 64, **options: Any
) -> tuple[Array, Machine]:
    machine = Machine(1, **options)
    machine.load(text)
    out = machine.place(0, np.zeros(words, np.uint32), True, "out")
    machine.launch(0, "k", grid, block, 0, machine.pack("k", out, n))
    machine.run()
    return machine.fetch(0, out, words, np.uint32), machine


def test_shuffles() -> None:
    lanes = np.arange(32)
    expected = {
        "idx.b32 %r1|%p0, %r0, 5, 31": np.full(32, 5),
        "up.b32 %r1|%p0, %r0, 3, 0": np.where(lanes >= 3, lanes - 3, lanes),
        "down.b32 %r1|%p0, %r0, 3, 31": np.where(lanes < 29, lanes + 3, lanes),
        "bfly.b32 %r1|%p0, %r0, 9, 31": lanes ^ 9,
        # Segments of eight lanes: the mask in bits 8 to 12 names the segment's bits.
        "idx.b32 %r1|%p0, %r0, 2, 0x1807": lanes // 8 * 8 + 2,
        "down.b32 %r1|%p0, %r0, 2, 0x1807": np.where(lanes % 8 < 6, lanes + 2, lanes),
    }
    for text, result in expected.items():
        got, _ = run(kernel(f"shfl.sync.{text}, -1; st.global.u32 [%d1], %r1;"))
        np.testing.assert_array_equal(got[:32], result, text)


def test_votes_matches_and_reductions() -> None:
    values = np.arange(32) % 5
    head = "rem.u32 %r2, %r0, 5; setp.gt.u32 %p0, %r2, 1;"
    above = values > 1
    ballot = sum(1 << i for i in range(32) if above[i])
    same = [sum(1 << j for j in range(32) if values[j] == values[i]) for i in range(32)]
    expected = {
        "vote.sync.ballot.b32 %r1, %p0, -1;": [ballot] * 32,
        "vote.sync.any.pred %p1, %p0, -1; selp.u32 %r1, 1, 0, %p1;": [1] * 32,
        "vote.sync.all.pred %p1, %p0, -1; selp.u32 %r1, 1, 0, %p1;": [0] * 32,
        "vote.sync.uni.pred %p1, %p0, -1; selp.u32 %r1, 1, 0, %p1;": [0] * 32,
        "match.any.sync.b32 %r1, %r2, -1;": same,
        "match.all.sync.b32 %r1|%p1, %r2, -1;": [0] * 32,
        "redux.sync.add.s32 %r1, %r2, -1;": [values.sum()] * 32,
        "redux.sync.max.u32 %r1, %r2, -1;": [4] * 32,
        "redux.sync.min.s32 %r1, %r2, -1;": [0] * 32,
        "redux.sync.or.b32 %r1, %r2, -1;": [7] * 32,
        "redux.sync.and.b32 %r1, %r2, -1;": [0] * 32,
        "redux.sync.xor.b32 %r1, %r2, -1;": [np.bitwise_xor.reduce(values)] * 32,
        "activemask.b32 %r1;": [0xFFFFFFFF] * 32,
        "elect.sync _|%p1, -1; selp.u32 %r1, 1, 0, %p1;": [1] + [0] * 31,
    }
    for text, result in expected.items():
        got, _ = run(kernel(f"{head}{text} st.global.u32 [%d1], %r1;"))
        np.testing.assert_array_equal(got[:32], np.array(result, np.uint32), text)


def test_divergent_lanes_meet_only_where_they_are_told_to() -> None:
    # Odd and even lanes come to their warp barriers at different instructions.
    body = """and.b32 %r1, %r0, 1; setp.eq.u32 %p0, %r1, 0; @%p0 bra even;
    bar.warp.sync -1; mov.u32 %r2, 7; bra end;
even: bar.warp.sync -1; mov.u32 %r2, 9;
end: st.global.u32 [%d1], %r2;"""
    for seed in range(8):
        got, _ = run(kernel(body), seed=seed)
        np.testing.assert_array_equal(got[:32], np.where(np.arange(32) % 2, 7, 9))


def test_barriers_that_count() -> None:
    body = """rem.u32 %r1, %r0, 3; setp.eq.u32 %p0, %r1, 0;
    bar.red.popc.u32 %r2, 0, %p0; bar.red.or.pred %p1, 0, %p0; bar.red.and.pred %p2, 0, %p0;
    selp.u32 %r3, 1000, 0, %p1; selp.u32 %r4, 100, 0, %p2;
    add.u32 %r2, %r2, %r3; add.u32 %r2, %r2, %r4; st.global.u32 [%d1], %r2;"""
    got, _ = run(kernel(body), block=64)
    np.testing.assert_array_equal(got, 1000 + 22)


def test_named_barriers_between_producer_and_consumer() -> None:
    body = """setp.lt.u32 %p0, %r0, 32; @%p0 bra consumer;
    st.shared.u32 [cell], 42; bar.arrive 3, 64; bra end;
consumer: bar.sync 3, 64; ld.shared.u32 %r1, [cell]; st.global.u32 [%d1], %r1;
end:"""
    text = kernel(body.replace("st.shared", "setp.eq.u32 %p1, %r0, 32; @%p1 st.shared"))
    text = text.replace("ld.param.u64 %d0", ".shared .align 4 .b8 cell[4];\nld.param.u64 %d0")
    for seed in range(8):
        got, machine = run(text, block=64, seed=seed, mode="race")
        np.testing.assert_array_equal(got[:32], 42)
        assert not machine.report()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("bar.sync 1, 33;", "multiple of 32"),
        ("bar.arrive 1, 64; bar.arrive 1, 64;", "arrives twice"),
        (
            "setp.lt.u32 %p0, %r0, 32; @%p0 bra low; bar.sync 1, 96; bra end;\n"
            "low: bar.sync 1, 64;\nend:",
            "threads like the warps before",
        ),
    ],
)
def test_misused_barriers_are_reported(body: str, message: str) -> None:
    machine = Machine(1, patience=20_000)
    machine.load(kernel(body))
    out = machine.place(0, np.zeros(64, np.uint32))
    machine.launch(0, "k", 1, 64, 0, machine.pack("k", out, 0))
    try:
        machine.run()
    except Fault as fault:
        assert "hang" in str(fault)  # noqa: PT017
    assert any(kind == "barrier" and message in text for kind, text in machine.report())


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("add.u32", lambda old, v: old + v),
        ("max.s32", max),
        ("min.u32", min),
        ("or.b32", lambda old, v: old | v),
        ("xor.b32", lambda old, v: old ^ v),
        ("and.b32", lambda old, v: old & v),
        ("exch.b32", lambda _, v: v),
        ("inc.u32", lambda old, v: 0 if old >= v else old + 1),
        ("dec.u32", lambda old, v: v if old == 0 or old > v else old - 1),
    ],
)
def test_atomics(operation: str, function: Any) -> None:
    body = f"""add.u32 %r1, %r0, 3; atom.global.{operation} %r2, [%d0+128], %r1;
    st.global.u32 [%d1], %r2;"""
    got, machine = run(kernel(body), mode="race")
    # The lanes' results are the values before each, in some order that explains them.
    value, seen = 0, []
    for lane in range(32):
        seen.append(value)
        value = function(value, lane + 3)
    assert sorted(got[:32].tolist()) == sorted(seen)
    assert got[32] == value
    assert not machine.report()


def test_compare_and_swap_and_float_adds() -> None:
    body = """atom.global.cas.b32 %r1, [%d0+128], 0, 5; st.global.u32 [%d1], %r1;
    cvt.rn.f32.u32 %f0, %r0; red.global.add.f32 [%d0+132], %f0;
    mov.b32 %r2, 0x3f803f80; red.global.add.noftz.bf16x2 [%d0+136], %r2;"""
    got, _ = run(kernel(body))
    np.testing.assert_array_equal(got[:32], [0] + [5] * 31)
    assert got[33:34].view(np.float32)[0] == 496
    assert got[34] == 0x42004200  # 32 in both halves


def test_special_registers_in_three_dimensions() -> None:
    body = """mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ntid.x; mov.u32 %r4, %ntid.y;
    mad.lo.u32 %r5, %r2, %r4, %r1; mad.lo.u32 %r5, %r5, %r3, %r0;
    mov.u32 %r6, %ctaid.y; mov.u32 %r7, %nctaid.x; mov.u32 %r8, %ctaid.x;
    mad.lo.u32 %r6, %r6, %r7, %r8; mad.lo.u32 %r6, %r6, 24, %r5;
    mul.wide.u32 %d2, %r6, 4; add.u64 %d2, %d2, %d0; st.global.u32 [%d2], %r6;"""
    got, _ = run(kernel(body), block=[4, 3, 2], grid=[2, 3], words=144)
    np.testing.assert_array_equal(got, np.arange(144))


def test_a_branch_through_a_table() -> None:
    body = """and.b32 %r1, %r0, 3;
targets: .branchtargets a, b, c, a;
    brx.idx %r1, targets;
a: mov.u32 %r2, 10; bra end;
b: mov.u32 %r2, 20; bra end;
c: mov.u32 %r2, 30;
end: st.global.u32 [%d1], %r2;"""
    got, _ = run(kernel(body))
    np.testing.assert_array_equal(got[:32], np.array([10, 20, 30, 10] * 8))


def test_variables_of_the_module() -> None:
    before = (
        ".global .align 4 .u32 counter = 5;\n"
        ".const .align 4 .b8 table[8] = {1, 0, 0, 0, 2, 1};\n.shared .align 8 .b8 scratch[128];"
    )
    body = """atom.global.add.u32 %r1, [counter], 1; ld.const.u32 %r2, [table+4];
    mov.u64 %d2, scratch; cvta.shared.u64 %d2, %d2; mul.wide.u32 %d3, %r0, 4; add.u64 %d3, %d3, %d2;
    st.u32 [%d3], %r2; ld.u32 %r3, [%d3]; add.u32 %r1, %r1, %r3; st.global.u32 [%d1], %r1;"""
    got, _ = run(kernel(body, before))
    np.testing.assert_array_equal(np.sort(got[:32]), np.arange(5, 37) + 258)


def test_an_extern_function_is_an_intrinsic() -> None:
    before = ".extern .func (.param .b32 r) ep_double (.param .b64 a, .param .b32 b);"
    body = """{ .param .b64 p0; st.param.b64 [p0+0], %d1; .param .b32 p1; st.param.b32 [p1+0], %r0;
    .param .b32 back; call.uni (back), ep_double, (p0, p1); ld.param.b32 %r1, [back+0]; }
    st.global.u32 [%d1], %r1;"""
    machine = Machine(1)
    machine.load(kernel(body, before))
    out = machine.place(0, np.zeros(32, np.uint32))
    seen = []

    def double(rank: int, lane: int, arguments: tuple[int, int]) -> int:
        seen.append((rank, lane, arguments[0] - out))
        return 2 * arguments[1]

    machine.on_call("ep_double", double)
    machine.launch(0, "k", 1, 32, 0, machine.pack("k", out, 0))
    machine.run()
    np.testing.assert_array_equal(machine.fetch(0, out, 32, np.uint32), 2 * np.arange(32))
    assert seen == [(0, lane, 4 * lane) for lane in range(32)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r1, [%d0+4096]; st.global.u32 [%d1], %r1;", "out of bounds: 4 bytes"),
        ("ld.global.u32 %r1, [%d0+2]; st.global.u32 [%d1], %r1;", "multiple of 4"),
        ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d0+8];", "multiple of 16"),
        ("st.shared.u32 [4096], %r0;", "of shared memory"),
        ("setp.gt.u32 %p0, %r0, 3; @%p0 mov.u32 %r1, 1; st.global.u32 [%d1], %r1;", "written"),
        ("setp.gt.u32 %p0, %r0, 3; @%p0 exit; bar.warp.sync -1;", "to be alive"),
        ("bar.warp.sync 1;", "in its own membermask"),
        ("trap;", "trap; rank 0 block 0,0,0 warp 0 lane 0"),
    ],
)
def test_faults(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(kernel(body))


def test_memory_that_nobody_wrote_is_reported() -> None:
    machine = Machine(1)
    machine.load(kernel("ld.global.u32 %r1, [%d1]; st.global.u32 [%d1], %r1;"))
    out = machine.allocate(0, 128, name="fresh")
    machine.launch(0, "k", 1, 32, 0, machine.pack("k", out, 0))
    machine.run()
    ((kind, text),) = machine.report()
    assert kind == "uninitialised"
    assert "'fresh'" in text
    machine.free(out)
    machine.launch(0, "k", 1, 32, 0, machine.pack("k", out, 0))
    with pytest.raises(Fault, match="freed 'fresh'"):
        machine.run()


def test_the_broken_machine_stays_broken() -> None:
    machine = Machine(1)
    machine.load(kernel("trap;"))
    out = machine.place(0, np.zeros(32, np.uint32))
    machine.launch(0, "k", 1, 32, 0, machine.pack("k", out, 0))
    for _ in range(2):
        with pytest.raises(Fault, match="trap"):
            machine.run()
    with pytest.raises(Fault, match="trap"):
        machine.launch(0, "k", 1, 32, 0, machine.pack("k", out, 0))


ADD_TWICE = kernel("""ld.global.u32 %r1, [%d1]; mul.lo.u32 %r1, %r1, 3; ld.param.u32 %r2, [n];
add.u32 %r1, %r1, %r2; st.global.u32 [%d1], %r1;""")


def test_a_stream_runs_in_order_and_others_beside_it() -> None:
    for mode in ("race", "race+weak"):
        machine = Machine(1, 0, mode)
        machine.load(ADD_TWICE)
        outs = [machine.place(0, np.zeros(32, np.uint32)) for _ in range(2)]
        for n in (1, 2, 3):
            for stream, out in enumerate(outs):
                packed = machine.pack("k", out, n + 10 * stream)
                machine.launch(0, "k", 1, 32, 0, packed, stream=stream)
        machine.synchronize(0, 1)
        np.testing.assert_array_equal(
            machine.fetch(0, outs[1], 32, np.uint32), 11 * 9 + 12 * 3 + 13
        )
        machine.synchronize(0)
        np.testing.assert_array_equal(machine.fetch(0, outs[0], 32, np.uint32), 9 + 2 * 3 + 3)
        assert not machine.report()


def test_two_streams_race_on_one_place() -> None:
    machine = Machine(1, 0, "race")
    machine.load(ADD_TWICE)
    out = machine.place(0, np.zeros(32, np.uint32))
    for stream in (0, 1):
        machine.launch(0, "k", 1, 32, 0, machine.pack("k", out, 1), stream=stream)
    machine.run()
    assert {kind for kind, _ in machine.report()} == {"race"}


PING_PONG = kernel(
    """ld.param.u32 %r1, [n]; setp.ne.u32 %p0, %r0, 0; @%p0 bra end;
again: ld.acquire.sys.global.u32 %r2, [%d0]; setp.ne.u32 %p1, %r2, %r1; @%p1 bra again;
add.u32 %r2, %r2, 1; st.release.sys.global.u32 [%d0], %r2;
end:"""
)


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_one_host_thread_per_rank(num_ranks: int) -> None:
    machine = Machine(num_ranks, 1, "race")
    machine.load(PING_PONG)
    out = machine.place(0, np.zeros(1, np.uint32), True)
    machine.meet()
    rounds, errors = 4, []

    def host(rank: int) -> None:
        try:
            for turn in range(rounds):
                packed = machine.pack("k", out, turn * num_ranks + rank)
                machine.launch(rank, "k", 1, 32, 0, packed)
                machine.synchronize(rank)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=host, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert machine.fetch(0, out, 1, np.uint32)[0] == rounds * num_ranks
    assert not machine.report()


def test_a_deadlock_reaches_every_waiting_host() -> None:
    machine = Machine(2, patience=20_000)
    machine.load(PING_PONG)
    out = machine.place(0, np.zeros(1, np.uint32), True)
    errors: list[str] = []

    def host(rank: int) -> None:
        machine.launch(rank, "k", 1, 32, 0, machine.pack("k", out, 9 + rank))
        try:
            machine.synchronize(rank)
        except Fault as fault:
            errors.append(str(fault))

    threads = [threading.Thread(target=host, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(errors) == 2
    for error in errors:
        assert error.startswith("hang")
        assert "rank 0 block 0 warp 0" in error
        assert "rank 1 block 0 warp 0" in error


def test_a_host_polls_mapped_memory() -> None:
    machine = Machine(1, 0, "race")
    machine.load(PING_PONG)
    word = machine.place(0, np.zeros(1, np.uint32), True, "mapped")
    machine.launch(0, "k", 1, 32, 0, machine.pack("k", word, 5))
    for _ in range(3):
        machine.advance(0, 1000)
    assert machine.fetch(0, word, 1, np.uint32)[0] == 0
    machine.write(0, word, np.array([5], np.uint32))
    while machine.fetch(0, word, 1, np.uint32)[0] != 6:
        machine.advance(0, 1000)
    machine.synchronize(0)
    assert not machine.report()


def test_time_passes_for_kernels_with_a_timeout() -> None:
    body = """mov.u64 %d2, %globaltimer; add.u64 %d2, %d2, 100000000000; setp.ne.u32 %p0, %r0, 0;
    @%p0 bra end;
again: ld.acquire.sys.global.u32 %r2, [%d0]; setp.ne.u32 %p1, %r2, 0; @%p1 bra end;
    mov.u64 %d3, %globaltimer; setp.lt.u64 %p2, %d3, %d2; @%p2 bra again;
    st.global.u32 [%d0+4], 77;
end:"""
    got, _ = run(kernel(body), patience=50_000)
    assert got[1] == 77


def test_counts_of_bytes_and_instructions() -> None:
    machine = Machine(2)
    machine.load(kernel("st.global.u32 [%d1], %r0; ld.global.u32 %r1, [%d0];"))
    outs = [machine.place(rank, np.zeros(66, np.uint32), True) for rank in (0, 1)]
    machine.launch(0, "k", 1, 32, 0, machine.pack("k", outs[1], 0))
    machine.launch(1, "k", 1, 32, 0, machine.pack("k", outs[1], 0))
    machine.run()
    counts = machine.counts()["k"]
    assert counts["launches"] == 2
    assert counts["peer_written"] == counts["global_written"] == 128
    assert counts["peer_read"] == counts["global_read"] == 128
    assert machine.kernels()["k"]["opcodes"]["st.global.u32"] == 2


PIECES = {
    1: ("u8", "%r1"),
    2: ("u16", "%r1"),
    4: ("u32", "%r1"),
    8: ("u64", "%d9"),
    16: ("v4.u32", "{%r1, %r2, %r3, %r4}"),
}


def drawn_access(rng: random.Random, writes: float) -> tuple[str, range, bool]:
    """Return an instruction, the bytes of `out` that it accesses, and whether it writes."""
    width, is_write = rng.choice(list(PIECES)), rng.random() < writes
    begin = rng.randrange(48 // width) * width
    kind, value = PIECES[width]
    text = f"st.global.{kind} [%d0+{begin}], {value};"
    if not is_write:
        text = f"ld.global.{kind} {value}, [%d0+{begin}];"
    return text, range(begin, begin + width), is_write


def test_a_race_is_seen_exactly_where_bytes_overlap() -> None:
    """Accesses of all widths by three warps that nothing orders, after some that all know of."""
    rng = random.Random(0)
    num_found = [0, 0]
    for seed in range(150):
        past = "".join(drawn_access(rng, 0.5)[0] for _ in range(rng.randrange(4)))
        drawn = [[drawn_access(rng, 0.2) for _ in range(rng.randrange(1, 4))] for _ in range(3)]
        body = f"""mov.u64 %d9, 0; mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0; mov.u32 %r4, 0;
        setp.ne.u32 %p0, %r0, 0; @%p0 bra all; {past} all: bar.sync 0;
        rem.u32 %r9, %r0, 32; setp.ne.u32 %p0, %r9, 0; @%p0 bra end; shr.u32 %r8, %r0, 5;"""
        for warp, accesses in enumerate(drawn):
            texts = "".join(text for text, _, _ in accesses)
            body += f"setp.ne.u32 %p1, %r8, {warp}; @%p1 bra not{warp}; {texts} not{warp}:"
        is_expected = any(
            set(bytes_a) & set(bytes_b) and (writes_a or writes_b)
            for one, two in itertools.combinations(drawn, 2)
            for (_, bytes_a, writes_a), (_, bytes_b, writes_b) in itertools.product(one, two)
        )
        _, machine = run(kernel(body + "end:"), block=96, seed=seed, mode="race")
        kinds = {kind for kind, _ in machine.report()}
        assert kinds == ({"race"} if is_expected else set()), body
        num_found[is_expected] += 1
    assert min(num_found) > 30
