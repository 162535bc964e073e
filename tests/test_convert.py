"""A converted ResNeXt computes and trains as before, with the same objects; what can't be converted stays whole."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vcr_ops
from tests.packages import imported
from tests.resnexts import (
    GROUPS,
    LAYOUTS,
    OTHER_PARTS,
    DropPath,
    ResNet,
    TimmBottleneck,
    other_adapter,
    other_net,
    resnet,
)
from tests.small import BACKENDS, VARIANTS, assert_same, feature_map, results

NEW = ("sampler", "reasoner", "modulator")
TYPES = {torch.float32: 1e-5, torch.float64: 1e-12}


def blocks(net: nn.Module) -> list[Any]:
    return [m for m in net.modules() if isinstance(m, vcr_ops.VCRBlock)]


def image(dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return feature_map(2, 3, 32, 24, dtype=dtype, **options)


def is_new(name: str) -> bool:
    return any(f"{part}." in name for part in NEW)


def of_old(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in found.items() if not is_new(name)}


def everything(net: nn.Module) -> list[Any]:
    """The modules of a network with what they are and hold, by identity."""
    return [
        (id(m), type(m), m.training, sorted(m.__dict__), *({n: id(x) for n, x in d.items()} for d in held(m)))
        for m in net.modules()
    ]


def held(m: nn.Module) -> tuple[dict[str, Any], ...]:
    return m._parameters, m._buffers, m._modules, dict(m._forward_hooks), dict(m._forward_pre_hooks)


@pytest.mark.parametrize("dtype", TYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_changes(layout: str, variant: str, backend: str, training: bool, dtype: torch.dtype) -> None:
    """Output, the gradients of the input and all old parameters, and the old statistics after a step, to rounding."""
    net = resnet(layout, dtype).train(training)
    expected = results(net, image(dtype))
    assert vcr_ops.convert(net, backend=backend, **VARIANTS[variant]) is net
    found = results(net, image(dtype))
    assert any(is_new(name) for name in found)
    assert_same(of_old(found), expected, TYPES[dtype])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_to_the_bit_where_modules_are_called(backend: str, training: bool) -> None:
    net = resnet("torchvision").train(training)
    with torch.no_grad():
        expected = copy.deepcopy(net)(image())
        vcr_ops.convert(net, backend=backend)
        hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            assert torch.equal(net(image()), expected)
        finally:
            hook.remove()


def test_sync_batch_norm() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(resnet("timm")).eval()
    expected = net(image())
    torch.testing.assert_close(vcr_ops.convert(net)(image()), expected)
    assert type(net.layer1[0].bn2) is nn.SyncBatchNorm


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_objects(layout: str) -> None:
    net = resnet(layout).train()
    net.layer1[1].eval()
    net.layer1[0].bn2.eval()
    net.layer2.requires_grad_(False)
    calls = []
    handle = net.layer1[0].register_forward_hook(lambda m, args, out: calls.append(m))
    state, modules = net.state_dict(keep_vars=True), dict(net.named_modules())
    flags = {name: m.training for name, m in modules.items()}
    vcr_ops.convert(net)
    after = net.state_dict(keep_vars=True)
    assert [name for name in after if not is_new(name)] == list(state)
    assert all(after[name] is x for name, x in state.items())
    assert all(net.get_submodule(name) is m for name, m in modules.items())
    assert all(m.training == flags[name] for name, m in modules.items())
    assert [b.reasoner.bn.training for b in blocks(net)] == [True, False, True, True]
    assert all(not x.requires_grad for name, x in net.layer2.named_parameters() if not is_new(name))
    assert all(x.requires_grad for name, x in net.layer2.named_parameters() if is_new(name))
    net(image())
    assert calls == [net.layer1[0]]
    handle.remove()
    for block in blocks(net):
        theirs = vcr_ops.VCRBlock(block.conv1.in_channels, block.bn3.num_features // 4, groups=GROUPS, base_width=80)
        names = [name for name in block.state_dict() if "downsample" not in name]
        assert names == [name for name in theirs.state_dict() if "downsample" not in name]
    if layout == "timm":
        assert all(isinstance(b, TimmBottleneck) and b.expansion == 4 for b in blocks(net))
        net.layer1[0].zero_init_last()
        assert not net.layer1[0].bn3.weight.any()
    assert "modulation='channel'" in repr(net)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=list(VARIANTS))
def test_state_dict_loads_into_another_converted_network(options: dict[str, str]) -> None:
    net = vcr_ops.convert(resnet("timm"), **options).eval()
    with torch.no_grad():
        for b in blocks(net):
            b.modulator.shift_bias.add_(0.1)
    other = vcr_ops.convert(ResNet("timm"), **options).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(image()), net(image()))


def test_every_block_is_its_vcr_block() -> None:
    """A converted block is the VCRBlock of the same state."""
    net = vcr_ops.convert(resnet("torchvision", torch.float64), modulation="pixel")
    block = net.layer1[1]
    theirs = vcr_ops.VCRBlock(16, 4, groups=GROUPS, base_width=80, modulation="pixel").double()
    with torch.no_grad():
        for x in block.modulator.parameters():
            x.add_(torch.randn_like(x))
    theirs.load_state_dict(block.state_dict())
    x = feature_map(2, 16, 6, 5, dtype=torch.float64)
    assert_same(results(block, x), results(theirs, x), 0)
    text = str(vcr_ops.explain(block, x))
    assert text.splitlines()[1:] == str(vcr_ops.explain(theirs, x)).splitlines()[1:]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fine_tuning(layout: str) -> None:
    """With all else frozen, steps move the modulators alone at first, and the loss falls."""
    net = vcr_ops.convert(resnet(layout).requires_grad_(False)).train()
    before = {name: x.detach().clone() for name, x in net.named_parameters()}
    optimizer = torch.optim.SGD([x for x in net.parameters() if x.requires_grad], 0.05)
    losses = []
    for step in range(6):
        loss = nn.functional.cross_entropy(net(image()), torch.tensor([1, 3]))
        optimizer.zero_grad()
        loss.backward()
        if not step:
            grads = {name for name, x in net.named_parameters() if x.grad is not None and x.grad.any()}
            assert {name.split(".")[2] for name in grads} == {"modulator"}
            assert len(grads) == 4 * len(blocks(net))
        optimizer.step()
        losses.append(float(loss.detach()))
    moved = {name for name, x in net.named_parameters() if not torch.equal(x, before[name])}
    assert all(is_new(name) for name in moved)
    assert {name.split(".")[2] for name in moved} == set(NEW)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"layer1\.0\.modulator is not neutral"):
        vcr_ops.revert(net)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_channels_last(training: bool) -> None:
    net = resnet("torchvision").train(training).to(memory_format=torch.channels_last)
    x = image(channels_last=True)
    expected = results(net, x)
    vcr_ops.convert(net)
    assert_same(of_old(results(net, x)), expected, 1e-5)
    seen = []
    net.layer2.register_forward_hook(
        lambda m, args, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    net(x)
    assert seen == [True]
    assert net.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    """New modules are of the weights' type; float16 can be converted here, if not run."""
    net = resnet("timm").to(dtype).eval()
    expected = None if dtype is torch.float16 else net(image(dtype))
    vcr_ops.convert(net)
    assert {x.dtype for x in net.state_dict().values()} == {dtype, torch.int64}
    if expected is not None:
        torch.testing.assert_close(net(image(dtype)), expected, rtol=0.05, atol=0.05)


