"""Megatron's datasets for a config, and iterators that start at any sample."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ep_megatron.train.agree import on_rank_zero
from ep_megatron.train.config import Config
from ep_megatron.train.text import make_tokenizer, prepare_text, unigram_entropy

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    train: Any
    valid: Any
    vocab_size: int
    unigram_entropy: float


def build_data(config: Config) -> Data:
    """Tokenise if needed and build Megatron's datasets; collective over all ranks.

    Returns:
        Datasets whose samples are int64 `tokens`, `labels` and `position_ids` and float `loss_mask`
        of shape [seq-length]; `valid` is None when the split or `eval-iters` leaves none.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokenizer = make_tokenizer(config)
    if config.data_path:
        paths = config.data_path
    else:
        paths = on_rank_zero(lambda: [prepare_text(config, tokenizer)])
    prefixes, weights = _split_weights(paths)
    dataset_config = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.seq_length,
        blend=(prefixes, weights),
        split=config.split,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(config.data_cache_path / "index"),
    )
    # A split nobody reads is not built, as Megatron never finishes building an empty one.
    dataset_config.split_matrix[2] = None
    if not config.eval_iters:
        dataset_config.split_matrix[1] = None
    _check_splits(prefixes, dataset_config.split_matrix, config.split)
    num_train = config.train_iters * config.global_batch_size
    num_valid = config.eval_iters * config.global_batch_size
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, [num_train, num_valid, 0], lambda: True, dataset_config
    )
    train, valid, _ = builder.build()
    entropy = on_rank_zero(lambda: unigram_entropy(prefixes))
    return Data(train, valid, tokenizer.vocab_size, entropy)


def batches(dataset: Any, config: Config, first_sample: int) -> Iterator[Batch]:
    """Yield this rank's microbatches of `dataset`, [micro-batch-size, seq-length] each, for ever.

    Sample `i` of the run is sample `i` of the dataset (modulo its length), whatever the number of
    ranks; `first_sample` is where an interrupted run goes on.
    """
    from megatron.core import parallel_state

    rank = parallel_state.get_data_parallel_rank()
    num_ranks = parallel_state.get_data_parallel_world_size()
    sample = first_sample + rank * config.micro_batch_size
    while True:
        samples = [dataset[(sample + i) % len(dataset)] for i in range(config.micro_batch_size)]
        yield torch.utils.data.default_collate(samples)
        sample += config.micro_batch_size * num_ranks


def _check_splits(prefixes: list[str], shares: list[Any], split: str) -> None:
    """Raise ValueError if a split that is read has no document of some file.

    Args:
        prefixes: of the .bin/.idx files.
        shares: (begin, end) of the training and validation documents as fractions; None if unread.
        split: the config key, for the message.
    """
    for prefix in prefixes:
        num_documents = _num_documents(prefix)
        for name, share in zip(("training", "validation"), shares[:2], strict=True):
            if share is None and name == "validation":
                continue
            begin, end = (round(edge * num_documents) for edge in share or (0, 0))
            if begin == end:
                raise ValueError(
                    f"data: expected the {name} part of split {split!r} to hold one or more of the "
                    f"{num_documents} documents of {prefix}, got none; give more text, another "
                    "split, or eval-iters 0 for no validation"
                )


def _num_documents(prefix: str) -> int:
    """Return how many documents two files hold; refuse files that cannot be read to their end.

    Raises:
        ValueError: one is not there, is cut short, or is none of Megatron's.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        index = IndexedDataset(prefix).index
        ends = index.sequence_pointers + index.sequence_lengths.astype("int64") * index.dtype_size
        expected, least = int(ends.max(initial=0)), int(index.sequence_lengths.min(initial=0))
        actual = Path(f"{prefix}.bin").stat().st_size
        least = min(least, int(index.sequence_pointers.min(initial=0)))
    except Exception as error:  # whatever a damaged file makes of its reader
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ValueError(
            f"data: expected {prefix}.idx and .bin to be Megatron's data files, got "
            f"{type(error).__name__}: {reason}; make them anew"
        ) from error
    if least < 0 or expected > actual:
        raise ValueError(
            f"data: expected {prefix}.bin to hold the {expected} bytes that its .idx says, got "
            f"{actual}; one of the two is cut short or of another text; make them anew"
        )
    return len(index.sequence_lengths)


def _split_weights(paths: list[str]) -> tuple[list[str], list[float] | None]:
    """Return Megatron's `data-path` as prefixes and, where they alternate with numbers, weights."""
    numbers = []
    for path in paths[::2]:
        with contextlib.suppress(ValueError):
            numbers.append(float(path))
    if len(numbers) * 2 == len(paths):
        return paths[1::2], numbers
    return paths, None
