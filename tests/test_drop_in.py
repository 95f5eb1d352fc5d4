"""`import deep_ep` finds this package where asked, and unmodified Megatron trains with it."""

import subprocess
import sys
import tempfile
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.megatron_gpt import Case, Layout, model_parallel, train
from tests.ranks import fresh_processes

ENABLE = "from ep_megatron import deep_ep; deep_ep.enable(); "


def run(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    path = "".join(f"import sys; sys.path.insert(0, {str(folder)!r}); " for folder in folders)
    return subprocess.run(
        [sys.executable, "-c", path + code], capture_output=True, text=True, timeout=300
    )


def real_one(folder: Path) -> Path:
    """Stand for an installed DeepEP."""
    (folder / "deep_ep").mkdir()
    (folder / "deep_ep" / "__init__.py").write_text("Buffer = 'the real one'\n")
    return folder


def test_every_path_by_which_callers_import_is_there() -> None:
    code = ENABLE + (
        "deep_ep.enable(); "
        "import deep_ep as d; from deep_ep import Buffer, Config, topk_idx_t; "
        "from deep_ep.utils import EventHandle, EventOverlap; "
        "from deep_ep.utils.event import EventOverlap as Again; "
        "from deep_ep.utils.math import align, per_token_cast_to_fp8; "
        "from deep_ep.buffers.legacy import Buffer as Legacy; "
        "import importlib.util, ep_megatron; "
        "assert importlib.util.find_spec('deep_ep') is not None; "
        "assert d.Buffer is Buffer is Legacy is ep_megatron.Buffer; "
        "assert d.EventOverlap is EventOverlap is Again is ep_megatron.EventOverlap; "
        "assert align(5, 4) == 8; "
        "assert d.utils.event.EventHandle is EventHandle"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_enables_nothing() -> None:
    result = run("import ep_megatron.deep_ep; import deep_ep")
    assert "No module named 'deep_ep'" in result.stderr


def test_a_real_one_is_shadowed_only_when_asked(tmp_path: Path) -> None:
    real = real_one(tmp_path)
    result = run(ENABLE, real)
    assert "expected no DeepEP, got an installed one" in result.stderr
    result = run("import deep_ep; " + ENABLE, real)
    assert "expected no DeepEP, got an installed one" in result.stderr
    code = "from ep_megatron import deep_ep as ours; ours.enable(replace=True); import deep_ep; "
    result = run("import deep_ep; " + code + "print(deep_ep.Buffer)", real)
    assert result.stdout == "<class 'ep_megatron.buffer.Buffer'>\n", result.stderr


def test_a_script_runs_as_it_is(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; from deep_ep import Buffer; print(__name__, sys.argv[1:])")
    command = [sys.executable, "-m", "ep_megatron.deep_ep", str(script), "--flag"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout == "__main__ ['--flag']\n", result.stderr


@pytest.mark.megatron
def test_a_late_call_says_so() -> None:
    result = run("import megatron.core.transformer.moe.fused_a2a; " + ENABLE)
    assert "expected to be called before megatron.core's MoE modules" in result.stderr


def _train(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    from ep_megatron import deep_ep

    deep_ep.enable()
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), 2, rank)
    layout, num_steps = Layout(ep=2), 8
    with model_parallel(layout):
        from megatron.core.transformer.moe import fused_a2a

        cases = [Case("flex", {"moe_flex_dispatcher_backend": "deepep"}, num_steps=num_steps)]
        cases.append(Case("alltoall", num_steps=num_steps))
        losses = [train(layout, case) for case in cases]
        assert type(fused_a2a._buffer).__module__ == "ep_megatron.buffer"
    pipe.send(losses)
    pipe.recv()


@pytest.mark.megatron
def test_unmodified_megatron_trains_to_the_losses_of_alltoall() -> None:
    context, store = fresh_processes(), tempfile.mkdtemp(prefix="ep_drop_in_") + "/store"
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=_train, args=(rank, store, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    try:
        for ours, _ in pipes:
            assert ours.poll(300), "no answer"
            with_deep_ep, with_alltoall = ours.recv()
            assert with_deep_ep == with_alltoall
            assert with_deep_ep[-1] < with_deep_ep[0]
    finally:
        for process in processes:
            process.kill()
            process.join()
