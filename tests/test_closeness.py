"""Proves: the tolerance lets through an error of at most twice plain PyTorch's, and nothing looser."""

import math

import pytest
import torch

from .closeness import Closeness, Result

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
IDS = ["f32", "f64", "bf16"]


def noise(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draws(dtype, ours_times, plain_error=None, count=10, shape=(200,), gradient_zero=False, seed=0):
    """Results whose errors are normal: plain's of the given relative size, ours ``ours_times`` as large."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.finfo(dtype).eps
    plain_error = 40 * eps if plain_error is None else plain_error
    closeness = Closeness(dtype, "a test")
    for _ in range(count):
        results = [Result({}, {}) for _ in range(3)]
        for kind, name in (("outputs", "out"), ("gradients", "y"), ("gradients", "w"), ("gradients", "zero")):
            reference = noise(shape, generator)
            if name == "zero":
                reference = reference * (1e-16 if gradient_zero else 1)
            plain = reference + plain_error * noise(shape, generator)
            ours = reference + plain_error * ours_times * noise(shape, generator)
            for result, tensor in zip(results, (ours, plain, reference), strict=True):
                getattr(result, kind)[name] = tensor
        closeness.add(*results)
    return closeness


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("times", [0.0, 0.5, 1.0, 1.7])
def test_at_most_twice_passes(dtype, times):
    draws(dtype, times).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("times", [3.0, 30.0])
def test_three_times_fails(dtype, times):
    closeness = draws(dtype, times)
    with pytest.raises(AssertionError, match="too far"):
        closeness.check()
    for name in ("out", "dy", "dw", "dzero"):
        for norm in ("2-norm", "maximum norm"):
            assert any(line.startswith(f"{name}, {norm}") for line in closeness.failures())


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_one_rounding_is_added(dtype):
    eps = torch.finfo(dtype).eps
    for error, passes in ((0.9 * eps, True), (3 * eps, False)):
        closeness = Closeness(dtype)
        for _ in range(5):
            exact = torch.ones(4, dtype=torch.float64)
            closeness.add(Result({"out": exact * (1 + error)}), Result({"out": exact}), Result({"out": exact}))
        assert (not closeness.failures()) == passes


def test_one_wrong_element_fails_in_the_maximum_norm():
    closeness = Closeness(torch.float32, "one element")
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        reference = noise((7, 1000), generator)
        plain = reference + 1e-6 * noise((7, 1000), generator)
        ours = reference + 1e-6 * noise((7, 1000), generator)
        ours[3, 17] += 3e-5
        closeness.add(Result({"out": ours}), Result({"out": plain}), Result({"out": reference}))
    lines = closeness.failures()
    assert len(lines) == 1
    assert "maximum norm" in lines[0]
    assert "[3, 17] of draw" in lines[0]


def test_the_message_names_both_errors_and_the_worst_index():
    closeness = Closeness(torch.float32, "sample-dynamic-f32")
    for _ in range(5):
        reference = torch.ones(3, 4, dtype=torch.float64)
        plain, ours = reference.clone(), reference.clone()
        plain[0, 0], ours[2, 1] = 1 + 1e-6, 1.5
        closeness.add(Result({"h": ours}), Result({"h": plain}), Result({"h": reference}))
    with pytest.raises(AssertionError) as caught:
        closeness.check()
    text = str(caught.value)
    assert "sample-dynamic-f32" in text
    assert "error 0.144" in text  # 0.5 / sqrt(12)
    assert "plain PyTorch's 2.89e-07" in text
    assert "[2, 1] of draw 0: 1.5, reference 1" in text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails(value):
    closeness = Closeness(torch.float32)
    for _ in range(5):
        reference = torch.ones(4, dtype=torch.float64)
        ours = reference.clone()
        ours[2] = value
        closeness.add(Result({"out": ours}), Result({"out": reference}), Result({"out": reference}))
    assert len(closeness.failures()) == 2
    assert "[2] of draw 0" in closeness.failures()[0]


def test_a_gradient_that_is_zero_in_theory_is_judged_beside_the_others():
    draws(torch.float32, 1.0, gradient_zero=True).check()
    assert draws(torch.float32, 3.0, gradient_zero=True).failures()
    # Plain PyTorch may get exactly zero; then one rounding of the other gradients' size is what is left.
    for error, passes in ((1e-8, True), (1e-5, False)):
        closeness = Closeness(torch.float32)
        for _ in range(5):
            one, zero = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
            closeness.add(
                Result({}, {"y": one, "key": zero + error}),
                Result({}, {"y": one, "key": zero}),
                Result({}, {"y": one, "key": zero}),
            )
        assert (not closeness.failures()) == passes


def test_a_small_gradient_is_not_taken_for_zero():
    closeness = Closeness(torch.float32)
    for _ in range(5):
        one = torch.ones(4, dtype=torch.float64)
        closeness.add(
            Result({}, {"y": one, "key": 1.01e-6 * one}),
            Result({}, {"y": one, "key": 1e-6 * one}),
            Result({}, {"y": one, "key": 1e-6 * one}),
        )
    assert closeness.failures()


def test_few_draws_are_refused():
    with pytest.raises(AssertionError, match="4 draws"):
        draws(torch.float32, 1.0, count=4).check()


def test_shapes_and_names_must_agree():
    one = torch.ones(2)
    with pytest.raises(AssertionError, match="shape"):
        Closeness(torch.float32).add(Result({"h": one[:1]}), Result({"h": one}), Result({"h": one}))
    with pytest.raises(AssertionError):
        Closeness(torch.float32).add(Result({}), Result({"h": one}), Result({"h": one}))


def test_empty_tensors_pass():
    closeness = Closeness(torch.float32)
    for _ in range(5):
        closeness.add(*(Result({"out": torch.ones(0, 3)}) for _ in range(3)))
    closeness.check()
