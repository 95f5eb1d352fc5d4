"""The common ground of all sections of a training config."""

import re
from typing import get_origin

from pydantic import BaseModel, ConfigDict


def to_key(name: str) -> str:
    """Return the config key of a field: `num_layers` is written `num-layers`."""
    return name.replace("_", "-")


class Section(BaseModel):
    """A section of a config: unknown keys are errors, docstrings of fields are their help."""

    model_config = ConfigDict(
        extra="forbid",
        alias_generator=to_key,
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def describe_keys(section: type[Section]) -> list[tuple[str, str, str, str]]:
    """Return (key, values, default, meaning) of each key of a section, as text."""
    rows = []
    for name, field in section.model_fields.items():
        kind = str(field.annotation) if get_origin(field.annotation) else _name(field.annotation)
        for noise in ("typing.", "pathlib.", "<class '", "'>", "Literal"):
            kind = kind.replace(noise, "")
        kind = re.sub(r"Annotated\[(\w+), [^\]]*\]", r"\1", kind).replace(" | None", "")
        default = "(needed)" if field.is_required() else str(field.default)
        rows.append((to_key(name), kind, default, field.description or ""))
    return rows


def _name(annotation: object) -> str:
    return getattr(annotation, "__name__", str(annotation))
