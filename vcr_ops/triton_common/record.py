"""What the Triton backend would launch, found out without a GPU: the ops' own code runs on tensors without memory.

The launcher is hooked, so that no kernel runs; everything else (sizes, configurations, grids) is as on a GPU of the
architecture that is pretended.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..explain import op_arguments
from ..modules.middle import VisualConceptReasoning
from ..ops.vcr_middle.arguments import learned_of
from . import configs
from .launch import Launch, hooks
from .running_stats import move, move_of

# single ops: forward and backward of the three ops alone. steps: training with synchronised batch norm.
MODES = ("training", "evaluation", "single ops", "steps")


@dataclass(frozen=True)
class Problem:
    """A middle and its map of ``n`` images."""

    p: int
    size: int  # height and width
    n: int
    dtype: torch.dtype = torch.bfloat16
    layout: str = "contiguous"
    mode: str = "training"  # one of MODES
    sampler: str = "dynamic"
    edges: str = "dynamic"
    modulation: str = "channel"
    affine: str = "both"
    concepts: int = 32
    frozen: bool = False  # in training: the states' norm goes by given statistics


@contextmanager
def holding() -> Iterator[list[Launch]]:
    """Collect the launches made inside, instead of running them."""
    launches: list[Launch] = []

    def keep(launch: Launch) -> bool:
        launches.append(launch)
        return True

    hooks.append(keep)
    try:
        yield launches
    finally:
        hooks.remove(keep)


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Collect the launches made inside, as on a device of ``arch``, which isn't here: tensors have no memory."""
    with configs.pretend(arch), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), holding() as launches:
        yield launches


def launches(problem: Problem, arch: str) -> list[Launch]:
    """All launches of a problem, in order."""
    if problem.mode == "single ops":
        return op_launches(problem, arch)
    if problem.mode == "steps":
        return step_launches(problem, arch)[0]
    forward, backward = middle_launches(problem, arch)
    return forward + backward


def middle_launches(problem: Problem, arch: str) -> tuple[list[Launch], list[Launch]]:
    """(forward, backward) of the fused middle; nothing backward in evaluation. In training the module's running
    statistics are the forward's last launch."""
    middle: Any = middle_of(problem)
    with recording(arch) as launches:
        middle.to_empty(device="cuda")
        y = _map(problem, problem.concepts * problem.p)
        out, *found, saved = run_forward(middle, y)
        if middle.training:
            norms = [(middle.bn, found[:2]), (middle.reasoner.bn, found[2:])]
            move([move_of(norm, *statistics) for norm, statistics in norms if norm.training])
        forward = launches.copy()
        launches.clear()
        if middle.training:
            run_backward(middle, y, torch.empty_like(out), saved)
    return forward, launches


def middle_of(problem: Problem) -> nn.Module:
    """The module, in the problem's mode."""
    middle = VisualConceptReasoning(
        problem.concepts * problem.p,
        problem.concepts,
        sampler=problem.sampler,
        edges=problem.edges,
        modulation=problem.modulation,
        affine=problem.affine,
    ).train(problem.mode in ("training", "steps"))
    middle.reasoner.bn.train(middle.training and not problem.frozen)
    return middle


def run_forward(middle: Any, y: Tensor) -> tuple[Tensor, ...]:
    """What the op ``vcr_middle`` returns on Triton; ``saved`` is the last."""
    triton = importlib.import_module("vcr_ops.ops.vcr_middle.triton")
    return triton.forward(*op_arguments(y, middle.bn, middle, "whole", middle.training), middle.training)


def run_backward(middle: Any, y: Tensor, grad_out: Tensor, saved: Tensor) -> tuple[Tensor, ...]:
    """What the op ``vcr_middle_backward`` returns on Triton, in training."""
    triton = importlib.import_module("vcr_ops.ops.vcr_middle.triton")
    arguments = op_arguments(y, middle.bn, middle, "whole", True)
    tensors = (y, *learned_of(arguments), saved)
    return triton.backward(grad_out, *tensors, arguments[18], arguments[10] is None, *arguments[21:])


