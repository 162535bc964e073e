"""A run from its start, or from its checkpoint, to its end."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vcr_ops

from ..measure import most_held
from . import checkpoint
from .data import Data, batch_at, load
from .networks import build
from .processes import Processes
from .settings import Settings

Say = Callable[[str], None]


@dataclass
class Run:
    """A finished run. accuracy: of the averaged weights on the test images, in percent; start: before the first step.

    step_ms: median. peak_mb: torch's allocations of one step.
    """

    settings: Settings
    losses: list[float]
    accuracy: float
    start: float
    step_ms: float
    peak_mb: float


def accuracy(network: nn.Module, data: Data, device: torch.device) -> float:
    """Percent of the test images."""
    training, dtype = network.training, next(network.parameters()).dtype
    network.eval()
    right = 0
    with torch.inference_mode():
        for images, labels in zip(data.test_images.split(128), data.test_labels.split(128), strict=True):
            right += int((network(images.to(device, dtype)).argmax(1).cpu() == labels).sum())
    network.train(training)
    return 100 * right / len(data.test_labels)


def _path(folder: Path, settings: Settings) -> Path:
    return folder / f"{settings.name}.pt"


def _begin(settings: Settings, data: Data, folder: Path, processes: Processes) -> nn.Module:
    network = build(settings, data.classes)
    if settings.system == "vcr-converted":
        parent = replace(settings, system="resnext")
        path = _path(folder, parent)
        state = checkpoint.load(path, parent)
        if state is None or state["step"] < settings.steps:
            raise ValueError(f"vcr-converted goes on from a finished run {parent.name}, and there is none in {folder}")
        checkpoint.restore(path, ("average", network, state["average"]))
        network = vcr_ops.convert(network)
    return network.to(processes.device, getattr(torch, settings.dtype))


def run(settings: Settings, folder: Path, processes: Processes, every: int, say: Say) -> Run:
    """Train, or go on from the checkpoint in ``folder``, which is written every ``every`` steps and at the end.

    Raises:
        ValueError: the batch can't be divided among the processes; the checkpoint is of another run, or of none.
    """
    if settings.batch % processes.size:
        raise ValueError(f"a batch of {settings.batch} can't be divided among {processes.size} processes")
    data, path, device = load(settings.dataset), _path(folder, settings), processes.device
    network = _begin(settings, data, folder, processes)
    state = checkpoint.load(path, settings)
    first_accuracy = accuracy(network, data, device) if state is None else state["start"]
    average = copy.deepcopy(network)
    parallel = processes.parallel(network.train())
    optimizer = torch.optim.SGD(
        network.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay, nesterov=True
    )
    step, losses, times, peak = 0, [], [], 0.0
    if state is not None:
        parts: dict[str, Any] = {"network": network, "average": average}
        if state["optimizer"] is not None:
            parts["optimizer"] = optimizer
        checkpoint.restore(path, *((name, part, state[name]) for name, part in parts.items()))
        step, losses, times = state["step"], state["losses"], state["times"]
        peak = state["peak"]
        say(f"{settings.name}: goes on at step {step}")
    while step < settings.steps:
        begin = time.perf_counter()
        images, labels = batch_at(data, step, settings.batch, settings.seed, processes.rank, processes.size)
        images = images.to(device, getattr(torch, settings.dtype))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        loss = F.cross_entropy(parallel(images), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _follow(average, network, settings.ema_at(step))
        losses.append(processes.average(loss))
        times.append(time.perf_counter() - begin)
        step += 1
        if step % every == 0 or step == settings.steps:
            say(f"{settings.name}: step {step} of {settings.steps}, loss {losses[-1]:.4f}")
            if step == settings.steps:
                peak = _peak(network, images, labels.to(device))
            if processes.rank == 0:
                kept: dict[str, Any] = dict(network=network.state_dict(), average=average.state_dict())
                kept |= dict(optimizer=optimizer.state_dict(), step=step, losses=losses, times=times)
                checkpoint.save(path, settings, kept | dict(start=first_accuracy, peak=peak))
            processes.wait()
    final = accuracy(average, data, device)
    return Run(settings, losses, final, first_accuracy, 1e3 * sorted(times)[len(times) // 2], peak)


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """The exponential moving average of weights; buffers as they are, running statistics being averages already."""
    for kept, new in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
    for kept_buffer, buffer in zip(average.buffers(), network.buffers(), strict=True):
        kept_buffer.copy_(buffer)


def _peak(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """MB that one training step allocates at most beside weights; running statistics are put back."""
    before = copy.deepcopy(network.state_dict())

    def step() -> None:
        F.cross_entropy(network(images), labels).backward()

    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        peak = torch.cuda.max_memory_allocated() - held
    else:
        peak = most_held(step)
    network.load_state_dict(before)
    network.zero_grad()
    return peak / 1e6
