"""How rows travel: one module per transport, one protocol; the choice between them."""

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from ep_megatron.backends import checked
from ep_megatron.backends.base import Backend
from ep_megatron.backends.checked import CheckedBackend
from ep_megatron.backends.checked_packed import CheckedPacked
from ep_megatron.backends.checked_sums import SumOrder
from ep_megatron.backends.meeting import Meeting, SubMeeting, has_gloo
from ep_megatron.backends.packed import LowLatencyBackend
from ep_megatron.backends.packed_group import PackedGroup
from ep_megatron.backends.process_group import ProcessGroupBackend
from ep_megatron.config import BufferConfig
from ep_megatron.hosts import Hosts

logger = logging.getLogger(__name__)

HOST_ID_VARIABLE = "EP_MEGATRON_HOST_ID"
MAX_HOST_ID_BYTES = 1024


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
    meeting = Meeting(group, config.timeout)
    hosts: Sequence[str] = ()
    if backend in ("auto", "hierarchical", "cuda"):
        hosts = meeting.gather_text("Buffer", host_id(config), MAX_HOST_ID_BYTES)
    if backend == "auto":
        backend, reason = _best(group, hosts)
    if backend == "cuda" and checked.is_asked_for(config):
        raise NotImplementedError(
            "Buffer: expected check_rows to be False with backend 'cuda', got True; rows of CPU "
            "ranks are checked"
        )
    made: Backend
    order = SumOrder.by_rank(meeting.num_ranks)
    # Only here: a machine without the compiled extension still has the process group.
    if backend == "shared_memory":
        from ep_megatron.backends.shared_memory import SharedMemoryBackend

        made = SharedMemoryBackend(meeting, config)
    elif backend == "hierarchical":
        from ep_megatron.backends.hierarchical import HierarchicalBackend

        made = HierarchicalBackend(meeting, config, hosts)
        order = SumOrder(made.hosts.members, is_rounded=not config.float32_between_hosts)
    elif backend == "cuda":
        made = _cuda_backend(meeting, config, hosts)
    else:
        made = ProcessGroupBackend(group, config.timeout)
    if made.rank == 0:
        logger.info("Buffer: %d ranks, backend %s (%s)", made.num_ranks, backend, reason)
    return CheckedBackend(made, order) if checked.is_asked_for(config) else made


def _cuda_backend(meeting: Meeting, config: BufferConfig, host_ids: Sequence[str]) -> Backend:
    """Make the CUDA backend on this rank's current GPU, or raise the same error on every rank."""
    device, problem = None, ""
    try:
        import torch

        from ep_megatron.backends.gpu import GpuDevice

        device = GpuDevice(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    except ImportError as error:
        problem = f"{error} (install ep_megatron where nvcc is on PATH)"
    except RuntimeError as error:
        problem = str(error)
    problems = meeting.gather_text("Buffer", problem[:MAX_HOST_ID_BYTES], MAX_HOST_ID_BYTES)
    found = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]
    if found or device is None:
        raise RuntimeError(
            "Buffer: expected a GPU and ep_megatron._cuda on every rank for backend 'cuda', got "
            + "; ".join(found)
        )
    from ep_megatron.backends.cuda import CudaBackend

    hosts = Hosts.from_ids(host_ids)
    if hosts.num_hosts == 1:
        return CudaBackend(meeting, device, config)
    from ep_megatron.backends.cuda_nodes import CudaNodesBackend
    from ep_megatron.backends.nvshmem import NvshmemNetwork

    network = NvshmemNetwork(meeting, device.ordinal, device.stream)
    here = SubMeeting(meeting, hosts.members[hosts.host_of[meeting.rank]])
    inside = CudaBackend(here, device, config)
    return CudaNodesBackend(meeting, inside, device, network, config, host_ids)


def choose_low_latency(
    group: dist.ProcessGroup,
    config: BufferConfig,
    backend: Backend,
    window_bytes: int,
    *,
    enable_shrink: bool,
) -> LowLatencyBackend:
    """Make what a Buffer's low-latency verbs use beside `backend`. Collective; logged by rank 0.

    Args:
        group: the ranks.
        config: of the Buffer.
        backend: of the Buffer.
        window_bytes: on GPUs, what each rank's rows may take; 0 for `config.initial_bytes`.
        enable_shrink: see `Buffer`.
    """
    made: LowLatencyBackend
    how = "torch.distributed"
    if backend.name == "cuda":
        from ep_megatron.backends.cuda import CudaBackend
        from ep_megatron.backends.cuda_nodes import CudaNodesBackend
        from ep_megatron.backends.packed_cuda import PackedCuda

        meeting, num_bytes = Meeting(group, config.timeout), window_bytes or config.initial_bytes
        far, how = None, "NVLink"
        if isinstance(backend, CudaNodesBackend):
            near = backend.nodes.members[backend.nodes.host_of[backend.rank]]
            far, how = (backend.network, near), "NVLink and NVSHMEM"
        else:
            assert isinstance(backend, CudaBackend)
        made = PackedCuda(
            meeting, backend.device, config, num_bytes, enable_shrink=enable_shrink, far=far
        )
    elif backend.name == "shared_memory":
        made = _packed_shared(group, config, enable_shrink)
        how = "shared memory"
        if checked.is_asked_for(config):
            made = CheckedPacked(made, _packed_shared(group, config, enable_shrink))
    else:
        made = PackedGroup(group, config.timeout, enable_shrink)
        if checked.is_asked_for(config):
            made = CheckedPacked(made, PackedGroup(group, config.timeout, enable_shrink))
    if backend.rank == 0:
        logger.info("Buffer: low-latency calls over %s", how)
    return made


def _packed_shared(
    group: dist.ProcessGroup, config: BufferConfig, enable_shrink: bool
) -> LowLatencyBackend:
    from ep_megatron.backends.packed_shared import PackedShared

    return PackedShared(Meeting(group, config.timeout), config, enable_shrink)


def _best(group: dist.ProcessGroup, hosts: Sequence[str]) -> tuple[str, str]:
    """Return what serves ranks on these hosts, and why."""
    num_hosts = len(set(hosts))
    if num_hosts == 1:
        return "shared_memory", "all ranks are on one host"
    if num_hosts == len(hosts):
        return "process_group", "every rank is on a host of its own"
    if not has_gloo(group):
        return "process_group", f"the ranks are on {num_hosts} hosts and not CPU ranks"
    return "hierarchical", f"the ranks are on {num_hosts} hosts"


def host_id(config: BufferConfig) -> str:
    """Return a text that is equal on two ranks exactly when they can share memory."""
    given = config.host_id or os.environ.get(HOST_ID_VARIABLE)
    if given:
        return given
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text().strip() if boot_id.exists() else ""
    # Containers of one machine share the kernel but not always the memory file system.
    return f"{socket.gethostname()} {boot} {Path(config.shm_dir).stat().st_dev}"
