"""One process or several: what torchrun says, and what differs for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

import vcr_ops


class Processes(NamedTuple):
    """This one's number, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    def average(self, x: Tensor) -> float:
        """Over all processes."""
        if self.size > 1:
            x = x.detach().clone()
            dist.all_reduce(x)
            x /= self.size
        return x.item()

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def parallel(self, network: nn.Module) -> nn.Module:
        """With batch norms over all processes, and gradients averaged."""
        if self.size == 1:
            return network
        network = vcr_ops.SyncBatchNorm.convert_sync_batchnorm(network)
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices)


@contextmanager
def started() -> Iterator[Processes]:
    """The group that torchrun's environment describes: NCCL on GPUs, gloo on CPUs. Without it, this process alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if count == 1:
        yield Processes(0, 1, device)
        return
    store, rank, size = next(rendezvous("env://"))
    # Where torchrun starts all anew, the store still has the addresses of those that died.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Processes(dist.get_rank(), count, device)
    finally:
        dist.destroy_process_group()
