"""Proves: NaN comes out exactly where the reference puts it, and nothing that isn't finite is ever hidden.

So does ±inf in a map or a state, where no batch statistics are taken over it. The composite's middle is held to less
with the pool sampler: it folds alpha * (s * y + b) to (alpha * s) * y + alpha * b, so that an infinite alpha may give
NaN where the reference has ±inf, or the 0 that ReLU makes of -inf. With batch statistics, what isn't finite in the
reference isn't finite here. In gradients, plain PyTorch spreads NaN over a whole row where it multiplies it by zero
(amax, softmax); here it must be found in every tensor where plain PyTorch has it.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from . import grid
from .backends import BACKENDS, with_backends
from .ops import adapters

ADAPTERS = adapters()
INFINITE = {"inf": math.inf, "-inf": -math.inf}
LAYOUTS = ["contiguous", "channels_last"]
SIZE = "N3C4p16S49"
PER_IMAGE = ("z", "y", "h", "state")


def cases():
    """One of each sampler, modulation and kind of statistics."""
    for op, adapter in ADAPTERS.items():
        seen = {}
        for case in adapter.variants(dtype="f32", size=SIZE):
            edges = case.edges if op == "concept_reason" else None
            seen.setdefault((case.sampler, case.modulation, case.state, edges), case)
        for case in seen.values():
            yield from (case.but(layout=layout) for layout in (LAYOUTS if adapter.maps else [None]))


CASES = list(cases())
SOME = [case.but(size=grid.SMALL) for case in CASES[::5]]  # for the interpreter
with_every = with_backends(CASES, SOME, CASES)


def poison(x: torch.Tensor, value: float) -> None:
    """One element, in the middle."""
    x.view(-1)[x.numel() // 2 + 1] = value


def outputs_with(case, backend, clean, name, value):
    """(ours, the reference's) with one bad element in an input."""
    adapter = ADAPTERS[case.op]
    inputs = {k: x.clone() for k, x in clean.items()}
    poison(inputs[name], value)
    with torch.no_grad():
        leaves = adapter.leaves(inputs, case)
        return adapter.ours(leaves, case, backend), adapter.reference(leaves, case)


@with_every
def test_nan_in_any_input(case, backend):
    clean, _ = ADAPTERS[case.op].draw(case)
    for name in clean:
        ours, plain = outputs_with(case, backend, clean, name, math.nan)
        for output, x in plain.items():
            assert torch.equal(ours[output].isnan(), x.isnan()), f"NaN in {name}: {output}"
            assert torch.equal(ours[output].isinf(), x.isinf()), f"NaN in {name}: {output}"


@pytest.mark.parametrize("value", INFINITE.values(), ids=INFINITE)
@with_every
def test_inf_in_a_map_or_state(case, value, backend):
    folded = backend == "composite" and case.op == "vcr_middle" and case.sampler == "pool"
    middle_image = case.shape[0] // 2
    for index in range(4):  # what an infinity becomes hangs on the weights' signs
        clean, _ = ADAPTERS[case.op].draw(case, index)
        for name in [name for name in clean if name in PER_IMAGE]:
            ours, plain = outputs_with(case, backend, clean, name, value)
            for output, x in plain.items():
                hidden = ours[output].isfinite() & ~x.isfinite()
                assert not hidden.any(), f"{value} in {name}: {output} is finite"
                if "batch" in (case.norm, case.state):
                    continue
                for n in range(case.shape[0]):
                    if n != middle_image:
                        assert ours[output][n].isfinite().all(), f"{value} in {name}: {output} of another image"
                for kind in (torch.isnan, torch.isposinf, torch.isneginf) if not folded else ():
                    assert torch.equal(kind(ours[output]), kind(x)), f"{value} in {name}: {kind.__name__} of {output}"


@pytest.mark.parametrize("value", [math.nan, *INFINITE.values()], ids=["nan", *INFINITE])
@with_every
def test_gradients(case, value, backend):
    """GradScaler looks for it, in each tensor."""
    adapter = ADAPTERS[case.op]
    inputs, gradients = adapter.draw(case)
    for name in gradients:
        bad = {k: x.clone() for k, x in gradients.items()}
        poison(bad[name], value)
        ours = adapter.our_result(inputs, bad, case, backend).gradients
        plain = adapter.plain_result(inputs, bad, case).gradients
        for which, x in plain.items():
            assert x.isfinite().all() or not ours[which].isfinite().all(), f"{value} in d{name}: d{which} is finite"


GIVEN_MEAN = {"concept_reason": "mean", "vcr_middle": "state_mean"}
GIVEN = [case for case in CASES if case.state == "given"]
SOME_GIVEN = [
    case for case in GIVEN if case.op == "concept_reason" or (case.layout == LAYOUTS[0]) == (case.norm == "given")
]


@pytest.mark.parametrize("value", INFINITE.values(), ids=INFINITE)
@with_backends(GIVEN, [case.but(size=grid.SMALL) for case in SOME_GIVEN], GIVEN)
def test_inf_in_the_given_mean_of_states(case, value, backend):
    """A state is then 0 or infinite, forward and backward alike. Pixel modulation folds M (alpha z + beta) to M alpha y
    + M (alpha b + beta), where infinities may cancel: it is held to less, as is the composite."""
    adapter = ADAPTERS[case.op]
    inputs, gradients = adapter.draw(case)
    poison(inputs[GIVEN_MEAN[case.op]], value)
    ours = adapter.our_result(inputs, gradients, case, backend)
    plain = adapter.plain_result(inputs, gradients, case)
    kinds = (
        (torch.isnan, torch.isposinf, torch.isneginf) if backend != "composite" and case.modulation != "pixel" else ()
    )
    for which, x in plain.outputs.items():
        assert not (ours.outputs[which].isfinite() & ~x.isfinite()).any(), f"{value}: {which} is finite"
        for kind in kinds:
            assert torch.equal(kind(ours.outputs[which]), kind(x)), f"{value}: {kind.__name__} of {which}"
    if case.op == "concept_reason":
        assert_close(ours.gradients, plain.gradients, rtol=1e-3, atol=1e-3, equal_nan=True)
    elif value > 0:  # states of 0, and nothing else
        assert all(x.isfinite().all() for x in plain.outputs.values())
        for which, x in (plain.outputs | plain.gradients).items():
            assert torch.equal((ours.outputs | ours.gradients)[which].isfinite(), x.isfinite()), f"{value}: {which}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("modulation", grid.MODULATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_passes_relu_backward(modulation, layout, backend):
    """The gradient goes through where the pre-activation is NaN, as PyTorch's ReLU lets it."""
    adapter = ADAPTERS["concept_modulate"]
    size = grid.SMALL if backend == "triton" else SIZE
    case = grid.Case("concept_modulate", modulation=modulation, affine="both", layout=layout, size=size)
    inputs, gradients = adapter.draw(case)
    poison(inputs["z"], math.nan)
    ours = adapter.our_result(inputs, gradients, case, backend).tensors()
    plain = adapter.plain_result(inputs, gradients, case).tensors()
    assert plain["out"].isnan().sum() == 1
    for name, x in plain.items():
        if name != "dattention":  # plain PyTorch's amax multiplies NaN by zero
            assert torch.equal(ours[name].isnan(), x.isnan()), name
