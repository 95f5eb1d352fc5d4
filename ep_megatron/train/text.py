"""Text of any machine -> Megatron's .bin/.idx files, and what is known about it before training."""

import hashlib
import json
import logging
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ep_megatron.train.config import Config

logger = logging.getLogger(__name__)

_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".jsonl"}
_LIBRARIES = {
    "ByteLevelTokenizer": "byte-level",
    "HuggingFaceTokenizer": "huggingface",
    "SentencePieceTokenizer": "sentencepiece",
    "NullTokenizer": "null",
}
_MAX_COUNTED_TOKENS = 100_000_000
# Characters; see `documents`.
_PIECE = 32_768


def make_tokenizer(config: Config) -> Any:
    """Return megatron-core's tokenizer for `config`."""
    from megatron.core.tokenizers import MegatronTokenizer

    library = _LIBRARIES[config.tokenizer_type]
    if library in ("huggingface", "sentencepiece") and config.tokenizer_model is None:
        raise ValueError(
            f"tokenizer: expected tokenizer-model to be given for {config.tokenizer_type}, got none"
        )
    if library == "null" and config.vocab_size is None:
        raise ValueError("tokenizer: expected vocab-size to be given for NullTokenizer, got none")
    options: dict[str, Any] = {}
    if library == "byte-level":
        # 256 bytes; 0, 1 and 2 are control characters that text does not have.
        options = {"vocab_size": 256, "_bos_id": 2}
    elif library == "null":
        options = {"vocab_size": config.vocab_size}
    return MegatronTokenizer.from_pretrained(
        config.tokenizer_model, metadata_path={"library": library}, **options
    )


def text_files(config: Config) -> list[Path]:
    """Return the files whose text is trained on, sorted.

    Without `text-path` these are the sources, documentation included, of Python's own library.

    Raises:
        ValueError: `text-path` does not exist or holds no text file.
    """
    if config.text_path is None:
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
        return sorted(
            path
            for path in root.rglob("*.py")
            if not skipped.intersection(path.relative_to(root).parts)
        )
    path = config.text_path
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in _TEXT_SUFFIXES)
    if not files:
        suffixes = ", ".join(sorted(_TEXT_SUFFIXES))
        raise ValueError(
            f"data: expected text-path to be a file or a folder with {suffixes} files, got {path}"
        )
    return files


def documents(files: list[Path], json_key: str) -> Iterator[str]:
    """Yield the text of each file, or of each line of a JSONL file.

    A file much longer than `_PIECE` characters is cut at line ends into documents of about that
    length: training, validation and test get whole documents, and one big file must serve all.

    Raises:
        ValueError: a line of a JSONL file is no JSON object with a string under `json_key`.
    """
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if file.suffix != ".jsonl":
            yield from _pieces(text)
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                yield str(json.loads(line)[json_key])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"data: expected {file}:{number} to be a JSON object with {json_key!r}, "
                    f"got {line[:80]!r}; json-key names another key"
                ) from error


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * _PIECE:
        line_end = text.rfind("\n", start, start + _PIECE)
        end = line_end + 1 if line_end >= 0 else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def prepare_text(config: Config, tokenizer: Any) -> str:
    """Tokenise the text of `config` once and return the prefix of its .bin/.idx files.

    Not collective: one process calls it. The name of the result is a fingerprint of the files, so
    changed text is tokenised again and unchanged text never is. Documents are shuffled (always the
    same way), so that the validation split is not merely the end of the alphabet.
    """
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    files = text_files(config)
    prefix = config.data_cache_path / f"text-{_fingerprint(files, config)}"
    if prefix.with_suffix(".idx").exists():
        return str(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    building = f"{prefix}.{os.getpid()}"
    builder = IndexedDatasetBuilder(
        f"{building}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size)
    )
    texts = list(documents(files, config.json_key))
    random.Random(0).shuffle(texts)
    num_tokens = num_documents = 0
    for text in texts:
        if not text.strip():
            continue
        tokens = torch.tensor([*tokenizer.tokenize(text), tokenizer.eod])
        builder.add_document(tokens, [len(tokens)])
        num_tokens += len(tokens)
        num_documents += 1
    if not num_documents:
        raise ValueError(f"data: expected text in {files[0]} and {len(files) - 1} more, got none")
    builder.finalize(f"{building}.idx")
    # The index is renamed last: whoever sees it may use both.
    for suffix in (".bin", ".idx"):
        Path(building + suffix).replace(f"{prefix}{suffix}")
    logger.info("tokenised %d documents, %d tokens into %s.bin", num_documents, num_tokens, prefix)
    return str(prefix)


def unigram_entropy(prefixes: list[str]) -> float:
    """Return the entropy in nats per token of the token frequencies in .bin/.idx files.

    It is the loss of a model that has learned how frequent each token is and nothing else. At most
    the first 1e8 tokens of each file are counted.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    counts = np.zeros(0, dtype=np.int64)
    for prefix in prefixes:
        dtype = IndexedDataset(prefix).index.dtype
        tokens = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")[:_MAX_COUNTED_TOKENS]
        more = np.bincount(tokens)
        counts = np.pad(counts, (0, max(0, len(more) - len(counts))))
        counts[: len(more)] += more
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _fingerprint(files: list[Path], config: Config) -> str:
    digest = hashlib.sha256()
    digest.update(f"{config.tokenizer_type} {config.tokenizer_model} {config.json_key}".encode())
    for file in files:
        state = file.stat()
        digest.update(f"{file} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
