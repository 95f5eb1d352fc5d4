"""One rank's whole run: from a config to a trained model."""

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ep_megatron.train.agree import on_rank_zero
from ep_megatron.train.config import Config
from ep_megatron.train.folders import prepare_folders
from ep_megatron.train.launch import is_worker, num_restarts

logger = logging.getLogger(__name__)


def pretrain(config: Config, resume: bool = False) -> int:
    """Train `config` in this process, one of those that torchrun started; collective.

    Args:
        config: as `load_config` returns it.
        resume: go on from the latest checkpoint in `config.save`. Processes that torchrun has
            started again (`--max-restarts`) do so where there is one.

    Returns:
        0, or the number of the signal that ended the run early.

    Raises:
        ValueError: the config cannot be trained as asked, or there is no checkpoint to resume.
    """
    _set_up(config)
    number = _run(config, resume)
    dist.destroy_process_group()
    return number


def _set_up(config: Config) -> None:
    """Join the process group and make megatron-core ready for this machine and this config."""
    if not is_worker():
        raise ValueError(
            "pretrain: expected torchrun to have started this process, got no RANK in the "
            "environment; use `ep-megatron pretrain` or torchrun"
        )
    config.check_world_size(int(os.environ["WORLD_SIZE"]))
    warnings.filterwarnings("ignore", module="megatron")
    # c10d itself still calls names that it has deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    rank = int(os.environ["RANK"])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ep_megatron").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        _join("nccl", timeout)
    else:
        # Compiling Megatron's fused functions for a CPU takes longer than they ever save.
        torch.compiler.set_stance("force_eager")
        _join("gloo", timeout)

    from ep_megatron.megatron.host import install as install_host

    install_host()
    if config.moe_token_dispatcher == "deepep" and config.num_experts is not None:
        from ep_megatron.megatron.plugin import install as install_dispatcher

        install_dispatcher(
            config.ep_backend,
            dispatch_dtype=config.moe_dispatch_dtype,
            combine_grad_dtype=config.moe_combine_grad_dtype,
        )

    from megatron.core import parallel_state

    from ep_megatron.train.model import num_virtual_stages

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_virtual_stages(config),
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )
    _seed(config.seed)


def _join(backend: str, timeout: timedelta) -> None:
    """Join the process group; each restart under keys of its own.

    A restarted process may find the store of the processes before it, with their addresses in it.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store = PrefixStore(f"ep_megatron/restart{num_restarts()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _seed(seed: int) -> None:
    """Seed all generators as Megatron does: pipeline stages differ, data-parallel ranks do not."""
    import random

    import numpy as np
    from megatron.core import parallel_state, tensor_parallel

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _build(config: Config, vocab_size: int) -> Any:
    from megatron.core.distributed import finalize_model_grads

    from ep_megatron.train.model import build_model, build_optimizer, transformer_config
    from ep_megatron.train.step import Run

    megatron_config = transformer_config(config)
    models = build_model(config, megatron_config, vocab_size)
    optimizer, scheduler = build_optimizer(config, models)
    megatron_config.finalize_model_grads_func = finalize_model_grads
    megatron_config.grad_scale_func = optimizer.scale_loss
    if config.overlap_grad_reduce:
        no_sync = [model.no_sync for model in models]
        megatron_config.no_sync_func = no_sync if len(models) > 1 else no_sync[0]
    for model in models:
        model.train()
    return Run(config, models, optimizer, scheduler)


def _run(config: Config, resume: bool) -> int:
    from ep_megatron.train.checkpoint import latest_iteration, load_checkpoint
    from ep_megatron.train.data import build_data
    from ep_megatron.train.loop import train

    save = config.save
    assert save is not None
    if num_restarts() and not resume:
        resume = on_rank_zero(lambda: latest_iteration(save) is not None)
    prepare_folders(config, resume)
    data = build_data(config)
    run = _build(config, data.vocab_size)
    if resume:
        path = load_checkpoint(run, save)
        logger.info("resumed from %s", path)
    return train(run, data)
