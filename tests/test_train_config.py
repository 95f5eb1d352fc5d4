"""Configs: files and command lines in, checked values or errors that help out."""

from pathlib import Path
from typing import Any

import pytest

from ep_megatron.train.config import SECTIONS, Config, load_config, make_config, parse_overrides
from ep_megatron.train.section import describe_keys, to_key

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "num-layers": 4,
    "hidden-size": 64,
    "num-attention-heads": 4,
    "seq-length": 64,
    "micro-batch-size": 1,
    "global-batch-size": 4,
    "train-iters": 3,
    "lr": 1e-3,
    "num-experts": 16,
    "expert-model-parallel-size": 2,
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_valid_config(path: Path) -> None:
    config = load_config(path)
    config.check_world_size(config.num_processes or config.model_parallel_size)
    assert config.moe_token_dispatcher == "deepep"
    assert config.run_dir == Path("runs") / path.stem
    assert config.save == config.run_dir / "checkpoints"


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [
        ("moe-router-topkk", 4, "moe-router-topk"),
        ("num_layers", 3, "num-layers"),
        ("moe-token-dispatcher-typ", "deepep", "moe-token-dispatcher-type"),
        ("expert-parallel-size", 2, "expert-model-parallel-size"),
    ],
)
def test_an_unknown_key_is_named_with_its_value_and_the_nearest_key(
    key: str, value: object, near: str
) -> None:
    with pytest.raises(ValueError, match="expected a known key") as error:
        make_config({**SMALL, key: value})
    assert repr(key) in str(error.value)
    assert repr(value) in str(error.value)
    assert near in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe-token-dispatcher", "deep"),
        ("num-layers", "many"),
        ("num-layers", 0),
        ("lr", -1.0),
        ("bf16", "perhaps"),
        ("ep-backend", "nccl"),
        ("moe-layer-freq", "[0]*1+[2]*3"),
    ],
)
def test_an_impossible_value_is_named_with_its_key(key: str, value: object) -> None:
    with pytest.raises(ValueError, match="config") as error:
        make_config({**SMALL, key: value})
    assert key in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num-experts": 15}, ["num-experts", "expert-model-parallel-size (2)", "15"]),
        ({"moe-router-topk": 17}, ["moe-router-topk", "num-experts (16)", "17"]),
        ({"moe-layer-freq": "[0]*1+[1]*2"}, ["moe-layer-freq", "num-layers (4)", "3"]),
        ({"num-attention-heads": 3}, ["hidden-size", "num-attention-heads (3)", "64"]),
        ({"num-processes": 3}, ["num-processes", "multiple of 2", "3"]),
        ({"num-processes": 2, "global-batch-size": 3}, ["global-batch-size", "multiple of 2", "3"]),
        ({"num-experts": None}, ["num-experts", "expert-model-parallel-size", "2"]),
        ({"data-path": "a", "text-path": "b"}, ["data-path", "text-path"]),
        ({"lr-warmup-iters": 3}, ["lr-warmup-iters", "lr-decay-iters (3", "got 3"]),
        ({"min-lr": 0.1}, ["min-lr", "lr (0.001)", "0.1"]),
        ({"lr-decay-style": "WSD"}, ["lr-wsd-decay-iters", "WSD"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_that_do_not_fit_together_are_named(
    values: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        make_config({**SMALL, **values})
    for word in words:
        assert word in str(error.value)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ValueError, match="moe-router-topk") as error:
        make_config({**SMALL, "lr": 0, "moe-router-topk": -1, "nonsense": 1})
    assert "lr" in str(error.value)
    assert "nonsense" in str(error.value)


def test_the_command_line_is_stronger_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    lines = [f"{key}: {value}" for key, value in SMALL.items()]
    file.write_text("\n".join([*lines, "moe-token-dispatcher-type: allgather"]))
    words = ["--num-layers", "2", "--bf16", "--lr=1e-4", "--moe-layer-freq", "[0]*1+[1]*1"]
    config = load_config(file, [*words, "--moe-token-dispatcher-type", "alltoall"])
    assert (config.num_layers, config.bf16, config.lr) == (2, True, 1e-4)
    assert config.moe_layer_freq == [0, 1]
    assert config.moe_token_dispatcher == "alltoall"
    assert load_config(file).moe_token_dispatcher == "allgather"


def test_a_stray_word_on_the_command_line_is_an_error() -> None:
    assert parse_overrides(["--bf16", "--lr", "1"]) == {"bf16": True, "lr": 1}
    with pytest.raises(ValueError, match="'4'"):
        parse_overrides(["--num-layers", "3", "4"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", ""], ids=["list", "broken", "empty"])
def test_a_file_that_is_no_mapping_is_an_error(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        load_config(file)
    with pytest.raises(ValueError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, 2),
        ({"expert-model-parallel-size": 4}, 4),
        ({"pipeline-model-parallel-size": 2}, 4),
        ({"tensor-model-parallel-size": 2}, 2),
        ({"tensor-model-parallel-size": 4, "expert-tensor-parallel-size": 2}, 4),
    ],
)
def test_the_number_of_processes_is_what_the_parallel_sizes_need(
    sizes: dict[str, int], expected: int
) -> None:
    assert make_config({**SMALL, **sizes}).model_parallel_size == expected


@pytest.mark.megatron
def test_the_full_size_example_is_a_valid_megatron_config() -> None:
    pytest.importorskip("megatron.core")
    from ep_megatron.megatron.host import without_cuda
    from ep_megatron.megatron.plugin import install, uninstall
    from ep_megatron.train.model import num_virtual_stages, transformer_config

    # Its layers come from Transformer Engine, which need not be installed to check the rest.
    path = Path(__file__).parents[1] / "examples" / "deepseek_v3.yaml"
    config = load_config(path, ["--transformer-impl", "local"])
    config.check_world_size(256)
    assert num_virtual_stages(config) == 2
    with without_cuda():
        install()
        try:
            checked = transformer_config(config)
        finally:
            uninstall()
    assert (checked.num_moe_experts, checked.moe_router_topk) == (256, 8)
    assert checked.moe_layer_freq == [0] * 3 + [1] * 58
    assert (checked.layernorm_epsilon, checked.q_lora_rank) == (1e-6, 1536)
    stages = checked.pipeline_model_parallel_layout.layout
    assert [len(chunk) for chunk in stages[0]] == [4, 2]
    assert sum(len(chunk) for stage in stages for chunk in stage) == 1 + 61 + 1 + 1


def test_rows_travel_as_fp8_only_where_they_can() -> None:
    moe = {**SMALL, "num-experts": 4, "hidden-size": 128}
    assert make_config(moe).moe_dispatch_dtype == "bf16"
    asked = make_config({**moe, "moe-dispatch-dtype": "fp8", "moe-combine-grad-dtype": "mxfp8"})
    assert (asked.moe_dispatch_dtype, asked.moe_combine_grad_dtype) == ("fp8", "mxfp8")
    for key in ("moe-dispatch-dtype", "moe-combine-grad-dtype"):
        for changes, match in (
            ({key: "fp4"}, f"{key}: .*'bf16', 'fp8' or 'mxfp8'.*got 'fp4'"),
            ({key: "fp8", "hidden-size": 64}, f"hidden-size .* 128 for {key} fp8, got 64"),
            ({key: "mxfp8", "hidden-size": 8}, f"hidden-size .* 32 for {key} mxfp8, got 8"),
            (
                {**{"expert-model-parallel-size": 1}, key: "fp8", "num-experts": None},
                f"deepep for {key} fp8, got none",
            ),
            ({key: "fp8", "moe-token-dispatcher": "alltoall"}, f"{key} fp8, got alltoall"),
        ):
            with pytest.raises(ValueError, match=match):
                make_config({**moe, **changes})
    with pytest.raises(ValueError, match="did you mean moe-dispatch-dtype"):
        make_config({**moe, "moe-dispach-dtype": "fp8"})


def test_every_key_has_a_meaning() -> None:
    rows = [row for section in SECTIONS for row in describe_keys(section)]
    assert {row[0] for row in rows} == {to_key(name) for name in Config.model_fields}
    assert all(meaning for *_, meaning in rows)
