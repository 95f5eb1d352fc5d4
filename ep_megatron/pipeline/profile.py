"""How long the nodes of a model take on a machine, and what they hold: a file's content, checked.

All times are microseconds per micro-batch.
"""

from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Time = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ComputeTimes(_Section):
    """A compute node: forward, backward of inputs, backward of weights."""

    F: Time = 0.0
    I: Time = 0.0  # noqa: E741
    W: Time = 0.0


class ExchangeTimes(_Section):
    """Dispatch or combine: forward, and its adjoint in backward."""

    F: Time
    B: Time


class LayerProfile(_Section):
    """One kind of layer. Without dispatch and combine it is dense."""

    attention: ComputeTimes
    experts: ComputeTimes
    dispatch: ExchangeTimes | None = None
    combine: ExchangeTimes | None = None
    activation_bytes: Time = 0.0
    parameters: Time = 0.0
    """Of this rank whatever the expert-parallel size."""
    expert_parameters: Time = 0.0
    """Of all experts; each rank has its share."""

    @model_validator(mode="after")
    def _both_or_none(self) -> "LayerProfile":
        if (self.dispatch is None) != (self.combine is None):
            raise ValueError("expected dispatch and combine to be given both or neither")
        return self


class ExchangeProfile(_Section):
    """What the exchanges' times were measured with, and how they change with the ranks."""

    expert_parallel: Annotated[int, Field(ge=1)]
    bandwidths: dict[int, Positive] = {}
    """GB/s by expert-parallel size."""
    copies: dict[int, Positive] = {}
    """Of a token over that bandwidth, by expert-parallel size."""


class SmProfile(_Section):
    """Streaming multiprocessors: who has how many."""

    total: Annotated[int, Field(ge=1)]
    communication: Annotated[int, Field(ge=0)]
    """That the exchanges had when the times were measured."""
    sufficient: Annotated[int, Field(ge=1)]
    """With which the link is the limit; below it exchanges slow down in proportion."""
    reserved: bool = True
    """Compute leaves them alone always, or only while an exchange runs."""


class ChunkProfile(_Section):
    """A share 1 / (2 P) of the model as one node without exchanges."""

    F: Time
    I: Time  # noqa: E741
    W: Time
    FB: Time | None = None
    """A pair; F + I + W without."""


class Profile(_Section):
    """A model on a machine: layers with node times, or chunks."""

    name: str
    chunk: ChunkProfile | None = None
    layers: dict[str, LayerProfile] = {}
    pattern: list[str] = []
    """Kinds of the first layers; the others are of kind `rest`."""
    rest: str = ""
    num_layers: Annotated[int, Field(ge=0)] = 0
    embedding: ComputeTimes = ComputeTimes()
    head: ComputeTimes = ComputeTimes()
    embedding_parameters: Time = 0.0
    head_parameters: Time = 0.0
    p2p: Time = 0.0
    """A message between two pipeline ranks."""
    tokens_per_microbatch: Annotated[int, Field(ge=0)] = 0
    bytes_per_parameter: Time = 6.0
    kept_by_weights: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of activations held between I and W."""
    exchange: ExchangeProfile | None = None
    sms: SmProfile | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "Profile":
        if self.chunk is not None:
            if self.layers or self.num_layers:
                raise ValueError("expected either chunk or layers, got both")
            return self
        if not self.num_layers:
            raise ValueError("expected chunk, or layers with num_layers of at least 1")
        for kind in [*self.pattern, *([self.rest] if len(self.pattern) < self.num_layers else [])]:
            if kind not in self.layers:
                raise ValueError(
                    f"expected every layer to be one of {[*self.layers]}, got {kind!r}"
                )
        return self

    def layer_kinds(self) -> list[str]:
        """Return the kind of every layer."""
        rest = self.num_layers - len(self.pattern)
        return self.pattern[: self.num_layers] + [self.rest] * rest

    @property
    def expert_parallel_sizes(self) -> list[int]:
        """Sizes of the expert-parallel group that the exchanges can be stated for."""
        if self.exchange is None:
            return []
        known = self.exchange.bandwidths.keys() & self.exchange.copies.keys()
        return sorted(known | {self.exchange.expert_parallel})

    def exchange_scale(self, expert_parallel: int | None) -> float:
        """Return how much longer exchanges take with another size of the group.

        Raises:
            ValueError: when the profile cannot say.
        """
        if expert_parallel is None or (
            self.exchange is not None and expert_parallel == self.exchange.expert_parallel
        ):
            return 1.0
        if self.exchange is None or expert_parallel not in self.expert_parallel_sizes:
            raise ValueError(
                f"simulate: expected expert_parallel to be one of {self.expert_parallel_sizes} "
                f"for profile {self.name!r}, got {expert_parallel}"
            )
        per_token = {
            size: self.exchange.copies[size] / self.exchange.bandwidths[size]
            for size in (expert_parallel, self.exchange.expert_parallel)
        }
        return per_token[expert_parallel] / per_token[self.exchange.expert_parallel]


PROFILES = tuple(sorted(p.stem for p in (Path(__file__).parent / "profiles").glob("*.yaml")))
"""Names of the built-in ones."""


def load_profile(source: str | Path) -> Profile:
    """Read a profile: a built-in name, or a YAML or JSON file.

    Raises:
        ValueError: names the file, the key and what is wrong with it.
    """
    if str(source) in PROFILES:
        return _built_in(str(source))
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"load_profile: expected profile to be a file or one of {', '.join(PROFILES)}, "
            f"got {str(source)!r}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"load_profile: expected {path} to be YAML or JSON, got {error}") from None
    return make_profile(content, str(path))


def make_profile(content: Any, where: str) -> Profile:
    """Check a profile's content.

    Raises:
        ValueError: names `where`, the key and what is wrong with it.
    """
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "profile"
        raise ValueError(
            f"load_profile: {where}: {key}: {first['msg']}, got {str(first['input'])[:80]}"
        ) from None


@cache
def _built_in(name: str) -> Profile:
    path = Path(__file__).parent / "profiles" / f"{name}.yaml"
    return make_profile(yaml.safe_load(path.read_text(encoding="utf-8")), path.name)
