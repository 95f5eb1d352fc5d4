"""The house: imports go down the floors, importing is light, files are short."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ep_megatron"
# A module imports only from floors below its own; a name stands for the rooms inside it too.
FLOORS = [
    {"threads"},
    {
        "config",
        "handle",
        "_cpu",
        "_cuda",
        "_nvshmem",
        "streams",
        "hosts",
        "fp8",
        "logfmt",
        "sizes",
        "statistics",
        "backends.device",
        "backends.row_hashes",
        "backends.waiter",
    },
    {
        "layout",
        "casts",
        "live",
        "backends.base",
        "backends.network",
        "settings",
        "communicator",
        "elastic_handle",
        "scale",
    },
    {
        "arguments",
        "backends.meeting",
        "backends.casting",
        "backends.expert_major",
        "backends.gpu",
        "backends.packed",
        "scale_picture",
        "scale_routing",
        "recompute",
    },
    {
        "backends.arrival",
        "backends.host_share",
        "backends.checked_packed",
        "backends.checked_sums",
        "backends.device_arena",
        "backends.nvshmem",
        "backends.packed_message",
        "backends.packed_order",
        "backends.packed_report",
        "backends.packed_window",
        "packed_arguments",
    },
    {
        "backends.process_group",
        "backends.shared_memory",
        "backends.host_plan",
        "backends.wire",
        "backends.crossing",
        "backends.crossing_within",
        "backends.reach",
        "backends.device_rows",
        "backends.checked",
    },
    {
        "backends.device_links",
        "backends.device_meeting",
        "backends.host_counts",
        "backends.node_ends",
    },
    {"backends.device_calls", "backends.node_ways", "backends.packed_kernels"},
    {"backends.cuda_within", "backends.node_rows"},
    {
        "backends.hierarchical",
        "backends.cuda",
        "backends.packed_cuda",
        "backends.packed_group",
        "backends.packed_shared",
        "backends.nodes_within",
    },
    {"backends.cuda_nodes"},
    {"backends", "calls"},
    {"low_latency", "watched"},
    {"buffer"},
    {"autograd", "elastic", "ops", "pipeline.exchange"},
    {"experts", "deep_ep"},
    {"megatron"},
    {"pipeline.layer"},
    {"pipeline.duties"},
    {"pipeline.forward_backward"},
    {"train"},
    {"bench", "doctor", "soak"},
    {"cli_care"},
    {"cli"},
]
# The pipeline's rooms that are about schedules, not about tensors, share the lowest floors.
SCHEDULE_FLOORS = [
    {"pipeline", "pipeline.action", "pipeline.trace", "pipeline.profile"},
    {"pipeline.check", "pipeline.generators", "pipeline.costs", "pipeline.measures"},
    {"pipeline.schedule", "pipeline.program", "pipeline.cells"},
    {"pipeline.engine", "pipeline.picture", "pipeline.calibrate"},
    {"pipeline.simulate", "pipeline.page"},
    {"pipeline.plan"},
    {"pipeline.command"},
]
# Those that run schedules, as far as they know nothing of a Buffer.
RUNTIME_FLOORS = [
    {"pipeline.weight_grad", "pipeline.recompute"},
    {"pipeline.p2p", "pipeline.observer", "pipeline.prediction"},
    {"pipeline.nodes"},
    {"pipeline.placement", "pipeline.runtime"},
    {"pipeline.copies"},
]
for _other_floors in (SCHEDULE_FLOORS, RUNTIME_FLOORS):
    for _floor, _rooms in zip(FLOORS, _other_floors, strict=False):
        _floor |= _rooms
# Inside these one room may use another of the same floor, as long as nothing goes in circles.
WINGS = {"megatron", "train", "bench", "soak"}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
    }


def floor_of(name: str) -> int:
    for floor, names in enumerate(FLOORS):
        if name in names or name.split(".")[0] in names & WINGS:
            return floor
    raise AssertionError(f"{name} is on no floor of tests/test_imports.py")


def imports_of(path: Path) -> set[str]:
    """Return the rooms that a module names, lazily imported ones included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "ep_megatron":
                found |= {f"ep_megatron.{alias.name}" for alias in node.names}
            else:
                is_package = (PACKAGE.parent / Path(*node.module.split("."))).is_dir()
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                known = {f"ep_megatron.{name}" for name in modules()}
                found |= (inner & known if is_package else set()) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("ep_megatron.") for name in found if name.startswith("ep_megatron.")}


def test_imports_go_down() -> None:
    wrong = []
    for name, path in modules().items():
        for below in imports_of(path):
            same_wing = name.split(".")[0] == below.split(".")[0] and name.split(".")[0] in WINGS
            if not same_wing and floor_of(below) >= floor_of(name):
                wrong.append(f"{name} must not import {below}")
    assert not wrong


def test_nothing_goes_in_circles() -> None:
    graph = {name: imports_of(path) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name in done or name not in graph:
            return
        for below in graph[name] - {name}:
            visit(below, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_only_the_megatron_wing_imports_megatron_at_the_top() -> None:
    for name, path in modules().items():
        if name.split(".")[0] in ("megatron", "train"):
            continue
        for node in ast.parse(path.read_text()).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(n.split(".")[0] == "megatron" for n in names), name


def test_importing_the_package_needs_no_compiled_part_and_no_megatron() -> None:
    code = (
        "import sys; import ep_megatron; "
        "heavy = {'megatron', 'ep_megatron._cpu'}; names = heavy & set(sys.modules); "
        "assert not names, names"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_files_and_functions_are_short() -> None:
    for name, path in modules().items():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, f"{name} has {len(text.splitlines())} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docs = ast.get_docstring(node) or ""
                lines = (node.end_lineno or 0) - node.lineno - len(docs.splitlines())
                assert lines <= 80, f"{name}.{node.name} has {lines} lines"
