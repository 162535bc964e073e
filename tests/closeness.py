"""The tolerance, the only one: how far a result may stand from the float64 reference.

For each output and each gradient, tensor by tensor, once in the 2-norm and once in the maximum norm,

    err(ours) <= 2 * err(plain) + eps(dtype),        err(x) = ‖x - reference‖ / ‖reference‖

where ``plain`` is the literal equations in plain PyTorch in the same types, and each side's error is the root mean
square over at least five random draws. Three things that this sentence leaves open:

- The norm of the reference is a root mean square over the draws as well. Divided draw by draw, the one draw in which
  a tensor of few elements comes out near zero would outweigh all the others.
- A gradient that is zero in theory (its reference is 1e-11 of the others or less) is divided by the median norm of the
  other gradients instead.
- float64 can't judge float64: the reference of float64 results is in long double (extended.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

FACTOR = 2.0
MINIMUM_DRAWS = 5
ZERO_IN_THEORY = 1e-11


@dataclass
class Result:
    """What one side computed in one draw: outputs, and gradients by the name of what they are gradients of."""

    outputs: dict[str, Any]
    gradients: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Any]:
        return self.outputs | {f"d{name}": gradient for name, gradient in self.gradients.items()}


@dataclass
class _Sums:
    """Sums over the draws of one tensor's squared norms; [0] is the 2-norm's, [1] the maximum norm's."""

    ours: list[float] = field(default_factory=lambda: [0.0, 0.0])
    plain: list[float] = field(default_factory=lambda: [0.0, 0.0])
    reference: list[float] = field(default_factory=lambda: [0.0, 0.0])
    worst: float = -1.0
    worst_at: str = ""


def _fine(x: Tensor | np.ndarray) -> np.ndarray:
    """Long double, which holds every other type."""
    return x.detach().cpu().double().numpy().astype(np.longdouble) if isinstance(x, Tensor) else x.astype(np.longdouble)


def _norms(x: np.ndarray) -> tuple[float, float]:
    if x.size == 0:
        return 0.0, 0.0
    return float(np.sqrt(np.square(x).sum())), float(np.abs(x).max())


class Closeness:
    """Collect draws with ``add``, then ``check``.

    Args:
        dtype: the features' type.
        label: what the message calls the results.
    """

    def __init__(self, dtype: torch.dtype, label: str = "") -> None:
        self.dtype, self.label, self.draws = dtype, label, 0
        self.sums: dict[str, _Sums] = {}

    def add(self, ours: Result, plain: Result, reference: Result) -> None:
        """Take one draw. The reference is in float64, or in long double where ``dtype`` is float64."""
        self.draws += 1
        us, them, right = ours.tensors(), plain.tensors(), reference.tensors()
        assert us.keys() == them.keys() == right.keys(), (sorted(us), sorted(them), sorted(right))
        for name in right:
            x, y, r = (_fine(side[name]) for side in (us, them, right))
            assert x.shape == r.shape, f"{self.label} {name}: shape {x.shape}, not {r.shape}"
            sums = self.sums.setdefault(name, _Sums())
            with np.errstate(invalid="ignore"):
                differences = x - r, y - r, r
            for total, values in zip((sums.ours, sums.plain, sums.reference), differences, strict=True):
                for i, norm in enumerate(_norms(values)):
                    total[i] += norm**2
            self._note_worst(sums, x, r, differences[0])

    def _note_worst(self, sums: _Sums, x: np.ndarray, r: np.ndarray, difference: np.ndarray) -> None:
        if x.size == 0:
            return
        distance = np.nan_to_num(np.abs(difference), nan=math.inf, posinf=math.inf)
        at = np.unravel_index(int(distance.argmax()), x.shape)
        if float(distance[at]) > sums.worst:
            sums.worst = float(distance[at])
            index = [int(i) for i in at]
            sums.worst_at = f"{index} of draw {self.draws - 1}: {x[at]:.9g}, reference {r[at]:.9g}"

    def _scale(self, name: str, i: int) -> float:
        """The root mean square norm that errors of ``name`` are divided by."""
        own = math.sqrt(self.sums[name].reference[i])
        if self._is_gradient(name):
            others = [math.sqrt(s.reference[i]) for n, s in self.sums.items() if n != name and self._is_gradient(n)]
            others = [x for x in others if x > 0]
            if others and own <= ZERO_IN_THEORY * median(others):
                own = median(others)
        own /= math.sqrt(self.draws)
        return own if own > 0 else 1.0

    def _is_gradient(self, name: str) -> bool:
        return name.startswith("d")

    def errors(self, name: str) -> list[tuple[float, float, float]]:
        """(ours, plain's, the limit), in the 2-norm and in the maximum norm."""
        sums, result = self.sums[name], []
        eps = torch.finfo(self.dtype).eps
        for i in (0, 1):
            scale = self._scale(name, i)
            ours, plain = (math.sqrt(total[i] / self.draws) / scale for total in (sums.ours, sums.plain))
            result.append((ours, plain, FACTOR * plain + eps))
        return result

    def worst_ratio(self) -> float:
        """The largest error in units of its limit."""
        pairs = [(ours, limit) for name in self.sums for ours, _, limit in self.errors(name)]
        return max((ours / limit if limit else math.inf for ours, limit in pairs), default=0.0)

    def failures(self) -> list[str]:
        """One line for each tensor that is too far away, in each norm."""
        lines = []
        for name, sums in self.sums.items():
            for norm, (ours, plain, limit) in zip(("2-norm", "maximum norm"), self.errors(name), strict=True):
                if not ours <= limit:  # a NaN fails
                    ratio = ours / limit if limit else math.inf
                    lines.append(
                        f"{name}, {norm}: error {ours:.3g}, plain PyTorch's {plain:.3g}, limit {limit:.3g} "
                        f"({ratio:.2f} of it); worst at {sums.worst_at}"
                    )
        return lines

    def check(self) -> None:
        """Raise AssertionError unless every tensor is close enough."""
        assert self.draws >= MINIMUM_DRAWS, f"{self.draws} draws; one draw is luck, {MINIMUM_DRAWS} are needed"
        lines = self.failures()
        assert not lines, "\n".join([f"{self.label}: too far from the float64 reference", *lines])

    def report(self) -> str:
        """A table of all errors, for reading."""
        rows = [f"{self.label} ({self.draws} draws)"]
        for name in self.sums:
            cells = (f"{ours:9.2e} {plain:9.2e} {ours / limit:5.2f}" for ours, plain, limit in self.errors(name))
            rows.append(f"  {name:16s} {'   '.join(cells)}")
        return "\n".join(rows)
