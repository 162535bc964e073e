"""Proves that the tests can fail: faults that kernels are known to have are put into results or into the arithmetic,
and the tolerance catches every one of them."""

import numpy as np
import pytest
import torch

import vcr_ops

from .closeness import Closeness, Result
from .ops import adapters

ADAPTERS = adapters()
LAYOUTS = ["contiguous", "channels_last"]


def case_of(op, **fixed):
    every = ADAPTERS[op].variants(**{"dtype": "f32", "size": "N3C4p16S49"} | fixed)
    return next((c for c in every if c.modulation == "pixel" and c.affine in ("both", None)), every[0])


def caught(case, change, *tensors):
    """The failures that a fault makes, each of the tensors among them; without it there are none."""
    adapter = ADAPTERS[case.op]
    adapter.closeness(case, "composite").check()
    failures = adapter.closeness(case, "composite", change).failures()
    for name in tensors:
        assert any(line.startswith(f"{name},") for line in failures), (name, failures)
    return failures


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op, name", [("vcr_middle", "out"), ("concept_modulate", "out")])
def test_last_position_is_not_written(op, name, layout):
    """49 = 3 * 16 + 1 positions: a vector loop without its tail."""

    def change(ours: Result, inputs, gradients):
        ours.outputs[name].flatten(2)[..., -1] = 0

    caught(case_of(op, layout=layout), change, name)


@pytest.mark.parametrize("op, name", [("vcr_middle", "y"), ("concept_sample", "z"), ("concept_modulate", "z")])
def test_last_gradient_is_not_written(op, name):
    def change(ours: Result, inputs, gradients):
        ours.gradients[name].flatten(2)[..., -1] = 0

    caught(case_of(op), change, f"d{name}")


def test_sum_without_its_tail():
    """The last position is missing in the sums over positions, of one image."""

    def change(ours: Result, inputs, gradients):
        last = gradients["out"][0, :, -1, -1] * (ours.outputs["out"][0, :, -1, -1] > 0)
        ours.gradients["shift_bias"] -= last.reshape(4, 16).float()

    caught(case_of("vcr_middle"), change, "dshift_bias")


def test_state_of_one_concept_is_swapped_with_its_neighbour():
    def change(ours: Result, inputs, gradients):
        ours.outputs["state"] = ours.outputs["state"][:, [1, 0, 2, 3]]

    caught(case_of("concept_reason"), change, "state")


def wrong_gradient(case, term):
    """dy of the composite, less what flows through one op of it."""

    def change(ours: Result, inputs, gradients):
        adapter = ADAPTERS[case.op]
        with term:
            ours.gradients |= adapter.our_result(inputs, gradients, case, "composite").gradients

    return change


class detached:
    """Within: the results of a function of torch carry no gradient."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.kept = getattr(torch, self.name)
        setattr(torch, self.name, lambda *a, **k: self.kept(*a, **k).detach())

    def __exit__(self, *_):
        setattr(torch, self.name, self.kept)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["tanh", "softmax", "amax", "rsqrt"])
def test_gradient_term_is_left_out(name, layout):
    """No gradient through the edges, the attention, its maximum, or the batch's variance."""
    case = case_of("vcr_middle", layout=layout)
    caught(case, wrong_gradient(case, detached(name)), "dy")


def test_gradient_without_the_batch_mean():
    """The batch's statistics taken as constants, as evaluation takes them: c0 and c1 are missing in dy."""
    case = case_of("vcr_middle")

    def change(ours: Result, inputs, gradients):
        y = inputs["y"].float()
        given = {"norm_mean": y.mean((0, 2, 3)), "norm_var": y.var((0, 2, 3), correction=0)}
        adapter = ADAPTERS["vcr_middle"]
        frozen = case.but(norm="given")
        ours.gradients["y"] = adapter.our_result(inputs | given, gradients, frozen, "composite").gradients["y"]

    caught(case, change, "dy")


def statistics_case():
    return case_of("vcr_middle").but(offset="offset")


def test_variance_from_the_mean_of_squares():
    """E[y²] − E[y]² loses the variance where the mean is large, in float32."""

    def change(ours: Result, inputs, gradients):
        y = inputs["y"].float()
        count = y.numel() / y.shape[1]
        mean = y.mean((0, 2, 3))
        var = y.square().mean((0, 2, 3)) - mean.square()
        given = {"norm_mean": mean, "norm_var": var}
        frozen = case.but(norm="given")
        wrong = ADAPTERS["vcr_middle"].our_result(inputs | given, gradients, frozen, "composite")
        ours.outputs |= {"out": wrong.outputs["out"], "norm_var": var * (count / (count - 1))}

    case = statistics_case()
    adapter = ADAPTERS["vcr_middle"]
    failures = adapter.closeness(case, "composite", change).failures()
    for name in ("out", "norm_var"):
        assert any(line.startswith(f"{name},") for line in failures), failures


def test_biased_variance_is_returned():
    def change(ours: Result, inputs, gradients):
        count = inputs["y"].numel() / inputs["y"].shape[1]
        ours.outputs["norm_var"] *= (count - 1) / count

    caught(case_of("vcr_middle"), change, "norm_var")


def test_one_long_sum():
    """A running float32 sum over all positions, where PyTorch sums in blocks."""
    generator = torch.Generator().manual_seed(0)
    closeness = Closeness(torch.float32, "one long sum")
    for _ in range(5):
        x = torch.rand(4, 20_000, generator=generator)
        long = torch.from_numpy(np.cumsum(x.numpy(), 1)[:, -1].copy())  # one float32 sum after the other
        closeness.add(Result({"sum": long}), Result({"sum": x.sum(1)}), Result({"sum": x.double().sum(1)}))
    assert closeness.failures()


@pytest.mark.parametrize("op", ["concept_sample", "concept_modulate", "vcr_middle"])
def test_memory_is_read_before_it_is_written(op, nan_memory):
    """Fresh memory is NaN under the fixture, so that an element nobody wrote shows."""

    def change(ours: Result, inputs, gradients):
        name = next(iter(ours.outputs))
        ours.outputs[name][..., -1] = torch.empty(ours.outputs[name].shape[:-1])

    case = case_of(op)
    name = next(iter(ADAPTERS[op].reference(ADAPTERS[op].draw(case)[0], case.but(dtype="f64"))))
    assert caught(case, change, name)


def test_accumulation_in_bfloat16():
    """The small algebra in bfloat16 gives bfloat16's errors, which float32 features show at once."""
    case = case_of("concept_sample")

    def change(ours: Result, inputs, gradients):
        low = {name: x.bfloat16() for name, x in inputs.items()}
        ours.outputs |= ADAPTERS["concept_sample"].ours(low, case, "composite")

    caught(case, change, "h")


def test_the_real_op_passes():
    """The cases above, without a fault, on the C++ ops."""
    assert vcr_ops.library.has_library()
    for op in ADAPTERS:
        ADAPTERS[op].closeness(case_of(op), "cpp").check()
