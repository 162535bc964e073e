"""Proves: maps of more than 2**31 elements give what their images give in a small batch, in both memory formats."""

import copy

import pytest
import torch

from tests.small import assert_same, feature_map, middle

from .machine import DEVICE, LARGE, MARKS, free_bytes

pytestmark = MARKS

CHANNELS, SIDE, IMAGES = 128, 56, 4
TIMES = max(2, -(-LARGE // (CHANNELS * SIDE * SIDE * IMAGES)))  # the small batch so many times
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EPS = torch.finfo(torch.bfloat16).eps


def repeated(x, memory_format):
    """The images of ``x`` TIMES over."""
    big = torch.empty(TIMES * IMAGES, *x.shape[1:], dtype=x.dtype, device=x.device, memory_format=memory_format)
    big.unflatten(0, (TIMES, IMAGES)).copy_(x)
    return big


def furthest(big, small):
    """The largest relative distance, in the 2-norm, of one repetition from the small batch; infinite where NaN is."""
    size = small.float().norm()
    distances = [(part.float() - small.float()).norm() / size for part in big.unflatten(0, (TIMES, IMAGES)).unbind()]
    return float(torch.stack(distances).nan_to_num(torch.inf).max())


@pytest.fixture
def maps(request, backend):
    """(module, the small batch and a gradient for its output, the format), where they fit."""
    if free_bytes() < 6 * 2 * LARGE:
        pytest.skip(f"needs {6 * 2 * LARGE >> 30} GiB of free memory")
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    memory_format = FORMATS[request.param]
    y, grad = (
        feature_map(IMAGES, CHANNELS, SIDE, SIDE, seed=seed, dtype=torch.bfloat16).to(
            DEVICE, memory_format=memory_format
        )
        for seed in (1, 2)
    )
    return middle(backend, CHANNELS, 32, modulation="pixel").to(DEVICE), y, grad, memory_format


@pytest.mark.parametrize("maps", FORMATS, indirect=True)
def test_evaluation(maps):
    module, y, _, memory_format = maps
    module.eval()
    with torch.no_grad():
        small = module(y)
        big = module(repeated(y, memory_format))
    assert big.numel() > LARGE
    assert big.is_contiguous(memory_format=memory_format)
    for part in big.unflatten(0, (TIMES, IMAGES)).unbind():
        assert torch.equal(part, small)


@pytest.mark.parametrize("maps", FORMATS, indirect=True)
def test_training_step(maps):
    """The statistics of a batch that is repeated are its own, so are the gradients of the map; those of the parameters
    are so many times as large."""
    module, y, grad, memory_format = maps

    def step(module, y, grad):
        y.requires_grad_()
        out = module(y)
        dy, *parameters = torch.autograd.grad(out, [y, *module.parameters()], grad)
        names = [f"d{name}" for name, _ in module.named_parameters()]
        return out.detach(), dy, dict(zip(names, parameters, strict=True))

    out, dy, small = step(copy.deepcopy(module), y, grad)
    big_out, big_dy, big = step(module, repeated(y, memory_format), repeated(grad, memory_format))
    assert big_dy.numel() > LARGE
    assert furthest(big_out, out) <= EPS
    # Averaged over more images, the terms of the statistics are the same; the gradient is rounded once.
    assert furthest(big_dy, dy) <= 2 * EPS
    assert_same({name: x / TIMES for name, x in big.items()}, small, 1e-3)
