"""Config and data files of any content: an error that says which, or a config that is sound."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ep_megatron.train.checkpoint import latest_iteration
from ep_megatron.train.config import Config, load_config, make_config, parse_overrides
from ep_megatron.train.section import to_key
from tests.test_train_config import SMALL

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
KEYS = sorted(to_key(name) for name in Config.model_fields)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 5)
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["[0]*1+[1]*3", "[0]*9999999999", "1e400", "0x10", "deepep", "/dev/null"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner)
)


def error_of(action: Callable[[], object]) -> str:
    """Return the text of the ValueError; no other error may come."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_value_of_any_key_is_taken_or_named(values: dict[str, Any]) -> None:
    text = error_of(lambda: make_config({**SMALL, **values}))
    if text:
        assert text.startswith("config values: ")
        assert "expected" in text or any(f"{key}: " in text for key in values)
        return
    config = make_config({**SMALL, **values})
    assert config.num_layers >= 1
    assert config.hidden_size >= 1
    assert math.isfinite(config.lr)


@FUZZ
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_as_a_config_are_an_error_that_names_the_file(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "any.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"any\.yaml|config"):
        load_config(file)


def test_deeply_nested_yaml_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "deep.yaml"
    file.write_text("[" * 5000)
    with pytest.raises(ValueError, match=r"deep\.yaml"):
        load_config(file)


@FUZZ
@given(st.lists(st.text(max_size=8) | st.sampled_from(["--lr", "--", "--=", "--bf16"]), max_size=4))
def test_any_words_of_a_command_line(words: list[str]) -> None:
    text = error_of(lambda: parse_overrides(words))
    if text:
        assert "command line: expected a key" in text
        return
    values = parse_overrides(words)
    assert all(isinstance(key, str) for key in values)
    yaml.safe_dump(sorted(values))


@pytest.mark.parametrize("text", ["many", "", "-4", "1e3", "\0\0\0\0"])
def test_a_damaged_name_of_the_latest_checkpoint_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(ValueError, match=r"checkpoint: expected .* to hold a number, got "):
        latest_iteration(tmp_path)
    assert latest_iteration(tmp_path / "none") is None


@pytest.mark.megatron
def test_damaged_data_files_are_named(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    from ep_megatron.train.data import _num_documents
    from ep_megatron.train.text import make_tokenizer, prepare_text
    from tests.test_train_data import _config

    (tmp_path / "in.txt").write_text("one line after another\n" * 50)
    config = _config(tmp_path, text_path=str(tmp_path / "in.txt"))
    prefix = prepare_text(config, make_tokenizer(config))
    assert _num_documents(prefix) == 1
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    whole = idx.read_bytes(), data.read_bytes()

    def refuse(path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"data: expected .*make them anew"):
            _num_documents(prefix)
        idx.write_bytes(whole[0])
        data.write_bytes(whole[1])

    for length in range(0, len(whole[0]), 7):
        refuse(idx, whole[0][:length])
    for length in (0, 1, len(whole[1]) - 1):
        refuse(data, whole[1][:length])
    for at in range(18):  # the head: what it is, its version, its dtype
        spoilt = bytearray(whole[0])
        spoilt[at] ^= 0x80
        refuse(idx, bytes(spoilt))
    with pytest.raises(ValueError, match="data: expected"):
        _num_documents(str(tmp_path / "absent"))
    assert _num_documents(prefix) == 1
