"""Weaken or drop each synchronising instruction of a kernel, and see whether anything notices."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

# What to look for in a line of PTX, what to put in its place, and what to call that.
RULES = [
    (r"\bst\.release\.(sys|gpu|cta)", r"st.relaxed.\1", "release to relaxed"),
    (r"\bred\.release\.(sys|gpu|cta)", r"red.relaxed.\1", "release to relaxed"),
    (
        r"\batom\.(?:acq_rel|release|acquire)\.(sys|gpu|cta)",
        r"atom.relaxed.\1",
        "atomic to relaxed",
    ),
    (r"\bld\.acquire\.(sys|gpu|cta)", r"ld.relaxed.\1", "acquire to relaxed"),
    (r"\b(st\.release|ld\.acquire|red\.release|fence\.acq_rel)\.sys", r"\1.gpu", "sys to gpu"),
    (r"\b(st\.release|ld\.acquire|red\.release|fence\.acq_rel)\.gpu", r"\1.cta", "gpu to cta"),
    (r"^\s*(?:@!?%p\d+\s+)?bar\.warp\.sync[^;]*;", ";", "drop warp barrier"),
    (r"^\s*(?:@!?%p\d+\s+)?(?:bar|barrier)(?:\.cta)?\.(?:sync|arrive)[^;]*;", ";", "drop barrier"),
    (
        r"^\s*(?:bar|barrier)(?:\.cta)?\.red\.(?:and|or)\.pred\s+([^,\s]+)\s*,\s*\S+\s*,\s*([^;,]+);",
        r"mov.pred \1, \2;",
        "drop barrier with vote",
    ),
    (r"^\s*fence\.proxy[^;]*;", ";", "drop proxy fence"),
    (r"^\s*(?:fence\.(?:acq_rel|sc)|membar)\.[^;]*;", ";", "drop fence"),
    (r"^\s*cp\.async\.bulk\.wait_group[^;]*;", ";", "drop bulk wait"),
    (r"cp\.async\.bulk\.wait_group\s", "cp.async.bulk.wait_group.read ", "wait for reads only"),
    (
        r"mbarrier\.(?:try|test)_wait\S*\s+([^,\s]+)\s*,[^;]*;",
        r"setp.eq.u32 \1, 0, 0;",
        "drop mbarrier wait",
    ),
]


@dataclass(frozen=True)
class Mutant:
    """One changed line. `source` is the .cu line that the PTX names."""

    change: str
    line: int
    before: str
    source: str
    text: str


def mutants(ptx: str, kernel: str) -> Iterator[Mutant]:
    """Yield one mutant per synchronising instruction and rule that fits."""
    lines = ptx.split("\n")
    begin = next(i for i, line in enumerate(lines) if re.search(rf"\.entry {kernel}\b", line))
    end = next((i for i in range(begin + 1, len(lines)) if ".entry" in lines[i]), len(lines))
    source = ""
    for i in range(begin, end):
        if located := re.match(r"\s*\.loc\s+\d+ (\d+) \d+(?:.*inlined_at \d+ (\d+))?", lines[i]):
            source = located[2] or located[1]
        for pattern, replacement, change in RULES:
            if re.search(pattern, lines[i]):
                changed = [*lines]
                changed[i] = re.sub(pattern, replacement, lines[i], count=1)
                yield Mutant(change, i + 1, lines[i].strip(), source, "\n".join(changed))


@dataclass(frozen=True)
class Verdict:
    mutant: Mutant
    noticed: str  # what told us, or "" for a survivor


def judge(
    ptx: str,
    kernel: str,
    run: Callable[[str, int, str], set[str]],
    seeds: range,
    without: Collection[str] = (),
) -> list[Verdict]:
    """Run every mutant until something notices it.

    Args:
        ptx: the module's text.
        kernel: which kernel to change.
        run: (text, seed, mode) -> what was noticed: kinds of reports, "data", "fault", "hang".
            It must find nothing in the text as it is, which is tried with the first seed.
        seeds: tried in turn, each in race and in weak mode.
        without: changes that are left out.
    """
    for mode in ("race", "weak"):
        found = run(ptx, seeds[0], mode)
        assert not found, f"{kernel} as it is, in {mode} mode: {found}"
    verdicts = []
    for mutant in mutants(ptx, kernel):
        if mutant.change in without:
            continue
        noticed = ""
        for seed in seeds:
            for mode in ("race", "weak"):
                found = run(mutant.text, seed, mode)
                if found:
                    noticed = f"{mode}: {', '.join(sorted(found))}"
                    break
            if noticed:
                break
        verdicts.append(Verdict(mutant, noticed))
    return verdicts


def table(verdicts: list[Verdict]) -> str:
    """Return one line per mutant and the score."""
    lines = [
        f"ptx:{v.mutant.line:5d} cu:{v.mutant.source:4s} {v.mutant.change:20s} "
        f"{v.mutant.before[:56]:56s} {v.noticed or 'SURVIVED'}"
        for v in verdicts
    ]
    killed = sum(bool(v.noticed) for v in verdicts)
    return "\n".join([*lines, f"{killed} of {len(verdicts)} mutants noticed"])