def test_meta_device() -> None:
    with torch.device("meta"):
        net = ResNet("torchvision")
    vcr_ops.convert(net)
    assert all(x.is_meta for x in net.state_dict().values())
    with pytest.raises(ValueError, match=r"layer1\.0\.modulator is on the meta device"):
        vcr_ops.revert(net)
    with torch.device("meta"):
        net = ResNet("torchvision", groups=1)
    with pytest.raises(ValueError, match="groups=1"):
        vcr_ops.convert(net)


def test_video() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv3d(8, 6, (3, 1, 1), padding=(1, 0, 0), bias=False), nn.BatchNorm3d(6)
            self.conv2, self.bn2 = nn.Conv3d(6, 6, (1, 3, 3), padding=(0, 1, 1), groups=2), nn.BatchNorm3d(6)
            self.conv3, self.bn3 = nn.Conv3d(6, 8, 1, bias=False), nn.BatchNorm3d(8)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
            return self.relu(self.bn3(self.conv3(y)) + x)

    block = Block()
    x = feature_map(2, 8, 3, 5, 4)
    expected = results(block, x)
    assert vcr_ops.convert(block) is block
    assert isinstance(block, vcr_ops.VCRBlock)
    assert_same(of_old(results(block, x)), {k: v for k, v in expected.items() if not is_new(k)}, 1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_drop_path(training: bool) -> None:
    net = resnet("timm").train(training)
    for b in [*net.layer1, *net.layer2]:
        b.drop_path = DropPath(0.5)
    torch.manual_seed(3)
    expected = results(net, image())
    vcr_ops.convert(net)
    torch.manual_seed(3)
    assert_same(of_old(results(net, image())), expected, 1e-5)


def test_functional_relu() -> None:
    net = resnet("torchvision").eval()
    expected = net(image())
    for b in [*net.layer1, *net.layer2]:
        del b.relu
        b.__class__ = _FunctionalBottleneck
    assert torch.equal(net(image()), expected)
    torch.testing.assert_close(vcr_ops.convert(net)(image()), expected)


class _FunctionalBottleneck(nn.Module):
    conv1: nn.Module

    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


def test_shared_blocks() -> None:
    net = resnet("torchvision").eval()
    net.layer1.add_module("2", net.layer1[1])
    expected = net(image())
    vcr_ops.convert(net)
    assert net.layer1[1] is net.layer1[2]
    assert len(blocks(net)) == 4
    torch.testing.assert_close(net(image()), expected)
    vcr_ops.revert(net)
    assert torch.equal(net(image()), expected)


def test_a_block_alone_and_a_second_time() -> None:
    net = resnet("torchvision").eval()
    block = net.layer1[1]
    assert vcr_ops.convert(block) is block
    kept = block.sampler
    vcr_ops.convert(net)
    assert block.sampler is kept
    assert len(blocks(net)) == 4
    with pytest.raises(ValueError, match="has no bottleneck"):
        vcr_ops.convert(net)
    vcr_ops.revert(block)
    assert len(blocks(net)) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies(layout: str) -> None:
    net = vcr_ops.convert(resnet(layout)).eval()
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net, 0)), torch.load(buffer, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in net.modules()]
        assert torch.equal(other(image()), net(image()))
        vcr_ops.revert(other)
        assert not blocks(other)
    assert len(blocks(net)) == 4
    shared = copy.deepcopy(nn.ModuleList([net.layer1[0].conv1, net.layer1[0]]))
    assert shared[0] is shared[1].conv1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_revert(layout: str) -> None:
    """The way back restores everything, also after steps that leave the modulators alone."""
    net = resnet(layout).eval()
    net.layer1[0].register_forward_hook(lambda *_: None)
    before, expected = everything(net), net(image())
    assert vcr_ops.revert(vcr_ops.convert(net)) is net
    assert everything(net) == before
    assert torch.equal(net(image()), expected)
    vcr_ops.convert(net).train()
    for b in blocks(net):
        b.modulator.requires_grad_(False)
    optimizer = torch.optim.SGD([x for x in net.parameters() if x.requires_grad], 0.1)
    net(image()).square().sum().backward()
    optimizer.step()
    trained = net.eval()(image())
    torch.testing.assert_close(vcr_ops.revert(net)(image()), trained)


