"""The keys of a config that describe the run: Megatron's argument names, and a few of ours."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ep_megatron.train.section import Section


def _as_list(value: object) -> object:
    return value.split() if isinstance(value, str) else value


class ParallelArguments(Section):
    """How the model is spread over processes."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each matrix."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Pipeline stages."""
    num_virtual_stages_per_pipeline_rank: PositiveInt | None = None
    """Model chunks per rank of an interleaved pipeline."""
    pipeline_model_parallel_layout: str | None = None
    """Layers of each stage, e.g. 'Et*2|(tt|)*5t|tmL'."""
    pipeline_schedule: (
        Literal[
            "1f1b",
            "zb1p",
            "interleaved",
            "interleaved-overlap",
            "zbv",
            "dualpipe",
            "dualpipev",
        ]
        | None
    ) = None
    """Order of the pipeline's work; Megatron's own when left out."""
    pipeline_trace_iteration: PositiveInt | None = None
    """Iteration whose timeline is written to <run-dir>/pipeline-trace (on CPUs)."""
    decoder_first_pipeline_num_layers: PositiveInt | None = None
    """Layers of the first stage, where they do not divide evenly."""
    decoder_last_pipeline_num_layers: PositiveInt | None = None
    """Layers of the last stage, where they do not divide evenly."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the experts."""
    expert_tensor_parallel_size: PositiveInt = 1
    """Ranks that share each expert's matrices."""
    sequence_parallel: bool = False
    """Split norms and dropout over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Spread the optimizer's state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather parameters while the forward pass goes on."""
    overlap_moe_expert_parallel_comm: bool = False
    """Megatron's 1F1B overlap of expert communication with another microbatch."""
    delay_wgrad_compute: bool = False
    """Compute weight gradients late, to widen that overlap."""
    num_processes: PositiveInt | None = None
    """Processes to start on this host; as many as the parallel sizes need when left out."""
    distributed_timeout_minutes: PositiveInt = 10
    """How long a rank waits for the others."""


class TrainingArguments(Section):
    """Optimizer, schedule and precision."""

    micro_batch_size: PositiveInt
    """Sequences per rank and forward pass."""
    global_batch_size: PositiveInt
    """Sequences per iteration, over all ranks."""
    train_iters: PositiveInt
    """Iterations in all."""
    exit_interval: PositiveInt | None = None
    """Save and stop after an iteration that is a multiple of this."""
    seed: NonNegativeInt = 1234
    """Seed of weights, data order and dropout."""
    bf16: bool = False
    """Train in bfloat16 with float32 main weights; float32 otherwise."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer."""
    lr: PositiveFloat
    """Highest learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate after the decay."""
    lr_warmup_iters: NonNegativeInt = 0
    """Iterations of linear warm-up."""
    lr_decay_iters: PositiveInt | None = None
    """Iterations until min-lr; train-iters when left out."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay."""
    lr_wsd_decay_iters: PositiveInt | None = None
    """Iterations of the last part of the WSD shape."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay."""
    adam_beta1: NonNegativeFloat = 0.9
    """First moment of Adam."""
    adam_beta2: NonNegativeFloat = 0.999
    """Second moment of Adam."""
    adam_eps: PositiveFloat = 1e-8
    """Epsilon of Adam."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest norm of the gradient; 0 for none."""


class DataArguments(Section):
    """What is trained on."""

    data_path: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    """Prefixes of Megatron's .bin/.idx files, optionally each after its weight."""
    text_path: Path | None = None
    """Text or JSONL file, or a folder of them, to tokenise. Python's own library when left out."""
    json_key: str = "text"
    """Where a JSONL line has its text."""
    data_cache_path: Path = Path("runs/data")
    """Where tokenised text and data indices are kept."""
    split: str = "969,30,1"
    """Shares of documents for training, validation and test."""
    tokenizer_type: Literal[
        "ByteLevelTokenizer",
        "HuggingFaceTokenizer",
        "SentencePieceTokenizer",
        "NullTokenizer",
    ] = "ByteLevelTokenizer"
    """Tokenizer of the text."""
    tokenizer_model: str | None = None
    """File or name of the tokenizer's model."""
    vocab_size: PositiveInt | None = None
    """Vocabulary of the NullTokenizer."""


class RunArguments(Section):
    """Where results go, and how often."""

    run_dir: Path | None = None
    """Folder of all results; runs/<name of the config> when left out."""
    save: Path | None = None
    """Folder of checkpoints; <run-dir>/checkpoints when left out."""
    save_interval: PositiveInt | None = None
    """Iterations between checkpoints; the end of the run has one in any case."""
    tensorboard_dir: Path | None = None
    """Folder of TensorBoard's events; <run-dir>/tensorboard when left out."""
    log_interval: PositiveInt = 10
    """Iterations between lines of the log."""
    log_routing: bool = False
    """Write <run-dir>/routing.jsonl: rows that every rank would get, every log-interval."""
    eval_interval: PositiveInt | None = None
    """Iterations between validations; the end of the run has one in any case."""
    eval_iters: NonNegativeInt = 10
    """Batches of a validation; 0 for none."""
