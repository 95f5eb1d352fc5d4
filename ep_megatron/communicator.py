"""From a communicator of mpi4py's kind to a process group of the same ranks."""

import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

_NEEDED = ("Get_rank", "Get_size", "allgather", "bcast")


def group_of(comm: Any, timeout: float) -> dist.ProcessGroup:
    """Return a gloo group of the communicator's ranks. Collective over them.

    Where `torch.distributed` has not been initialised, it is, with these ranks as the world, over a
    store that rank 0 opens. Else they must be that world.

    Args:
        comm: has `Get_rank`, `Get_size`, `allgather` and `bcast` of Python objects.
        timeout: seconds to wait for the other ranks.

    Raises:
        ValueError: if it has not, or its ranks are not the world of `torch.distributed`.
    """
    missing = [name for name in _NEEDED if not callable(getattr(comm, name, None))]
    if missing:
        raise ValueError(
            "Buffer: expected comm to be a communicator like mpi4py's, got "
            f"{type(comm).__name__} without {', '.join(missing)}"
        )
    own = dist.get_rank() if dist.is_initialized() else None
    ranks = comm.allgather(own)
    if None in ranks and any(rank is not None for rank in ranks):
        raise ValueError(
            "Buffer: expected all ranks of comm, or none, to have initialised torch.distributed, "
            f"got {ranks.count(None)} of {len(ranks)} that have not"
        )
    if own is None:
        return _new_world(comm, timeout)
    if ranks == list(range(dist.get_world_size())):
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    raise ValueError(
        f"Buffer: expected comm to hold the {dist.get_world_size()} ranks of torch.distributed in "
        f"their order, got {ranks}; pass group= for a part of them"
    )


def _new_world(comm: Any, timeout: float) -> dist.ProcessGroup:
    rank, size, patience = comm.Get_rank(), comm.Get_size(), timedelta(seconds=timeout)
    hosts = comm.allgather(socket.gethostname())
    store: TCPStore | None = None
    address = None
    if rank == 0:
        host = hosts[0] if len(set(hosts)) > 1 else "127.0.0.1"
        store = TCPStore(host, 0, size, True, patience, wait_for_workers=False)
        address = host, store.port
    host, port = comm.bcast(address, root=0)
    if store is None:
        store = TCPStore(host, port, size, False, patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    assert dist.group.WORLD is not None
    return dist.group.WORLD
