"""Double backward works through the composite, and raises a clear error through the C++ ops: never a silent zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vcr_ops
from tests.small import BACKENDS, VARIANTS, feature_map, middle

C, P, PT = 2, 3, 4


def parameters(*shape: int, seed: int) -> Tensor:
    return feature_map(*shape, seed=seed, dtype=torch.float64).requires_grad_()


def ops(backend: str) -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    z = parameters(2, C * P, 2, 2, seed=1)
    w = [parameters(C, P, PT, seed=seed) for seed in (2, 3, 4)]
    b = [parameters(C, P, seed=seed) for seed in (5, 6)]
    v = [parameters(C, PT, P, seed=seed) for seed in (7, 8)]
    h, edge = parameters(2, C, PT, seed=9), parameters(PT, C, seed=10)

    def sample(z: Tensor, value: Tensor, query: Tensor, key: Tensor) -> Any:
        return vcr_ops.concept_sample(z, value, query=query, key=key, return_attention=True, backend=backend)

    def reason(h: Tensor, edge: Tensor) -> Tensor:
        return vcr_ops.concept_reason(h, edge, backend=backend).state

    def modulate(z: Tensor, h: Tensor, b0: Tensor, b1: Tensor, w0: Tensor, w1: Tensor) -> Tensor:
        return vcr_ops.concept_modulate(z, h, b0, b1, scale_weight=w0, shift_weight=w1, backend=backend)

    def whole(
        z: Tensor,
        value: Tensor,
        query: Tensor,
        key: Tensor,
        b0: Tensor,
        b1: Tensor,
        w0: Tensor,
        w1: Tensor,
        edge: Tensor,
    ) -> Tensor:
        return vcr_ops.visual_concept_reasoning(
            z, value, b0, b1, query=query, key=key, edge=edge, scale_weight=w0, shift_weight=w1, backend=backend
        ).out

    return {
        "sample": (sample, (z, *w)),
        "reason": (reason, (h, edge)),
        "modulate": (modulate, (z, h, *b, *v)),
        "whole": (whole, (z, *w, *b, *v, edge)),
    }  # fmt: skip


@pytest.mark.parametrize("op", ["sample", "reason", "modulate", "whole"])
def test_composite(op: str) -> None:
    function, inputs = ops("composite")[op]
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-6)


@pytest.mark.parametrize("op", ["sample", "reason", "modulate", "whole"])
def test_cpp_raises(op: str) -> None:
    function, inputs = ops("cpp")[op]
    out = function(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    for grad, of in zip(grads, inputs, strict=True):
        assert grad.requires_grad
        with pytest.raises(
            NotImplementedError, match="the fused kernels have no double backward; use backend='composite'"
        ):
            torch.autograd.grad(grad.sum(), of, retain_graph=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_penalty(variant: str) -> None:
    """The usual use: a loss on the gradient of the input."""

    def penalty(backend: str) -> list[Tensor]:
        m = middle(backend, **VARIANTS[variant]).double()
        y = feature_map(2, 12, 3, 4, dtype=torch.float64).requires_grad_()
        (dy,) = torch.autograd.grad(m(y).sum(), y, create_graph=True)
        return list(torch.autograd.grad(dy.square().sum(), list(m.parameters()), allow_unused=True))

    assert any(grad is not None and bool(grad.abs().sum() > 0) for grad in penalty("composite"))
    with pytest.raises(NotImplementedError, match="vcr_middle: the fused kernels have no double backward"):
        penalty("cpp")


@pytest.mark.parametrize("backend", BACKENDS)
def test_create_graph_alone_does_no_harm(backend: str) -> None:
    m = middle(backend)
    y = feature_map(2, 12, 3, 4).requires_grad_()
    plain = torch.autograd.grad(m(y).sum(), [y, *m.parameters()])
    graph = torch.autograd.grad(m(y).sum(), [y, *m.parameters()], create_graph=True)
    for a, b in zip(plain, graph, strict=True):
        torch.testing.assert_close(a, b)


def test_through_the_registered_op() -> None:
    """The ops are differentiable as they stand, once, where they were asked to save."""
    m = middle("cpp")
    z, value = feature_map(2, 12, 3, 4).requires_grad_(), m.sampler.value
    weights = (m.sampler.query, m.sampler.key, None, "dynamic", False)
    h, _, _ = torch.ops.vcr_ops.concept_sample(z, value, *weights, True)
    expected = torch.autograd.grad(m.sampler(z).sum(), [z, value])
    for a, b in zip(torch.autograd.grad(h.sum(), [z, value]), expected, strict=True):
        torch.testing.assert_close(a, b)
    h, _, _ = torch.ops.vcr_ops.concept_sample(z, value, *weights, False)
    with pytest.raises(RuntimeError, match="concept_sample was called with save=False"):
        h.sum().backward()
