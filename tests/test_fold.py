"""A folded network computes what the network does in evaluation, with fewer modules; the network stays as it is."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vcr_ops
from tests.packages import imported
from tests.resnexts import LAYOUTS, Part, TimmBottleneck, other_adapter, other_net, resnet
from tests.small import BACKENDS, VARIANTS, enliven, feature_map

TYPES = {torch.float32: 1e-5, torch.float64: 1e-13}


def image(dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return feature_map(2, 3, 32, 24, dtype=dtype, **options)


def norms(net: nn.Module) -> list[str]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return [name for name, m in net.named_modules() if isinstance(m, kinds) and "reasoner" not in name]


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.dtype == expected.dtype
    got, expected = got.detach(), expected.detach()
    assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


def check(net: nn.Module, x: Tensor, left: list[str], tolerance: float = 1e-5) -> Any:
    """Folds a network in evaluation; norms left and output are as expected, and the network is untouched."""
    state = {name: y.clone() for name, y in net.state_dict().items()}
    before = [(id(m), type(m), m.training) for m in net.modules()]
    with torch.no_grad():
        expected = net(x)
        folded = vcr_ops.fold(net)
        assert norms(folded) == left
        assert_close(folded(x), expected, tolerance)
        assert torch.equal(net(x), expected)
    assert not any(m.training for m in folded.modules())
    assert [(id(m), type(m), m.training) for m in net.modules()] == before
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(y, state[name]) for name, y in net.state_dict().items())
    mine = {id(p) for p in net.parameters()}
    assert not any(id(p) in mine for p in folded.parameters())
    return folded


@pytest.mark.parametrize("dtype", TYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vcrnet(backend: str, variant: str, dtype: torch.dtype) -> None:
    """All but the fused middle's norms."""
    torch.manual_seed(0)
    net = vcr_ops.VCRNet((2, 1, 1, 1), 5, width_per_group=1, groups=64, backend=backend, **VARIANTS[variant])
    net = enliven(net).to(dtype).eval()
    left = [f"layer{s}.{i}.bn2" for s in (1, 2, 3, 4) for i in range(1 if s > 1 else 2)]
    folded = check(net, image(dtype), left, TYPES[dtype])
    assert type(folded.bn1) is type(folded.layer1[0].downsample[1]) is nn.Identity
    assert folded.layer1[0].conv1.bias is not None
    assert vcr_ops.explain(folded.layer1[0], feature_map(2, 64, 8, 6, dtype=dtype)).path == "whole"
    again = vcr_ops.fold(folded)
    assert torch.equal(again(image(dtype)), folded(image(dtype)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_resnexts(layout: str, converted: bool) -> None:
    """All norms of a plain network, all but bn2 of a converted one, whose modulators may be at work."""
    net = resnet(layout).eval()
    left = []
    if converted:
        vcr_ops.convert(net)
        for b in (*net.layer1, *net.layer2):
            enliven(b.modulator)
        left = [f"layer{s}.{i}.bn2" for s in (1, 2) for i in (0, 1)]
    check(net, image(), left)
    check(resnet(layout, groups=1).eval(), image(), [])


def test_a_converted_network_can_be_folded_and_reverted() -> None:
    net = vcr_ops.convert(resnet("timm").eval())
    folded = vcr_ops.revert(vcr_ops.fold(net))
    assert type(folded.layer1[0]) is TimmBottleneck
    assert_close(folded(image()), net(image()), 1e-5)
    check(folded, image(), [])
    with pytest.raises(ValueError, match="bn1, a Identity, is no BatchNorm"):
        vcr_ops.convert(folded)


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_adapted_blocks(converted: bool) -> None:
    net = other_net().eval()
    if converted:
        vcr_ops.convert(net, adapter=other_adapter)
    check(net, image(), ["1.f.b.1", "2.f.b.1"] if converted else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_channels_last(dtype: torch.dtype) -> None:
    net = resnet("torchvision").to(dtype).eval().to(memory_format=torch.channels_last)
    folded = check(net, image(dtype, channels_last=True), [], 1e-5 if dtype is torch.float32 else 0.03)
    assert folded.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert {x.dtype for x in folded.state_dict().values()} == {dtype}


def test_video() -> None:
    net = enliven(nn.Sequential(vcr_ops.VCRBlock(8, 4, 2, groups=2, base_width=64, ndim=3))).eval()
    check(net, feature_map(2, 8, 3, 6, 5), ["0.bn2"])


class _Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


def test_what_convert_refuses() -> None:
    """Folding needs the pairs alone, whatever else a block does."""
    net = resnet("timm", groups=1).eval()
    net.layer1[0].se = _Attention()
    net.layer2[0].act2 = nn.SiLU()
    net.layer2[1].bn1.affine = False
    net.layer2[1].bn1.weight = net.layer2[1].bn1.bias = None
    check(net.eval(), image(), [])


def test_deep_stem() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Sequential(*Part(3, 4, 3), nn.Conv2d(4, 4, 3))
            self.bn1 = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn1(self.conv1(x)).relu()

    check(enliven(Net()).eval(), image(), [])


class _Odd(nn.Module):
    """Has names in pairs that it does not use as pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn2(self.conv1(self.bn1(x)).relu())).relu()


class _Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_can_t_be_folded_stays() -> None:
    check(enliven(_Odd()).eval(), image(), ["bn1", "bn2"])
    first = nn.Conv2d(3, 3, 1)
    check(enliven(nn.Sequential(nn.BatchNorm2d(3), first, nn.ReLU(), nn.BatchNorm2d(3))).eval(), image(), ["0", "3"])
    check(enliven(nn.Sequential(_Scaled(3, 3, 1), nn.BatchNorm2d(3))).eval(), image(), ["1"])
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    check(enliven(nn.Sequential(normed, nn.BatchNorm2d(3))).eval(), image(), ["1"])
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    check(enliven(nn.Sequential(first, untracked)).eval(), image(), ["1"])
    twice = nn.Sequential(nn.Sequential(first, nn.BatchNorm2d(3)), nn.ReLU(), nn.Sequential(first, nn.BatchNorm2d(3)))
    check(enliven(twice).eval(), image(), ["0.1", "2.1"])
    shared = nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU())
    assert norms(check(enliven(nn.Sequential(shared, shared)).eval(), image(), [])) == []


@pytest.mark.parametrize("path", ["layer2.0", "layer2.0.downsample.1", "bn1"])
def test_training_mode_is_refused(path: str) -> None:
    net = resnet("timm").eval()
    net.get_submodule(path).train(True)
    with pytest.raises(ValueError, match=rf"{path} is in training mode"):
        vcr_ops.fold(net)
    with pytest.raises(ValueError, match="the model is in training mode"):
        vcr_ops.fold(net.train())


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_hooks_are_refused(converted: bool) -> None:
    net = resnet("torchvision").eval()
    if converted:
        vcr_ops.convert(net)
    clean = copy.deepcopy(net)
    net.layer1[0].bn1.register_forward_hook(lambda *_: None)
    net.layer2[0].downsample[0].register_forward_pre_hook(lambda *_: None)
    net.conv1.register_full_backward_hook(lambda *_: None)
    before = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match="would not survive") as error:
        vcr_ops.fold(net)
    assert str(error.value).endswith("on conv1, layer1.0.bn1, layer2.0.downsample.0")
    assert [type(m) for m in net.modules()] == before
    seen: list[object] = []
    clean.layer1[1].register_forward_hook(lambda *_: seen.append(1))
    if converted:
        clean.layer1[1].bn2.register_forward_hook(lambda *_: seen.append(2))
    vcr_ops.fold(clean)(image())
    assert seen == ([2, 1] if converted else [1])


def test_no_module() -> None:
    with pytest.raises(TypeError, match="model is a int"):
        vcr_ops.fold(3)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_the_packages_own_networks(package: str) -> None:
    found = imported(package)
    make: Any = found.create_model if package == "timm" else lambda name: getattr(found.models, name)()
    names = {"timm": ["seresnext50_32x4d", "resnet18"], "torchvision": ["resnet50"]}
    for name in names[package]:
        check(make(name).eval(), feature_map(1, 3, 64, 64), [])
