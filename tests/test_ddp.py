"""Two processes under DistributedDataParallel (gloo): the average of both halves' gradients, buffers from rank 0."""

import copy
import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.small import BACKENDS, block, feature_map


def work(rank: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        train(rank, folder, backend)
        gc.collect()  # a DistributedDataParallel is in cycles, and its gloo threads mustn't outlive the interpreter
        dist.barrier()
    finally:
        dist.destroy_process_group()


def train(rank: int, folder: str, backend: str) -> None:
    model = nn.Sequential(block(backend), block(backend, modulation="pixel"))
    alone = copy.deepcopy(model)
    parallel = DistributedDataParallel(model)
    x = feature_map(4, 16, 5, 6)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.05)
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss = parallel(x[2 * rank : 2 * rank + 2]).square().mean()
        loss.backward()
        if step == 0:
            halves = [copy.deepcopy(alone) for _ in range(2)]
            for half, part in zip(halves, x.split(2), strict=True):
                half(part).square().mean().backward()
            for (name, p), a, b in zip(
                model.named_parameters(), halves[0].parameters(), halves[1].parameters(), strict=True
            ):
                torch.testing.assert_close(p.grad, (a.grad + b.grad) / 2, msg=lambda text, name=name: f"{name}: {text}")
        optimizer.step()
        losses.append(loss.item())
    for p in parallel.parameters():
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach())
        assert torch.equal(both[0], both[1])
    counts = [int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert set(counts) == {2}
    torch.save(losses, os.path.join(folder, f"{rank}.pt"))


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes(backend: str, tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path), backend), nprocs=2)
    losses = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert losses[0] != losses[1]
