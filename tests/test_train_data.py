"""Text of any kind -> Megatron's datasets -> the microbatches of each rank."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from ep_megatron.train.config import Config, make_config
from ep_megatron.train.text import (
    documents,
    make_tokenizer,
    prepare_text,
    text_files,
    unigram_entropy,
)
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron


def _config(folder: Path, **values: Any) -> Config:
    return make_config(
        {
            "num-layers": 1,
            "hidden-size": 8,
            "num-attention-heads": 1,
            "seq-length": 16,
            "micro-batch-size": 2,
            "global-batch-size": 4,
            "train-iters": 3,
            "lr": 1e-3,
            "data-cache-path": str(folder / "cache"),
            **{key.replace("_", "-"): value for key, value in values.items()},
        }
    )


def _read(prefix: str) -> list[bytes]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return [bytes(dataset[i].astype("uint8")) for i in range(len(dataset))]


def test_each_file_of_a_folder_becomes_one_document_of_its_bytes(tmp_path: Path) -> None:
    texts = {"a.txt": "one", "sub/b.md": "zw\u00f6lf", "c.bin": "no text", "empty.txt": ""}
    for name, text in texts.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text, encoding="utf-8")
    config = _config(tmp_path, text_path=str(tmp_path / "in"))
    prefix = prepare_text(config, make_tokenizer(config))
    assert sorted(_read(prefix)) == [b"one\0", "zw\u00f6lf\0".encode()]


def test_each_line_of_a_jsonl_file_becomes_one_document(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(json.dumps({"body": text}) for text in ("one", "two\n2")) + "\n\n")
    config = _config(tmp_path, text_path=str(file), json_key="body")
    prefix = prepare_text(config, make_tokenizer(config))
    assert sorted(_read(prefix)) == [b"one\0", b"two\n2\0"]


@pytest.mark.parametrize("line", ["{broken", '{"other": "x"}', "[1]"])
def test_a_bad_jsonl_line_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "good"}\n' + line)
    with pytest.raises(ValueError, match=r"in\.jsonl:2"):
        list(documents([file], "text"))


def test_a_long_file_is_cut_at_line_ends_into_documents(tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    text = "".join(f"line {i} of many\n" for i in range(10_000))
    file.write_text(text + "x" * 100_000)
    parts = list(documents([file], "text"))
    assert "".join(parts) == text + "x" * 100_000
    assert max(map(len, parts)) <= 2 * 32_768
    assert len(parts) > 5
    assert all(part.endswith("\n") for part in parts[:4])


def test_text_is_tokenised_once_until_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    file.write_text("abc")
    config = _config(tmp_path, text_path=str(file))
    tokenizer = make_tokenizer(config)
    first = prepare_text(config, tokenizer)
    written = Path(first + ".bin").stat().st_mtime_ns
    assert prepare_text(config, tokenizer) == first
    assert Path(first + ".bin").stat().st_mtime_ns == written
    file.write_text("abcd")
    second = prepare_text(config, tokenizer)
    assert second != first
    assert _read(second) == [b"abcd\0"]


def test_without_a_path_the_text_is_that_of_pythons_own_library(tmp_path: Path) -> None:
    files = text_files(_config(tmp_path))
    names = {file.name for file in files}
    assert {"argparse.py", "topics.py"} <= names
    assert not any("site-packages" in file.parts or "test" in file.parts for file in files)
    assert sum(file.stat().st_size for file in files) > 3_000_000


def test_a_path_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text-path"):
        text_files(_config(tmp_path, text_path=str(tmp_path / "absent")))


def test_unigram_entropy_is_that_of_the_token_frequencies(tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    file.write_text("aab" * 5)  # and one end of document
    config = _config(tmp_path, text_path=str(file))
    prefix = prepare_text(config, make_tokenizer(config))
    expected = -sum(n / 16 * math.log(n / 16) for n in (10, 5, 1))
    assert unigram_entropy([prefix]) == pytest.approx(expected, rel=1e-12)


def _read_microbatches(
    rank: int, folder: str, first_sample: int, count: int
) -> list[list[list[int]]]:
    from megatron.core import parallel_state

    from ep_megatron.train.data import batches, build_data

    config = _config(Path(folder), text_path=f"{folder}/in.txt", eval_iters=0)
    parallel_state.initialize_model_parallel()
    try:
        data = build_data(config)
        taken = list(itertools.islice(batches(data.train, config, first_sample), count))
    finally:
        parallel_state.destroy_model_parallel()
    for batch in taken:
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        assert batch["loss_mask"].shape == (2, 16)
    return [batch["tokens"].tolist() for batch in taken]


def test_ranks_share_the_samples_and_can_start_anywhere(tmp_path: Path) -> None:
    letters = bytes(ord("a") + i * i % 26 for i in range(4000)).decode()
    (tmp_path / "in.txt").write_text(letters)
    # Samples of one rank's view: microbatches 0, 2, 4 are rank 0's, 1, 3, 5 are rank 1's.
    [alone] = run_on_ranks(1, _read_microbatches, str(tmp_path), 0, 6)
    both = run_on_ranks(2, _read_microbatches, str(tmp_path), 0, 3)
    assert both == [alone[0::2], alone[1::2]]
    later = run_on_ranks(2, _read_microbatches, str(tmp_path), 4, 2)
    assert later == [both[0][1:], both[1][1:]]
    text = letters.encode()
    assert all(bytes(row) in text for batch in alone for row in batch)


def _fail_to_build(rank: int, folder: str, name: str) -> str:
    from ep_megatron.train.data import build_data

    with pytest.raises(ValueError, match="data:") as error:
        build_data(_config(Path(folder), text_path=f"{folder}/{name}"))
    return str(error.value)


def test_an_error_in_the_text_is_raised_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{broken")
    first, second = run_on_ranks(2, _fail_to_build, str(tmp_path), "in.jsonl")
    assert first == second
    assert "in.jsonl:1" in first


def test_a_split_without_documents_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one document only")
    for message in run_on_ranks(2, _fail_to_build, str(tmp_path), "in.txt"):
        assert "validation part of split '969,30,1'" in message
