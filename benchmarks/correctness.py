"""Is a side right? Asked before it is timed: the speed of a wrong result is not reported.

Errors are taken against the literal equations in float64 and judged by what plain PyTorch (the literal equations in the
case's own type) loses: ``err(side) <= 2 err(plain) + eps(type)``, for the output and every gradient, in the 2-norm and
in the maximum norm, each error being the root mean square over five draws. The first draw of a middle is the timed
batch itself; the others, and all draws of blocks and networks, are small batches of other images with other parameters.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cases import Case, Inputs, inputs_for
from .providers import PROVIDERS, Provider, Workload

DRAWS = 5
IMAGES = 2  # of a small draw
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
_references: OrderedDict[tuple[Case, int], Tensors] = OrderedDict()


def _draw(case: Case, draw: int) -> Inputs:
    if case.level == "middle" and draw == 0:
        return inputs_for(case)
    size = case.image_size // 2 if case.level == "network" and case.image_size >= 128 else None
    return inputs_for(case, draw, images=IMAGES, image_size=size)


def _tensors(case: Case, provider: Provider, inputs: Inputs, dtype: torch.dtype | None = None) -> Tensors:
    return Workload(case, provider.module(case, inputs, dtype), inputs).tensors()


def _reference(case: Case, draw: int, inputs: Inputs) -> Tensors:
    """The literal equations in float64; kept for the case in the other layout, which has the same numbers."""
    key = (replace(case, layout="contiguous"), draw)
    if key not in _references:
        _references[key] = _tensors(case, PROVIDERS["reference"], inputs.cast(torch.float64), torch.float64)
        while len(_references) > DRAWS:
            _references.popitem(last=False)
    return _references[key]


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


def check(case: Case, providers: list[Provider], draws: int = DRAWS) -> dict[str, Verdict | Exception]:
    """A verdict on each provider (eager ones; what is compiled is an eager side's code), or what it raised."""
    plain: list[Errors] = []
    sides: dict[str, list[Errors]] = {provider.name: [] for provider in providers}
    raised: dict[str, Exception] = {}
    for draw in range(draws):
        inputs = _draw(case, draw)
        reference = _reference(case, draw, inputs)
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


def check_compiled(case: Case, workload: Workload, inputs: Inputs) -> Verdict:
    """A verdict on a compiled side from the timed batch alone: other shapes would be compiled anew."""
    if case.level == "middle":
        reference = _reference(case, 0, inputs)
    else:
        reference = _tensors(case, PROVIDERS["reference"], inputs.cast(torch.float64), torch.float64)
    plain = _relative(_tensors(case, PROVIDERS["reference"], inputs), reference)
    errors = _relative(workload.tensors(), reference)
    eps = torch.finfo(case.torch_dtype).eps
    return Verdict({name: Error(*errors[name], *plain[name], eps) for name in reference})
