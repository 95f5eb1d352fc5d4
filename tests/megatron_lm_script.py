"""A training script on Megatron-LM's own parser and training loop, as users of it write them.

Run by test_megatron_pretrain.py; needs megatron.training (in megatron-core since 0.19).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def forward_step(batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    batch = next(batches)
    output = model(
        batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"]
    )

    def loss_of(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        mask = batch["loss_mask"].flatten().float()
        loss, num_tokens = (output.flatten().float() * mask).sum(), mask.sum().int()
        return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}

    return output, loss_of


def make_datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args

    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split="9,1,0",
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=True,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()


def main() -> None:
    import megatron.training.initialize as initialize
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    # The wheel comes compiled; Megatron would call make in a folder that has no Makefile there.
    initialize._compile_dependencies = lambda: None
    args = parse_and_validate_args()
    make_datasets.is_distributed = True  # type: ignore[attr-defined]
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, make_datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
