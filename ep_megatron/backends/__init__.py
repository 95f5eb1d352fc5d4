"""How rows travel: one module per transport, one protocol; the choice between them."""

import logging
import socket
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from ep_megatron.backends.base import Backend
from ep_megatron.backends.meeting import Meeting
from ep_megatron.backends.process_group import ProcessGroupBackend
from ep_megatron.config import BufferConfig

logger = logging.getLogger(__name__)


def resolve(
    config: BufferConfig | None, *, backend: str | None, initial_bytes: int
) -> BufferConfig:
    """Put a constructor's short forms into its config."""
    config = config or BufferConfig()
    if backend is not None:
        config = replace(config, backend=backend)
    if initial_bytes:
        config = replace(config, initial_bytes=initial_bytes)
    return config


def choose(group: dist.ProcessGroup, config: BufferConfig) -> Backend:
    """Make the backend that `config` asks for; the one place where that is decided.

    Collective. What was taken, and why, is logged once by rank 0.
    """
    backend, reason = config.backend, "as asked"
    if backend == "auto":
        backend, reason = "process_group", "the ranks are on several hosts"
        meeting = Meeting(group, config.timeout)
        if len(set(meeting.gather_text("Buffer", host_id(config)))) == 1:
            backend, reason = "shared_memory", "all ranks are on one host"
    made: Backend
    if backend == "shared_memory":
        # Only here: a machine without the compiled extension still has the other backend.
        from ep_megatron.backends.shared_memory import SharedMemoryBackend

        made = SharedMemoryBackend(group, config)
    else:
        made = ProcessGroupBackend(group, config.timeout)
    if made.rank == 0:
        logger.info("Buffer: %d ranks, backend %s (%s)", made.num_ranks, backend, reason)
    return made


def host_id(config: BufferConfig) -> str:
    """Return a text that is equal on two ranks exactly when they can share memory."""
    if config.host_id is not None:
        return config.host_id
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text().strip() if boot_id.exists() else ""
    # Containers of one machine share the kernel but not always the memory file system.
    return f"{socket.gethostname()} {boot} {Path(config.shm_dir).stat().st_dev}"
