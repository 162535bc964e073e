"""Small modules with lively parameters, and everything that a training step of theirs leaves behind, to be compared."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import vcr_ops

BACKENDS = ("composite", "cpp")
VARIANTS: dict[str, dict[str, str]] = {
    "default": {},
    "pixel": {"sampler": "static", "edges": "static", "modulation": "pixel"},
    "pool": {"sampler": "pool", "edges": "none", "affine": "scale"},
}


def enliven(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and running statistic away from its plain initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in module.state_dict(keep_vars=True).items():
            if x.is_floating_point():
                noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
                x.add_(noise, alpha=0.5) if "var" in name else x.add_(noise - 0.5, alpha=0.4)
    return module


def middle(backend: str = "composite", channels: int = 12, concepts: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    return enliven(vcr_ops.VisualConceptReasoning(channels, concepts, backend=backend, **options))


def block(backend: str = "composite", **options: Any) -> Any:
    """16 channels in and out, 3 concepts of 5 channels."""
    torch.manual_seed(0)
    return enliven(vcr_ops.VCRBlock(16, 4, groups=3, base_width=80, backend=backend, **options))


def feature_map(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def results(module: nn.Module, y: Tensor, call: Any = None) -> dict[str, Tensor]:
    """Output, gradients of the input and every parameter, and the buffers after one step on a copy of the module."""
    if call is None:
        call = module = copy.deepcopy(module)
    y = y.requires_grad_()  # the tensor itself: it may be marked
    out = call(y)
    grad = feature_map(*out.shape, seed=2, dtype=out.dtype).to(out.device)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out, [y, *parameters], grad)
    found = {"out": out.detach(), "dy": grads[0]}
    found |= {f"d{name}": g for name, g in zip(names, grads[1:], strict=True)}
    return found | {name: b.detach().clone() for name, b in module.named_buffers()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Each tensor to a tolerance, on the scale of the largest entry of its kind (parameter gradients share one)."""
    assert got.keys() == expected.keys()
    shared = max(
        (float(x.abs().max()) for name, x in expected.items() if name.startswith("d") and x.numel()), default=1.0
    )
    for name, x in expected.items():
        assert got[name].dtype == x.dtype, name
        assert got[name].shape == x.shape, name
        if x.numel() == 0:
            continue
        scale = shared if name.startswith("d") else float(x.double().abs().max())
        error = float((got[name].double() - x.double()).abs().max())
        assert error <= tolerance * max(scale, 1e-12), f"{name}: off by {error:.3g}, its scale is {scale:.3g}"


def differ(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))
