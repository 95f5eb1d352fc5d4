"""What a dispatch sends and what a combine sums, as kernels take it.

T tokens, K top-k, L local experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep_megatron import _cuda
from ep_megatron.backends.base import Call, Routing, Rows
from ep_megatron.backends.device import Device, Launch, Memory
from ep_megatron.backends.device_links import SUM_DTYPES, address_of
from ep_megatron.backends.device_rows import RowLayout, item_bytes, recipe_of
from ep_megatron.handle import DeviceHandle, DispatchHandle


@dataclass(frozen=True)
class Send:
    """What a dispatch reads, and the layout of what arrives. None where a part is absent."""

    operation: str
    call: Call
    rows: Rows
    x: Memory
    scales: Memory | None
    weights: Memory | None
    topk_idx: Memory | None
    routes: Memory  # written before the rows move, in a fresh dispatch
    layout: RowLayout

    @staticmethod
    def of(
        device: Device,
        call: Call,
        rows: Rows,
        by: Routing | DispatchHandle | DeviceHandle,
        routes: Memory,
        *,
        idx_dtype: torch.dtype | None = None,
    ) -> "Send":
        """Describe a call; `idx_dtype`: of the indices that arrive with the rows, if they do."""
        return Send(
            operation="dispatch" if isinstance(by, Routing) else "cached dispatch",
            call=call,
            rows=rows,
            x=device.input(rows.x),
            scales=_input(device, rows.scales),
            weights=_input(device, rows.topk_weights),
            topk_idx=_input(device, by.topk_idx),
            routes=routes,
            layout=RowLayout.of(rows, call, idx_dtype),
        )

    def plan(
        self,
        starts: Sequence[Sequence[int]],
        valid: int,
        ranks: tuple[int, int],
        num_sms: int,
        state: int = 0,
    ) -> Launch:
        """Return the launch that moves the rows; see `args`."""
        return self.launch(self.args(starts, valid, ranks, state), num_sms)

    def launch(self, args: _cuda.DispatchArgs, num_sms: int) -> Launch:
        """Return the launch that moves rows as they are sent by this call, cast if they are."""
        if self.rows.fp8 is None:
            return _cuda.plan_dispatch(args, num_sms)
        args.recipe = recipe_of(self.rows.fp8)
        return _cuda.plan_dispatch_cast(args, SUM_DTYPES[self.x.dtype], num_sms)

    def args(
        self,
        starts: Sequence[Sequence[int]],
        valid: int,
        ranks: tuple[int, int],
        state: int = 0,
    ) -> _cuda.DispatchArgs:
        """Return what the kernel takes to move all rows.

        Args:
            starts: by rank, where the parts of `layout` start: addresses, or offsets in its block.
            valid: address of `[L]` rows of each local expert before padding.
            ranks: this one and how many there are.
            state: address of what notify leaves, where starts are offsets.
        """
        call, layout = self.call, self.layout
        to_x, to_scales, to_weights, to_idx, to_links, _ = zip(*starts, strict=True)
        return _cuda.DispatchArgs(
            state=state,
            x=self.x.address,
            scales=address_of(self.scales),
            weights=address_of(self.weights),
            topk_idx=address_of(self.topk_idx),
            routes=self.routes.address,
            route_plane=len(self.rows.x) * call.num_topk,
            valid=valid,
            num_tokens=len(self.rows.x),
            alignment=call.expert_alignment,
            num_topk=call.num_topk,
            row_bytes=call.hidden * self.x.dtype.itemsize,
            out_row_bytes=layout.x.num_bytes,
            scale_bytes=0 if layout.scales is None else layout.scales.num_bytes,
            weight_bytes=item_bytes(layout.weights),
            idx_bytes=item_bytes(layout.idx),
            link_bytes=0 if layout.links is None else layout.links.num_bytes,
            is_int64=self.topk_idx is not None and self.topk_idx.dtype == torch.int64,
            expand=call.expand,
            experts_per_rank=call.num_experts // ranks[1],
            rank=ranks[0],
            to_x=to_x,
            to_scales=to_scales,
            to_weights=to_weights,
            to_idx=to_idx,
            to_links=to_links,
        )


@dataclass(frozen=True)
class Sum:
    """What a combine reads and writes. None where a part is absent."""

    call: Call
    x: Memory
    weights: Memory | None
    routes: Memory
    links: Memory | None  # by which a token's rows are summed on their rank first
    biases: Sequence[Memory | None]
    out: Memory
    out_weights: Memory | None

    @staticmethod
    def of(
        device: Device,
        rows: Rows,
        handle: DispatchHandle | DeviceHandle,
        biases: Sequence[Tensor],
        combined: tuple[Tensor | None, Tensor | None],
        *,
        reduces: bool,
    ) -> "Sum":
        """Describe a call into `combined`, or new tensors where that holds None."""
        shape = (handle.num_tokens, handle.num_topk)
        out_weights = None
        if rows.topk_weights is not None:
            out_weights = device.output(rows.topk_weights.dtype, shape, combined[1])
        return Sum(
            call=Call.of("combine", rows, handle),
            x=device.input(rows.x),
            weights=_input(device, rows.topk_weights),
            routes=device.input(handle.routes),
            links=_input(device, handle.links) if reduces else None,
            biases=[_input(device, bias) for bias in (*biases, None, None)],
            out=device.output(rows.x.dtype, (shape[0], rows.x.shape[1]), combined[0]),
            out_weights=out_weights,
        )

    def plan(self, state: int, num_sms: int) -> Launch:
        """Return the launch that sums rows that are where the posts of this call say."""
        return self.launch(self.args(state), num_sms)

    def launch(self, args: _cuda.CombineArgs, num_sms: int) -> Launch:
        """Return the launch that sums rows of this call's dtype."""
        return _cuda.plan_combine(args, SUM_DTYPES[self.x.dtype], num_sms)

    def args(self, state: int) -> _cuda.CombineArgs:
        """Return what the kernel takes to sum the rows of all tokens."""
        num_tokens, hidden = self.out.shape
        return _cuda.CombineArgs(
            state=state,
            routes=self.routes.address,
            route_plane=num_tokens * self.call.num_topk,
            num_tokens=num_tokens,
            num_topk=self.call.num_topk,
            row_bytes=hidden * self.x.dtype.itemsize,
            weight_bytes=0 if self.weights is None else self.weights.dtype.itemsize,
            expand=self.call.expand,
            bias_0=address_of(self.biases[0]),
            bias_1=address_of(self.biases[1]),
            out=self.out.address,
            out_weights=address_of(self.out_weights),
        )

    def tensors(self, device: Device) -> tuple[Tensor, Tensor | None]:
        """Return what was summed, after `on_stream`."""
        weights = None if self.out_weights is None else device.tensor(self.out_weights)
        return device.tensor(self.out), weights


def _input(device: Device, tensor: Tensor | None) -> Memory | None:
    return None if tensor is None else device.input(tensor)