def op_launches(problem: Problem, arch: str) -> list[Launch]:
    """Of the three ops alone, forward and backward."""
    concepts, p, pt = problem.concepts, problem.p, max(problem.p // 4, 4)
    sample, reason, modulate = (
        importlib.import_module(f"vcr_ops.ops.concept_{name}.triton") for name in ("sample", "reason", "modulate")
    )
    with recording(arch) as launches:
        z = _map(problem, concepts * p)

        def small(*shape: int) -> Tensor:
            return torch.empty(shape, device="cuda")

        pixel, dynamic = problem.modulation == "pixel", problem.sampler == "dynamic"
        query, key = (small(concepts, p, pt), small(concepts, p, pt)) if dynamic else (None, None)
        weights = (small(concepts, p, pt), query, key, small(concepts, p) if problem.sampler == "static" else None)
        h, attention, saved = sample.forward(z, *weights, problem.sampler, pixel, True)
        edge = {"dynamic": small(pt, concepts), "static": small(concepts, concepts), "none": None}[problem.edges]
        norm = (small(pt), small(pt))
        state, _, _, reasoned = reason.forward(h, edge, None, None, *norm, 1e-5, problem.edges, True)
        scale = small(concepts, pt, p) if problem.affine != "shift" else None
        shift = small(concepts, pt, p) if problem.affine != "scale" else None
        parameters = (scale, shift, small(concepts, p), small(concepts, p), attention if pixel else None)
        out = modulate.forward(z, state, *parameters)
        modulate.backward(torch.empty_like(out), z, state, *parameters)
        reason.backward(torch.empty_like(state), h, edge, *norm, reasoned, problem.edges, True)
        dattention = torch.empty_like(attention) if pixel else None
        sample.backward(torch.empty_like(h), dattention, z, *weights, saved, problem.sampler)
    return launches


def step_launches(problem: Problem, arch: str) -> tuple[list[Launch], dict[str, tuple[Any, Any]]]:
    """Of the steps of a synchronised middle, and what each returned beside what its fake kernel says."""
    steps, synced = (importlib.import_module(f"vcr_ops.ops.vcr_middle.{name}") for name in ("triton_steps", "synced"))
    middle = middle_of(problem)
    found: dict[str, tuple[Any, Any]] = {}
    fakes = ("stats", "states", "modulate", "sums", "backward_states", "input")

    with recording(arch) as launches:
        middle.to_empty(device="cuda")
        y = _map(problem, problem.concepts * problem.p)

        def step(name: str, *arguments: Any) -> Any:
            fake = getattr(synced, f"_fake_{fakes[len(found)]}")
            found[name] = getattr(steps, f"vcr_middle_{name}")(*arguments), fake(*arguments)
            return found[name][0]

        arguments = op_arguments(y, middle.bn, middle, "whole", True)
        learned, variant = learned_of(arguments), ("given", *arguments[21:])
        statistics = step("stats", y, problem.concepts).float()
        saved, state_norm = step(
            "states", y, *statistics, *learned[:7], *learned[11:], variant[0], arguments[19], *variant[1:]
        )
        out, late = step("modulate", y, *learned, saved, state_norm, *variant)
        grad = torch.empty_like(out)
        summed, sums, *_ = step("backward_sums", grad, y, *learned, saved, late, state_norm, *variant)
        attended, shares, *_ = step("backward_states", y, *learned, saved, late, state_norm, summed, sums, *variant)
        step("backward_input", grad, y, *learned, saved, late, summed, attended, shares, *variant)
    return launches, found


def _map(problem: Problem, channels: int) -> Tensor:
    y = torch.empty(problem.n, channels, problem.size, problem.size, device="cuda", dtype=problem.dtype)
    return y.to(memory_format=torch.channels_last) if problem.layout == "channels_last" else y
