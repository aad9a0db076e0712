"""Data parallelism over the samples: ``torchrun`` starts one process per rank, on one machine or many.

Every rank holds its share of the hidden states and all of a window's parameters; gradients and statistics are added
up. Rank 0 writes, into a directory that all ranks must see.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from calibrate import products
from calibrate.errors import UserError

PATIENCE = timedelta(hours=6)  # ranks wait this long for each other, while rank 0 writes for example


def start(device: torch.device) -> torch.device:
    """Join the other ranks where torchrun started this process; the device of this rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(f"--device {device}: torchrun gives every process a GPU of its own; leave the number out")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Until all ranks have come here."""
    if dist.is_initialized():
        dist.barrier()


def add_up(*tensors: Tensor) -> None:
    """Replace tensors by their sums over all ranks."""
    if dist.is_initialized():
        for tensor in tensors:
            _everywhere(tensor, dist.ReduceOp.SUM)


def largest(tensor: Tensor) -> None:
    """Replace a tensor by its elementwise maximum over all ranks."""
    if dist.is_initialized():
        _everywhere(tensor, dist.ReduceOp.MAX)


def _everywhere(tensor: Tensor, operation: dist.ReduceOp) -> None:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else tensor.device
    moved = tensor.to(device).contiguous()  # nccl reduces nothing on the CPU
    dist.all_reduce(moved, operation)
    tensor.copy_(moved)


def from_first(value: Any) -> Any:
    """What rank 0 has, a picklable object."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def from_all(value: Any) -> list[Any]:
    """What every rank has, a picklable object."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def check_work(samples: int, batch_size: int) -> None:
    """Raise UserError where ranks would have no samples: those of a step are shared out, see ``Share``."""
    if world() > (places := min(samples, batch_size)):
        raise UserError(
            f"torchrun: {world()} processes cannot share the {places} samples of a step; give --batch-size (and "
            "--nsamples) of that many or more, best a multiple, or start fewer processes"
        )


def ranks_of(samples: int, batch_size: int) -> Tensor:
    """Who has each sample, int64 [samples]: places of a batch, see ``Share.shuffled``, go round the ranks."""
    return torch.arange(samples) % batch_size % world()


class Share:
    """The samples of this rank: ``numbers``, int64, their indices among all ``samples``, ascending."""

    def __init__(self, samples: int, batch_size: int):
        self.samples, self.batch_size = samples, batch_size
        self.numbers = (ranks_of(samples, batch_size) == rank()).nonzero().flatten()
        self._local = torch.full((samples,), -1).index_copy_(0, self.numbers, torch.arange(len(self.numbers)))

    @property
    def batches(self) -> int:
        """Of one pass over the samples of all ranks."""
        return -(-self.samples // self.batch_size)

    def shuffled(self, generator: torch.Generator) -> list[tuple[list[int], int]]:
        """All samples once, in batches: indices among this rank's samples, and how many samples all ranks have.

        The sample at place j of a batch is one of those whose index is j modulo the batch size: so every rank has
        equal work in every batch, and batches are the same however many ranks there are.
        """
        size = min(self.batch_size, self.samples)
        places = [torch.arange(place, self.samples, self.batch_size) for place in range(size)]
        orders = [indices[torch.randperm(len(indices), generator=generator)] for indices in places]
        batches = [[int(order[step]) for order in orders if step < len(order)] for step in range(len(orders[0]))]
        local = self._local.tolist()
        return [([local[number] for number in batch if local[number] >= 0], len(batch)) for batch in batches]


class Gradients:
    """Gradients of blocks over the samples of a batch, one after the other, on all ranks.

    Summed in float64: the sum, rounded to fp32, then hardly ever depends on the order, and a run of many ranks learns
    what a run of one does.

    Args:
        blocks: CalibrationBlocks, prepared.
    """

    def __init__(self, blocks: Iterable):
        self.pairs = [pair for block in blocks for pair in block.cut()]
        self.sums = [torch.zeros(leaf.shape, dtype=torch.float64, device=leaf.device) for _, leaf in self.pairs]
        self.hooks = []
        for (_, leaf), total in zip(self.pairs, self.sums, strict=True):
            products.sum_gradients(leaf, total)
            self.hooks.append(leaf.register_post_accumulate_grad_hook(partial(_add_to, total)))

    def backward(self) -> None:
        """Pass the sums on to the parameters behind what was prepared, and free each; to be called once."""
        while self.pairs:
            (sources, leaf), total = self.pairs.pop(), self.sums.pop()
            self.hooks.pop().remove()
            products.sum_gradients(leaf, None)
            add_up(total)
            total = total.float()
            edges, rows = zip(*sources, strict=True)
            torch.autograd.backward(edges, total.split(rows), retain_graph=bool(self.pairs))


def _add_to(total: Tensor, leaf: Tensor) -> None:
    if leaf.grad is not None:  # it is where the product has added it
        total += leaf.grad
        leaf.grad = None
