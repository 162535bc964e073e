"""Proves: forward and training step can be captured in a CUDA graph and replayed on other data, never make the host
wait, and run on the stream and the device that their tensors are on."""

import copy

import pytest
import torch

from tests.small import VARIANTS, feature_map, middle

from .machine import (
    DEVICE,
    MARKS,
    capture,
    current_device,
    no_host_sync,
    other_device,
    side_stream,
    synchronize,
)

pytestmark = [
    *MARKS,
    pytest.mark.parametrize("variant", VARIANTS),
    pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"]),
]
SHAPE = (4, 12, 6, 5)


def picture(seed, channels_last, device=DEVICE):
    return feature_map(*SHAPE, seed=seed, channels_last=channels_last).to(device)


def training_step(module, y, grad):
    """A function of no arguments: output, and the gradients of the map and all parameters."""

    def step():
        out = module(y)
        return [out.detach(), *torch.autograd.grad(out, [y, *module.parameters()], grad)]

    return step


def equal(got, expected):
    return all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_captured_forward(variant, channels_last, backend):
    module = middle(backend, **VARIANTS[variant]).to(DEVICE).eval()
    y = picture(1, channels_last)
    with torch.no_grad():
        replay, (out,) = capture(lambda: [module(y)])
        for seed in (3, 4):
            y.copy_(picture(seed, channels_last))
            replay()
            assert torch.equal(out, module(y))


def test_captured_training_step(variant, channels_last, backend):
    module = middle(backend, **VARIANTS[variant]).to(DEVICE)
    twin = copy.deepcopy(module)
    y, grad = picture(1, channels_last).requires_grad_(), picture(2, channels_last)
    replay, outputs = capture(training_step(module, y, grad))
    for seed in (3, 4):
        with torch.no_grad():
            y.copy_(picture(seed, channels_last))
        twin.load_state_dict(module.state_dict())  # the statistics as the steps before have left them
        replay()
        assert equal(outputs, training_step(twin, y, grad)())
        synchronize()
        assert equal(module.buffers(), twin.buffers())


def test_the_host_never_waits(variant, channels_last, backend):
    module = middle(backend, **VARIANTS[variant]).to(DEVICE)
    y, grad = picture(1, channels_last).requires_grad_(), picture(2, channels_last)
    step = training_step(module, y, grad)

    def both():
        module.train()
        step()
        module.eval()
        with torch.no_grad():
            module(y)

    both()
    synchronize()
    with no_host_sync():
        both()


def test_another_stream(variant, channels_last, backend):
    module = middle(backend, **VARIANTS[variant]).to(DEVICE)
    y, grad = picture(1, channels_last).requires_grad_(), picture(2, channels_last)
    expected = training_step(copy.deepcopy(module), y, grad)()
    with side_stream():
        got = training_step(module, y, grad)()
    assert equal(got, expected)


def test_another_device(variant, channels_last, backend):
    device = other_device()
    if device is None:
        pytest.skip("one GPU here")
    before = current_device()
    module = middle(backend, **VARIANTS[variant]).to(DEVICE)
    expected, got = (
        training_step(
            copy.deepcopy(module).to(where),
            picture(1, channels_last, where).requires_grad_(),
            picture(2, channels_last, where),
        )()
        for where in (DEVICE, device)
    )
    assert equal([x.cpu() for x in got], [x.cpu() for x in expected])
    assert current_device() == before
