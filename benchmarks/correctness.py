"""Is a side right? Asked before it is timed: the speed of a wrong result is not reported.

Errors are taken against the literal equations in float64 and judged by what plain PyTorch (the literal equations in the
case's own type) loses: ``err(side) <= 2 err(plain) + eps(type)``, for the output and every gradient, in the 2-norm and
in the maximum norm, each error being the root mean square over at least five draws. The first draw of a middle is the
whole batch; the others, and all draws of blocks and networks, are small batches of other images with other parameters.

A gradient jumps where a ReLU's argument rounds to the other side of 0, for one side and not for another, and a single
such element outweighs all rounding. So ``grad_out`` is 0 where the last ReLU's argument is that close, and a draw with
such an argument in a ReLU further in is replaced by another. Neither can be done in a whole network's fifty layers: its
gradients are judged as one vector, in which many such elements average out.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import Case, Inputs, inputs_for
from .providers import PROVIDERS, Provider, Workload

# In half precision a ReLU's argument near 0 can't be avoided, only averaged: more draws.
DRAWS = {"float32": 5, "bfloat16": 15, "float16": 15}
NETWORK_DRAWS = 5
# A ReLU's argument of less than this, relative to the root mean square, may round to either side of 0.
KINK = 5e-6
# Below this share of the largest gradient, a float64 gradient is zero in theory and judged on the scale of the others.
ZERO = 1e-10


@dataclass(frozen=True)
class Error:
    """Root mean square over the draws of one tensor's relative error, beside plain PyTorch's."""

    norm2: float
    largest: float
    plain_norm2: float
    plain_largest: float
    eps: float

    @property
    def excess(self) -> float:
        """Error over what the rule allows, in the worse norm; more than 1 (or NaN) fails."""
        two = self.norm2 / (2 * self.plain_norm2 + self.eps)
        top = self.largest / (2 * self.plain_largest + self.eps)
        return math.nan if math.isnan(two) or math.isnan(top) else max(two, top)


@dataclass(frozen=True)
class Verdict:
    """Errors of every tensor of a side."""

    errors: dict[str, Error]

    @property
    def worst(self) -> str:
        """The tensor nearest to its limit, or furthest beyond it."""
        return max(self.errors, key=lambda name: math.inf if math.isnan(e := self.errors[name].excess) else e)

    @property
    def ok(self) -> bool:
        return all(error.excess <= 1 for error in self.errors.values())

    def __str__(self) -> str:
        error = self.errors[self.worst]
        return (
            f"{self.worst}: error {error.norm2:.2e} (largest {error.largest:.2e}) against float64, "
            f"plain PyTorch {error.plain_norm2:.2e} (largest {error.plain_largest:.2e})"
        )


Tensors = dict[str, Tensor]
Errors = dict[str, tuple[float, float]]  # of one draw: in the 2-norm, in the maximum norm


class _Draw(NamedTuple):
    number: int
    kinks: Tensor | None  # where grad_out is 0
    reference: Tensors


_draws: OrderedDict[tuple[Case, int, str], _Draw] = OrderedDict()


class _Arguments(TorchDispatchMode):
    """Notes where the arguments of each ReLU are within ``width`` of 0, relative to their root mean square."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width
        self.near: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default):
            size = args[0].abs()
            self.near.append(size < self.width * args[0].square().mean().sqrt())
        return func(*args, **(kwargs or {}))


def _inputs(case: Case, number: int, whole: bool, device: str) -> Inputs:
    if whole:
        return inputs_for(case, number, device=device)
    if case.level == "middle":
        return inputs_for(case, number, images=2, device=device)
    if case.level == "block":
        return inputs_for(case, number, images=2, corner=7, device=device)
    if case.mode == "train":
        return inputs_for(case, number, images=2, corner=64, device=device)
    # whole images of the batch that the running statistics come from: an untrained network overflows on others
    return inputs_for(case, number, images=1, device=device)


def _draw(case: Case, draw: int, device: str = "cpu") -> tuple[Inputs, Tensors]:
    """Inputs of a draw, and what the literal equations make of them in float64.

    The latter is kept for the case in the other layout, which has the same numbers.
    """
    key = (replace(case, layout="contiguous"), draw, device)
    whole = case.level == "middle" and draw == 0
    if key not in _draws:
        _draws[key] = _find(case, draw, whole, device)
        while len(_draws) > max(DRAWS.values()):
            _draws.popitem(last=False)
    found = _draws[key]
    return _without_kinks(_inputs(case, found.number, whole, device), found.kinks), found.reference


def _find(case: Case, draw: int, whole: bool, device: str) -> _Draw:
    number, kinks = draw, None
    case = replace(case, layout="contiguous")
    exact = _inputs(case, number, whole, device).cast(torch.float64)
    if case.mode == "train" and case.level != "network" and case.dtype == "float32":
        for number in range(draw, 50 * DRAWS[case.dtype], DRAWS[case.dtype]):
            exact = _inputs(case, number, whole, device).cast(torch.float64)
            with torch.no_grad(), _Arguments(KINK) as arguments:
                _module(case, PROVIDERS["reference"], exact, torch.float64)(exact.x)
            *inner, last = arguments.near
            kinks = last.reshape(exact.x.shape)
            if not any(bool(near.any()) for near in inner):
                break
    return _Draw(number, kinks, _tensors(case, PROVIDERS["reference"], _without_kinks(exact, kinks), torch.float64))


