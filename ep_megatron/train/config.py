"""A training config: YAML file and command line in, checked values out.

Keys are Megatron's argument names. Every key can be overridden on the command line in Megatron's
own form, `--num-layers 4` or `--num-layers=4`; a flag without a value means true.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from ep_megatron.fp8 import wire_recipe
from ep_megatron.train.model_arguments import (
    MLAArguments,
    ModelArguments,
    MoEArguments,
    RecomputeArguments,
)
from ep_megatron.train.pipeline import check_microbatches, check_pipeline
from ep_megatron.train.run_arguments import (
    DataArguments,
    ParallelArguments,
    RunArguments,
    TrainingArguments,
)
from ep_megatron.train.section import Section, to_key

# Megatron's own spelling of a key -> ours.
_SYNONYMS = {"moe-token-dispatcher-type": "moe-token-dispatcher"}


class Config(
    ModelArguments,
    MLAArguments,
    MoEArguments,
    RecomputeArguments,
    ParallelArguments,
    TrainingArguments,
    DataArguments,
    RunArguments,
):
    """All keys of a training run, checked against each other as far as one process can."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model, experts included."""
        dense = self.tensor_model_parallel_size * self.context_parallel_size
        expert = self.expert_tensor_parallel_size * self.expert_model_parallel_size
        return self.pipeline_model_parallel_size * math.lcm(dense, expert)

    def data_parallel_size(self, world_size: int) -> int:
        """Return how many ranks read different data when `world_size` processes train."""
        return world_size // (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    def check_world_size(self, world_size: int) -> None:
        """Raise ValueError if `world_size` processes cannot train this config."""
        if world_size % self.model_parallel_size:
            raise ValueError(
                f"config: expected num-processes to be a multiple of {self.model_parallel_size} "
                f"(what the parallel sizes need), got {world_size}"
            )
        batch = self.micro_batch_size * self.data_parallel_size(world_size)
        if self.global_batch_size % batch:
            raise ValueError(
                f"config: expected global-batch-size to be a multiple of {batch} (micro-batch-size "
                f"{self.micro_batch_size} x {batch // self.micro_batch_size} data-parallel ranks), "
                f"got {self.global_batch_size}"
            )
        check_microbatches(self, self.global_batch_size // batch)

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        _divides(self, "num_attention_heads", "tensor_model_parallel_size")
        if self.num_query_groups:
            _divides(self, "num_attention_heads", "num_query_groups")
        if not self.multi_latent_attention and self.kv_channels is None:
            _divides(self, "hidden_size", "num_attention_heads")
        if self.num_experts is None:
            if self.expert_model_parallel_size > 1:
                raise ValueError(
                    "expected num-experts to be given when expert-model-parallel-size is "
                    f"{self.expert_model_parallel_size}, got none"
                )
        else:
            _divides(self, "num_experts", "expert_model_parallel_size")
            if self.moe_router_topk > self.num_experts:
                raise ValueError(
                    f"expected moe-router-topk to be at most num-experts ({self.num_experts}), "
                    f"got {self.moe_router_topk}"
                )
        _check_wire(self)
        pattern = self.moe_layer_freq
        if isinstance(pattern, list) and len(pattern) != self.num_layers:
            raise ValueError(
                f"expected moe-layer-freq to name num-layers ({self.num_layers}) layers, "
                f"got {len(pattern)}"
            )
        _check_schedule(self)
        check_pipeline(self)
        if self.data_path and self.text_path:
            raise ValueError(
                f"expected either data-path or text-path, got both ({' '.join(self.data_path)} "
                f"and {self.text_path})"
            )
        if self.num_processes is not None:
            self.check_world_size(self.num_processes)
        return self


# The sections a config is made of, in the order in which they are listed to users.
SECTIONS: tuple[type[Section], ...] = Config.__bases__


def _check_wire(config: Config) -> None:
    for key in ("moe_dispatch_dtype", "moe_combine_grad_dtype"):
        recipe = wire_recipe(getattr(config, key))
        if recipe is None:
            continue
        what = f"{to_key(key)} {getattr(config, key)}"
        if config.num_experts is None or config.moe_token_dispatcher != "deepep":
            actual = "none" if config.num_experts is None else config.moe_token_dispatcher
            raise ValueError(f"expected moe-token-dispatcher deepep for {what}, got {actual}")
        if config.hidden_size % recipe.block:
            raise ValueError(
                f"expected hidden-size to be a multiple of {recipe.block} for {what}, got "
                f"{config.hidden_size}"
            )


def _check_schedule(config: Config) -> None:
    decay_iters = config.lr_decay_iters or config.train_iters
    if config.lr_warmup_iters >= decay_iters:
        raise ValueError(
            f"expected lr-warmup-iters to be less than lr-decay-iters ({decay_iters}; train-iters "
            f"when left out), got {config.lr_warmup_iters}"
        )
    if config.min_lr > config.lr:
        raise ValueError(f"expected min-lr to be at most lr ({config.lr}), got {config.min_lr}")
    if config.lr_decay_style == "WSD" and config.lr_wsd_decay_iters is None:
        raise ValueError("expected lr-wsd-decay-iters to be given for lr-decay-style WSD, got none")


def _divides(config: Config, whole: str, part: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ValueError(
            f"expected {to_key(whole)} to be a multiple of {to_key(part)} "
            f"({getattr(config, part)}), got {getattr(config, whole)}"
        )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config; not collective.

    Args:
        path: YAML file that maps keys to values.
        overrides: command-line words such as `["--num-layers", "4", "--bf16"]`, stronger than the
            file.

    Returns:
        The checked config, with `run_dir`, `save` and `tensorboard_dir` filled in.

    Raises:
        ValueError: a key is unknown, a value is impossible, or the file is not a mapping; the
            message names the key, the value and, for an unknown key, the nearest valid ones.
    """
    if not path.is_file():
        raise ValueError(f"config: expected {path} to be a YAML file, got no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"config: expected {path} to be YAML, got {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"config: expected {path} to map keys to values, got {values!r}")
    config = make_config({**values, **parse_overrides(overrides)}, source=str(path))
    run_dir = config.run_dir or Path("runs") / path.stem
    return config.model_copy(
        update={
            "run_dir": run_dir,
            "save": config.save or run_dir / "checkpoints",
            "tensorboard_dir": config.tensorboard_dir or run_dir / "tensorboard",
        }
    )


def make_config(values: Mapping[str, Any], source: str = "values") -> Config:
    """Check `values` (key -> value, as in a YAML file); errors as in `load_config`."""
    values = {_SYNONYMS.get(str(key), str(key)): value for key, value in values.items()}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors(include_url=False)]
        raise ValueError(f"config {source}: " + "\n  and: ".join(problems)) from None


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Return the keys and values of `--key value`, `--key=value` and `--flag` words.

    Values are read as YAML. Raises ValueError for a word that belongs to no key.
    """
    values: dict[str, Any] = {}
    waiting: str | None = None
    for word in words:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            key = _SYNONYMS.get(key, key)
            values[key] = _read(text) if equals else True
            waiting = None if equals else key
        elif waiting is not None:
            values[waiting] = _read(word)
            waiting = None
        else:
            raise ValueError(
                f"command line: expected a key such as --num-layers, got {word!r}; write a list "
                "as one quoted word"
            )
    return values


def _read(text: str) -> Any:
    """Return a command-line value as YAML reads it; text that is no YAML, as it stands."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError):
        return text


def _describe(problem: Any) -> str:
    key = str(problem["loc"][0]) if problem["loc"] else ""
    value = problem["input"]
    if problem["type"] == "extra_forbidden":
        keys = [to_key(name) for name in Config.model_fields]
        near = difflib.get_close_matches(key.replace("_", "-"), [*keys, *_SYNONYMS], n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "`--keys` lists them all"
        return f"expected a known key, got {key!r} (value {value!r}); {advice}"
    if problem["type"] == "missing":
        return f"expected the key {key!r} to be given, got none"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, got {value!r}" if key else message