@pytest.mark.parametrize("name", ["scale_weight", "shift_weight", "scale_bias", "shift_bias"])
def test_nothing_is_half_reverted(name: str) -> None:
    net = vcr_ops.convert(resnet("torchvision"))
    with torch.no_grad():
        getattr(net.layer2[1].modulator, name)[-1, -1] += 1e-6
    before = everything(net)
    with pytest.raises(ValueError, match=r"layer2\.1\.modulator is not neutral"):
        vcr_ops.revert(net)
    assert everything(net) == before
    assert len(blocks(net)) == 4
    with torch.no_grad():
        net.layer2[1].modulator.scale_bias[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not neutral"):
        vcr_ops.revert(net)


def test_revert_needs_converted_blocks() -> None:
    for net in (resnet("timm"), nn.Sequential(vcr_ops.VCRBlock(16, 4, groups=2, base_width=64, zero_init=True))):
        with pytest.raises(ValueError, match="no block that convert made"):
            vcr_ops.revert(net)
    with pytest.raises(TypeError, match="model is a int"):
        vcr_ops.revert(3)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class _Doubled(TimmBottleneck):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Slotted(TimmBottleneck):
    __slots__ = ("more",)


class _NormWithActivation(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def _replace(name: str, new: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    return lambda block: setattr(block, name, new(block))


def _freeze_norm(block: Any) -> None:
    block.bn2 = nn.GroupNorm(3, block.bn2.num_features)


def _hook(name: str) -> Callable[[Any], None]:
    return lambda block: block.get_submodule(name).register_forward_hook(lambda *_: None)


def _ungroup(block: Any) -> None:
    conv = block.conv2
    block.conv2 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)


UNFIT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "se": (_replace("se", lambda b: Attention()), "an attention module, se, a Attention"),
    "aa": (_replace("aa", lambda b: nn.AvgPool2d(3, 1, 1)), "anti-aliasing, aa, a AvgPool2d"),
    "drop_block": (_replace("drop_block", lambda b: nn.Dropout2d()), "drop block, drop_block, a Dropout2d"),
    "groups": (_ungroup, "conv2 has groups=1"),
    "norm": (_freeze_norm, "bn2, a GroupNorm, is no BatchNorm"),
    "last norm": (_replace("bn3", lambda b: nn.Identity()), "bn3, a Identity, is no BatchNorm"),
    "norm with activation": (
        _replace("bn2", lambda b: _NormWithActivation(b.bn2.num_features)),
        "bn2, a _NormWithActivation, is no BatchNorm",
    ),
    "activation": (_replace("act2", lambda b: nn.SiLU()), "act2, is a SiLU, not a ReLU"),
    "hook on the activation": (_hook("act2"), "act2 has hooks"),
    "hook on the place of drop block": (_hook("drop_block"), "drop_block has hooks"),
    "another child": (_replace("gate", lambda b: nn.Sigmoid()), "doesn't know: gate, a Sigmoid"),
    "parameter": (lambda b: b.register_parameter("gamma", nn.Parameter(torch.ones(()))), "it has gamma, which"),
    "forward": (lambda b: setattr(b, "__class__", _Doubled), "computes something else"),
    "forward of the object": (lambda b: setattr(b, "forward", lambda x: x), "forward has been replaced"),
    "name taken": (lambda b: setattr(b, "backend", "mine"), "an attribute 'backend' already"),
    "widths": (_replace("conv3", lambda b: nn.Conv2d(7, 16, 1)), "can't be tried out on a map"),
    "lazy": (_replace("conv1", lambda b: nn.LazyConv2d(15, 1)), "conv1.weight is not initialised yet"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_nothing_is_half_converted(case: str) -> None:
    """Every path and reason is in the error, and the network is as it was, its running statistics too."""
    spoil, reason = UNFIT[case]
    net = resnet("timm")
    for path in ("layer1.1", "layer2.1"):
        spoil(net.get_submodule(path))
    before, state = everything(net), copy.deepcopy(net.state_dict()) if case != "lazy" else {}
    with pytest.raises(ValueError, match=r"nothing was changed: [\s\S]*layer1\.1[\s\S]*layer2\.1") as error:
        vcr_ops.convert(net)
    assert reason in str(error.value)
    assert "layer1.0" not in str(error.value)
    assert everything(net) == before
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in state.items())


def test_random_numbers_are_drawn_for_new_modules_alone() -> None:
    net = resnet("timm", blocks=1)
    torch.manual_seed(5)
    vcr_ops.convert(net)
    torch.manual_seed(5)
    assert torch.equal(vcr_ops.ConceptSampler(15, 3).value, net.layer1[0].sampler.value)


def test_nothing_to_convert_and_bad_arguments() -> None:
    for net in (nn.Linear(2, 3), nn.Sequential(), vcr_ops.VCRBlock(16, 4, groups=2, base_width=64)):
        with pytest.raises(ValueError, match="has no bottleneck that could be converted"):
            vcr_ops.convert(net)
    with pytest.raises(TypeError, match="model is a str"):
        vcr_ops.convert("resnext50")
    net = resnet("timm")
    before = everything(net)
    for options, text in (
        ({"sampler": "most"}, "sampler is 'most'"),
        ({"sampler": "pool", "modulation": "pixel"}, "needs an attention map"),
        ({"backend": "cudnn"}, "backend is 'cudnn'"),
    ):
        with pytest.raises(ValueError, match=text):
            vcr_ops.convert(net, **options)
    with pytest.raises(ValueError, match="TorchScript"):
        vcr_ops.convert(torch.jit.script(resnet("torchvision").layer1[0]))
    parallel: Any = nn.Module.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)
    parallel.module = net
    with pytest.raises(ValueError, match="the model itself is a DistributedDataParallel"):
        vcr_ops.convert(parallel)
    assert everything(net) == before


def test_the_model_itself_is_named() -> None:
    with pytest.raises(ValueError, match="the model itself, a Bottleneck: conv2 has groups=1"):
        vcr_ops.convert(resnet("torchvision", groups=1).layer1[0])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_adapter(training: bool) -> None:
    net = other_net().train(training)
    with pytest.raises(ValueError, match="has no bottleneck"):
        vcr_ops.convert(net)
    before, expected = everything(net), results(net, image())
    vcr_ops.convert(net, adapter=other_adapter, sampler="static")
    assert_same(of_old(results(net, image())), expected, 1e-5)
    assert [b.sampler.concepts for b in blocks(net)] == [3, 4]
    assert "1.f.b.0.weight" in net.state_dict()
    assert "1.modulator.scale_bias" in net.state_dict()
    assert vcr_ops.explain(net[1], feature_map(2, 8, 6, 5)).shape == (2, 12, 6, 5)
    assert torch.equal(copy.deepcopy(net)(image()), copy.deepcopy(net)(image()))
    vcr_ops.revert(net)
    assert everything(net) == before


BAD_PARTS: dict[str, tuple[Any, str]] = {
    "no mapping": ("f.b.0", "the adapter gave a str"),
    "unknown part": ({**OTHER_PARTS, "conv4": "f"}, "names the part 'conv4'"),
    "no module": ({**OTHER_PARTS, "conv1": "f.z.0"}, "conv1 is at 'f.z.0', where"),
    "without conv2": ({k: v for k, v in OTHER_PARTS.items() if k != "conv2"}, "names no conv2"),
    "not grouped": ({**OTHER_PARTS, "conv2": "f.a.0"}, "f.a.0, a Conv2d, is no 3x3"),
    "no norm": ({**OTHER_PARTS, "bn2": "f.b.0"}, "f.b.0, a Conv2d, is no BatchNorm"),
    "left out": ({k: v for k, v in OTHER_PARTS.items() if k != "bn3"}, "has f.c.1.weight, which is in none"),
    "no last activation": ({**OTHER_PARTS, "act3": None}, "computes something else"),
    "swapped": ({**OTHER_PARTS, "bn1": "f.c.1", "bn3": "f.a.1"}, "its parts don't fit together"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_bad_adapters(case: str) -> None:
    parts, reason = BAD_PARTS[case]
    net = other_net()
    before = everything(net)
    with pytest.raises(ValueError, match="1, a OtherBottleneck: ") as error:
        vcr_ops.convert(net, adapter=lambda m: parts if hasattr(m, "f") else None)
    assert reason in str(error.value)
    assert everything(net) == before


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_the_packages_own_networks(package: str) -> None:
    package_s: Any = imported(package)
    if package == "timm":
        net: nn.Module = package_s.create_model("resnext50_32x4d", num_classes=3, drop_path_rate=0.1)
    else:
        net = package_s.models.resnext50_32x4d(num_classes=3)
    original = type(net.layer1[0])
    net.eval()
    x = feature_map(1, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(vcr_ops.convert(net)(x), expected)
    assert len(blocks(net)) == 16
    assert list(net.state_dict().keys() - vcr_ops.vcrnet50(3).state_dict().keys()) == []
    assert list(vcr_ops.vcrnet50(3).state_dict().keys() - net.state_dict().keys()) == []
    vcr_ops.revert(net)
    assert type(net.layer1[0]) is original
    with torch.no_grad():
        assert torch.equal(net(x), expected)


def test_timm_s_other_blocks_are_refused() -> None:
    timm = imported("timm")
    for name, reason in (("seresnext50_32x4d", "an attention module, se, a SEModule"), ("resnet26", "groups=1")):
        net = timm.create_model(name)
        before = everything(net)
        with pytest.raises(ValueError, match=reason):
            vcr_ops.convert(net)
        assert everything(net) == before
