"""The arguments of the middle's ops by name. Schemas know no groups: there they stand one by one, in these orders."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

Returned = TypeVar("Returned")


class Learned(NamedTuple):
    """The parameters, or what there is for each of them; shapes: see ``visual_concept_reasoning``."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    value: Tensor
    query: Tensor | None
    key: Tensor | None
    logit: Tensor | None
    edge: Tensor | None
    state_weight: Tensor | None
    state_bias: Tensor | None
    scale_weight: Tensor | None
    shift_weight: Tensor | None
    scale_bias: Tensor
    shift_bias: Tensor


class Variant(NamedTuple):
    """What is computed."""

    norm: str
    sampler: str
    edges: str
    modulation: str


class Arguments(NamedTuple):
    """All of ``vcr_middle``, less ``save``."""

    y: Tensor
    norm_mean: Tensor | None
    norm_var: Tensor | None
    state_mean: Tensor | None
    state_var: Tensor | None
    learned: Learned
    norm_eps: float
    state_eps: float
    variant: Variant


def learned_of(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The parameters among ``vcr_middle``'s arguments, in the order of ``Learned``."""
    return (*arguments[3:10], *arguments[12:18])


def by_name(arguments: Sequence[Any]) -> Arguments:
    """The arguments of ``vcr_middle``'s schema; ``save`` is passed over."""
    y, norm_mean, norm_var = arguments[:3]
    state_mean, state_var = arguments[10:12]
    norm, norm_eps, state_eps, *others = arguments[18:24]
    learned, variant = Learned(*learned_of(arguments)), Variant(norm, *others)
    return Arguments(y, norm_mean, norm_var, state_mean, state_var, learned, norm_eps, state_eps, variant)


def grouped(step: Callable[..., Returned]) -> Callable[..., Returned]:
    """Decorator of a function with the arguments ``learned`` and, as its last, ``variant``: what is in them is given
    one by one, as the steps' schemas have it.
    """
    begin = list(inspect.signature(step).parameters).index("learned")
    end, options = begin + len(Learned._fields), len(Variant._fields)

    @functools.wraps(step)
    def flat(*arguments: Any) -> Returned:
        learned, variant = Learned(*arguments[begin:end]), Variant(*arguments[-options:])
        return step(*arguments[:begin], learned, *arguments[end:-options], variant)

    return flat
