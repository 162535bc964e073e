"""torch.func and forward mode work through the composite, which auto takes; through cpp by name they raise."""

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import vcr_ops
from tests.small import BACKENDS, feature_map, middle


def parts(backend: str, training: bool = False) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], Tensor]:
    m = middle(backend).double().train(training)
    parameters = {name: p.detach() for name, p in m.named_parameters()}
    return m, parameters, dict(m.named_buffers()), feature_map(2, 12, 3, 4, dtype=torch.float64)


def test_grad_of_a_functional_call() -> None:
    m, parameters, buffers, y = parts("auto")

    def loss(parameters: dict[str, Tensor], y: Tensor) -> Tensor:
        return functional_call(m, (parameters, buffers), (y,)).square().sum()

    found = grad(loss)(parameters, y)
    expected = torch.autograd.grad(m(y).square().sum(), list(m.parameters()))
    for (name, got), want in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


def test_functional_call_outside_of_transforms() -> None:
    for backend in BACKENDS:
        m, parameters, buffers, y = parts(backend)
        doubled = {name: 2 * p if name == "modulator.shift_bias" else p for name, p in parameters.items()}
        found = functional_call(m, (doubled, buffers), (y,))
        with torch.no_grad():
            m.modulator.shift_bias.mul_(2)
        torch.testing.assert_close(found, m(y).detach())


def test_per_sample_gradients() -> None:
    m, parameters, buffers, y = parts("auto")

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(m, (parameters, buffers), (image[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, y)
    for n in range(2):
        expected = torch.autograd.grad(m(y[n : n + 1]).square().sum(), list(m.parameters()))
        for got, want in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(got[n], want)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_vmap_over_images(channels_last: bool) -> None:
    m, _, _, _ = parts("auto")
    y = torch.stack(
        [feature_map(2, 12, 3, 4, seed=i, dtype=torch.float64, channels_last=channels_last) for i in range(3)]
    )
    torch.testing.assert_close(vmap(m)(y), torch.stack([m(each) for each in y]))


def test_vmap_over_models() -> None:
    models = [middle("auto").eval() for _ in range(2)]
    with torch.no_grad():
        models[1].sampler.value.mul_(2)
    stacked, buffers = torch.func.stack_module_state(models)
    y = feature_map(2, 12, 3, 4)
    found = vmap(lambda p, b: functional_call(models[0], (p, b), (y,)))(stacked, buffers)
    torch.testing.assert_close(found, torch.stack([m(y) for m in models]))


def test_hessian_and_jacobian() -> None:
    m, _, _, y = parts("auto")
    y = y[:1, :, :1, :2]
    assert hessian(lambda y: m(y).square().sum())(y).abs().sum() > 0
    torch.testing.assert_close(jacrev(m)(y), torch.autograd.functional.jacobian(m, y))


def test_forward_mode() -> None:
    m, _, _, y = parts("auto")
    direction = feature_map(*y.shape, seed=5, dtype=torch.float64)
    out, tangent = jvp(m, (y,), (direction,))
    step = 1e-6
    torch.testing.assert_close(
        tangent, (m(y + step * direction) - m(y - step * direction)) / (2 * step), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(out, m(y))


def test_cpp_by_name_raises() -> None:
    m, _, _, y = parts("cpp")
    message = r"backend 'cpp' can't run here .the keyword backend names it.: torch.func can't look into the C\+\+ ops"
    for transform in (lambda: grad(lambda y: m(y).sum())(y), lambda: vmap(m)(y[None]), lambda: jvp(m, (y,), (y,))):
        with pytest.raises(RuntimeError, match=message):
            transform()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["middle", "sampler", "reasoner", "modulator"])
def test_dual_tensors_never_lose_their_tangent(op: str, backend: str) -> None:
    """Forward mode without torch.func: through cpp an error, through the composite the tangent."""
    m, _, _, y = parts(backend)
    m.requires_grad_(False)
    state = torch.rand(2, 3, 4, dtype=torch.float64)
    calls = {
        "middle": (m, y),
        "sampler": (m.sampler, y),
        "reasoner": (m.reasoner, state),
        "modulator": (lambda z: m.modulator(z, state), y),
    }
    call, x = calls[op]
    with fwd.dual_level():
        dual = fwd.make_dual(x, torch.ones_like(x))
        if backend == "cpp":
            with pytest.raises(RuntimeError, match=r"forward-mode AD can't look into the C\+\+ ops"):
                call(dual)
        else:
            assert fwd.unpack_dual(call(dual)).tangent is not None


def test_training_under_vmap_needs_its_own_statistics() -> None:
    """What PyTorch says of nn.BatchNorm: running statistics can't be updated under vmap."""
    m, _, _, y = parts("auto", training=True)
    with pytest.raises(RuntimeError, match=r"vmap: .*lerp_"):
        vmap(m)(y[None].repeat(2, 1, 1, 1, 1))
    with vcr_ops.no_running_stats_update():
        torch.testing.assert_close(vmap(m)(y[None])[0], m(y))