def _without_kinks(inputs: Inputs, kinks: Tensor | None) -> Inputs:
    if kinks is None or inputs.grad_out is None:
        return inputs
    # masked_fill would make a contiguous map of it, whatever its memory format
    return replace(inputs, grad_out=inputs.grad_out.clone().masked_fill_(kinks, 0))


def _tensors(case: Case, provider: Provider, inputs: Inputs, dtype: torch.dtype | None = None) -> Tensors:
    return _joined(case, Workload(case, _module(case, provider, inputs, dtype), inputs).tensors())


# Making a network takes longer than running it on two small images.
_made = functools.lru_cache(maxsize=6)(Provider.module)


def _module(case: Case, provider: Provider, inputs: Inputs, dtype: torch.dtype | None) -> nn.Module:
    return provider.load(_made(provider, case, dtype), inputs).to(inputs.x.device)


def _joined(case: Case, tensors: Tensors) -> Tensors:
    if case.level == "network" and case.mode == "train":
        output = tensors.pop("output")
        return {"output": output, "d parameters": torch.cat([t.flatten() for t in tensors.values()])}
    return tensors


def _relative(result: Tensors, reference: Tensors) -> Errors:
    """name -> error in the 2-norm and in the maximum norm, relative to the reference's norm."""
    norms = {name: (float(r.norm()), float(r.abs().max()) if r.numel() else 0.0) for name, r in reference.items()}
    gradients = [pair for name, pair in norms.items() if name != "output"]
    errors = {}
    for name, expected in reference.items():
        got = result[name]
        if got.shape != expected.shape:
            raise RuntimeError(f"{name} has shape {tuple(got.shape)}, the reference {tuple(expected.shape)}")
        difference = got.double() - expected
        pair = []
        for norm, which in ((float(difference.norm()), 0), (float(difference.abs().max()) if got.numel() else 0.0, 1)):
            scale = norms[name][which]
            if name != "output":
                top = max(g[which] for g in gradients)
                scale = top if scale <= ZERO * top else scale
            pair.append(norm / scale if scale else (0.0 if norm == 0 else math.inf))
        errors[name] = (pair[0], pair[1])
    return errors


def _root_mean_square(draws: list[Errors], name: str) -> tuple[float, float]:
    two, top = (math.sqrt(sum(draw[name][which] ** 2 for draw in draws) / len(draws)) for which in (0, 1))
    return two, top


def check(case: Case, providers: list[Provider], device: str = "cpu") -> dict[str, Verdict | Exception]:
    """A verdict on each provider (eager ones; what is compiled is an eager side's code), or what it raised."""
    plain: list[Errors] = []
    sides: dict[str, list[Errors]] = {provider.name: [] for provider in providers}
    raised: dict[str, Exception] = {}
    for draw in range(DRAWS[case.dtype] if case.level != "network" else NETWORK_DRAWS):
        inputs, reference = _draw(case, draw, device)
        literal = _tensors(case, PROVIDERS["reference"], inputs)
        plain.append(_relative(literal, reference))
        for provider in providers:
            if provider.name in raised:
                continue
            try:
                result = literal if provider.name == "reference" else _tensors(case, provider, inputs)
                sides[provider.name].append(_relative(result, reference))
            except Exception as error:
                raised[provider.name] = error
    eps = torch.finfo(case.torch_dtype).eps
    verdicts: dict[str, Verdict | Exception] = dict(raised)
    for name, found in sides.items():
        if name not in raised:
            errors = {t: Error(*_root_mean_square(found, t), *_root_mean_square(plain, t), eps) for t in found[0]}
            verdicts[name] = Verdict(errors)
    return verdicts


def timed_inputs(case: Case, device: str = "cpu") -> Inputs:
    """The inputs to time: a middle's are those of its first draw, so that what is timed is what was checked."""
    return _draw(case, 0, device)[0] if case.level == "middle" else inputs_for(case, device=device)


def check_compiled(case: Case, workload: Workload, inputs: Inputs) -> Verdict:
    """A verdict on a compiled side from the timed inputs alone: other shapes would be compiled anew.

    That is one draw, and for a block one with ReLUs near 0: it tells a broken side, not a slightly worse one.
    """
    if case.level == "middle":
        reference = _draw(case, 0, inputs.x.device.type)[1]
    else:
        reference = _tensors(case, PROVIDERS["reference"], inputs.cast(torch.float64), torch.float64)
    plain = _relative(_tensors(case, PROVIDERS["reference"], inputs), reference)
    errors = _relative(_joined(case, workload.tensors()), reference)
    eps = torch.finfo(case.torch_dtype).eps
    return Verdict({name: Error(*errors[name], *plain[name], eps) for name in reference})
