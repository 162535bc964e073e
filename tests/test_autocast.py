"""Under autocast the map keeps its low precision; parameters, statistics and the small algebra stay float32."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vcr_ops
from tests.small import BACKENDS, VARIANTS, assert_same, block, enliven, feature_map, middle, results


def autocast(module: nn.Module, y: Tensor) -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """Arguments for ``results``: the forward under autocast, the backward outside, as is recommended."""
    module = copy.deepcopy(module)

    def call(y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(y)

    return module, y, call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_map_s_type_stays(backend: str, variant: str, training: bool) -> None:
    """A bfloat16 map gives what it gives without autocast, a float32 map too; gradients of parameters are float32."""
    m = middle(backend, **VARIANTS[variant]).train(training)
    for dtype in (torch.bfloat16, torch.float32):
        y = feature_map(2, 12, 4, 5).to(dtype)
        expected = results(m, y)
        got = results(*autocast(m, y))
        assert got["out"].dtype == got["dy"].dtype == dtype
        assert all(x.dtype in (torch.float32, torch.int64) for name, x in got.items() if name not in ("out", "dy"))
        assert_same(got, expected, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_of_a_block(backend: str) -> None:
    b, x = block(backend), feature_map(3, 16, 6, 5)
    expected = results(b, x)
    got = results(*autocast(b, x))
    assert got["out"].dtype == torch.bfloat16
    assert got["dsampler.value"].dtype == torch.float32
    assert_same({k: v.float() for k, v in got.items()}, {k: v.float() for k, v in expected.items()}, 0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("modulation", ["channel", "pixel"])
def test_single_modules_and_hooks(backend: str, modulation: str) -> None:
    """The path that calls the modules keeps the small algebra in float32 too."""
    m = middle(backend, modulation=modulation)
    y = feature_map(2, 12, 4, 5).bfloat16()
    hooked = copy.deepcopy(m)
    seen = []
    hooked.reasoner.bn.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    hooked.sampler.register_forward_hook(
        lambda module, args, out: seen.append((out[0] if isinstance(out, tuple) else out).dtype)
    )
    expected = results(*autocast(m, y))
    got = results(*autocast(hooked, y))
    assert seen == [torch.float32, torch.float32]
    assert_same({k: v.float() for k, v in got.items()}, {k: v.float() for k, v in expected.items()}, 0.03)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_that_is_called(backend: str) -> None:
    """The rest gives to the bit what it gives without autocast on what the norm made, in the type that it has."""
    m, y = middle(backend), feature_map(2, 12, 4, 5)
    m.bn = enliven(nn.GroupNorm(3, 12))
    exact = m(y).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = m.bn(y.bfloat16())
        out = m(y.bfloat16())
    m.bn = nn.Identity()
    expected = m(z)
    assert out.dtype == z.dtype
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.03 * exact.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler(backend: str) -> None:
    """Steps with a scaled loss move the parameters as unscaled ones do, and a step that overflows is skipped."""
    y = feature_map(4, 16, 6, 5)

    def train(scale: float, poison: bool = False) -> tuple[nn.Module, float]:
        b = block(backend)
        optimizer = torch.optim.SGD(b.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = b(y).float().square().mean()
            if poison and step == 1:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if poison and step == 1:
                assert not all(bool(p.grad.isfinite().all()) for p in b.parameters() if p.grad is not None)
            scaler.step(optimizer)
            scaler.update()
        return b, scaler.get_scale()

    (plain, _), (scaled, scale) = train(1), train(1024.0)
    assert scale == 1024
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)
    poisoned, scale = train(1024.0, poison=True)
    assert scale == 512
    assert all(bool(p.isfinite().all()) for p in poisoned.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ops_are_not_cast(backend: str) -> None:
    m, z = middle(backend), feature_map(2, 12, 4, 5)
    weights = {"query": m.sampler.query, "key": m.sampler.key, "backend": backend}
    expected = vcr_ops.concept_sample(z, m.sampler.value, **weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = vcr_ops.concept_sample(z, m.sampler.value, **weights)
        state = vcr_ops.concept_reason(got, m.reasoner.edge, backend=backend).state
    assert torch.equal(got, expected)
    assert torch.equal(state, vcr_ops.concept_reason(expected, m.reasoner.edge, backend=backend).state)
