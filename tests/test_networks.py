"""Proves: the networks keep torchvision's and timm's conventions: structure, pyramids, stochastic depth, dropout,
heads, and timm's registry, in whichever order the packages are imported."""

import copy
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vcr_ops
from tests.packages import imported
from tests.small import BACKENDS, assert_same, enliven, feature_map, results
from vcr_ops.modules.drop_path import DropPath


def small(features_only: bool = False, **options: Any) -> Any:
    """Two, one, one and two blocks of 4 concepts, one channel each in the first stage."""
    torch.manual_seed(0)
    cls = vcr_ops.VCRPyramid if features_only else vcr_ops.VCRNet
    given = {"groups": 4, "width_per_group": 1, **({} if features_only else {"num_classes": 5}), **options}
    return enliven(cls((2, 1, 1, 2), **given))


# torchvision


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 8, "width_per_group": 8, "num_classes": 7},
        {"replace_stride_with_dilation": (False, True, True)},
        {"replace_stride_with_dilation": [True, False, True], "zero_init_residual": True},
        {"norm_layer": lambda channels: nn.GroupNorm(2, channels)},
    ],
    ids=["default", "groups", "dilation", "dilation-zero", "norm"],
)
def test_structure_is_torchvision_s(options: dict[str, Any]) -> None:
    models = imported("torchvision.models")
    layers = (2, 1, 3, 2)
    given = {"groups": 32, "width_per_group": 4, **options}
    with torch.device("meta"):
        theirs = models.resnet.ResNet(models.resnet.Bottleneck, list(layers), **given)
        ours = vcr_ops.VCRNet(layers, **given)
    wanted = dict(theirs.named_modules())
    found = {name: m for name, m in ours.named_modules() if not re.search(r"\.(sampler|reasoner|modulator)", name)}
    assert found.keys() == wanted.keys()
    for name, module in wanted.items():
        if not list(module.children()):
            assert repr(found[name]) == repr(module), name
    positional = (layers, 9, True, 4, 8, (False, False, True), nn.BatchNorm2d)
    with torch.device("meta"):
        net = vcr_ops.VCRNet(*positional)
    assert (net.fc.out_features, net.layer1[0].conv2.groups, net.layer1[0].conv2.out_channels) == (9, 4, 32)


def test_weights_start_as_torchvision_s() -> None:
    net = vcr_ops.VCRNet((1, 1, 1, 1), 5, zero_init_residual=True)
    for name, m in net.named_modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1] // m.groups
            # kaiming_normal_ counts a grouped convolution's outputs as one group's fan times all of them.
            std = (2 / (fan_out * m.groups)) ** 0.5
            assert float(m.weight.detach().std()) == pytest.approx(std, rel=0.1), name
        if isinstance(m, nn.BatchNorm2d):
            assert bool((m.weight == (0 if name.endswith("bn3") else 1)).all()), name


# Dropping


def timm_s_rates(rate: float) -> list[float]:
    resnet = imported("timm.models.resnet")
    with torch.device("meta"):
        net = resnet.ResNet(resnet.Bottleneck, (2, 3, 1, 2), drop_path_rate=rate)
    stages = (net.layer1, net.layer2, net.layer3, net.layer4)
    return [0.0 if b.drop_path is None else b.drop_path.drop_prob for stage in stages for b in stage]


def test_stochastic_depth_grows_as_timm_s() -> None:
    with torch.device("meta"):
        net = vcr_ops.VCRNet((2, 3, 1, 2), drop_path_rate=0.3)
    ours = [0.0 if b.drop_path is None else b.drop_path.p for b in net.modules() if isinstance(b, vcr_ops.VCRBlock)]
    assert ours == pytest.approx(timm_s_rates(0.3))
    assert ours[-1] == pytest.approx(0.3)
    assert vcr_ops.VCRNet((1, 1, 1, 1), 2, groups=1, width_per_group=1).layer4[0].drop_path is None


def test_drop_path_drops_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.rand(4000, 2, 3) + 0.5
    kept = drop(x)
    alive = kept.flatten(1).abs().sum(1) > 0
    assert float(alive.float().mean()) == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(kept[alive], x[alive] / 0.75)
    assert not kept[~alive].any()
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x
    assert repr(drop) == "DropPath(p=0.25)"


@pytest.mark.parametrize("option", ["dropout", "drop_path"])
def test_a_dropped_branch_leaves_the_shortcut(option: str) -> None:
    almost_all = 1 - 1e-12
    torch.manual_seed(0)
    block = vcr_ops.VCRBlock(16, 4, groups=3, base_width=80, **{option: almost_all})
    x = feature_map(3, 16, 5, 5)
    torch.testing.assert_close(block(x), x.relu(), rtol=0, atol=0)
    plain = vcr_ops.VCRBlock(16, 4, groups=3, base_width=80)
    plain.load_state_dict(block.state_dict())
    assert_same(results(block.eval(), x), results(plain.eval(), x), 0)


def test_dropout_of_the_branch_is_by_element() -> None:
    torch.manual_seed(0)
    block = enliven(vcr_ops.VCRBlock(16, 4, groups=3, base_width=80, dropout=0.3)).train()
    x = feature_map(8, 16, 6, 6)
    seen: list[Tensor] = []
    block.dropout.register_forward_hook(lambda m, args, out: seen.extend((args[0].clone(), out.clone())))
    block(x)
    kept = seen[1] != 0
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(seen[1][kept], seen[0][kept] / 0.7)


def test_network_passes_the_drops_on() -> None:
    net = small(dropout=0.02, drop_path_rate=0.5, drop_rate=0.4)
    blocks = [m for m in net.modules() if isinstance(m, vcr_ops.VCRBlock)]
    assert {b.dropout.p for b in blocks} == {0.02}
    x = feature_map(2, 3, 32, 32)
    assert not torch.equal(net(x), net(x))
    net.eval()
    same = small().eval()
    same.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(x), same(x), rtol=0, atol=0)
    # Before fc alone: features don't change, logits do.
    net = small(drop_rate=0.4)
    features = net.forward_features(x)
    assert not torch.equal(net.forward_head(features), net.forward_head(features))
    ones = torch.ones(2, 2048, 1, 1)
    assert float((net.forward_head(ones, pre_logits=True) == 0).float().mean()) == pytest.approx(0.4, abs=0.05)


# Heads


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax", "catavgmax"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_global_pools(kind: str, ndim: int) -> None:
    net = small(global_pool=kind, ndim=ndim).eval()
    x = feature_map(2, 3, *(2,) * (ndim - 2), 32, 48)
    features = net.forward_features(x)
    assert features.shape == (2, 2048, *(1,) * (ndim - 2), 1, 2)
    mean, top = features.flatten(2).mean(2), features.flatten(2).amax(2)
    wanted = {"avg": mean, "max": top, "avgmax": (mean + top) / 2, "catavgmax": torch.cat((mean, top), 1)}[kind]
    torch.testing.assert_close(net.forward_head(features, pre_logits=True), wanted)
    assert net.head_hidden_size == net.fc.in_features == wanted.shape[1]
    torch.testing.assert_close(net(x), net.fc(wanted))


def test_pools_are_timm_s() -> None:
    layers = imported("timm.layers")
    x = feature_map(2, 2048, 3, 4)
    for kind in ("avg", "max", "avgmax", "catavgmax"):
        pooled = small(global_pool=kind).forward_head(x, pre_logits=True)
        torch.testing.assert_close(pooled, layers.SelectAdaptivePool2d(pool_type=kind, flatten=True)(x))


def test_classifier_can_be_replaced() -> None:
    net = small().double().eval()
    x = feature_map(2, 3, 32, 32, dtype=torch.float64)
    assert net.get_classifier() is net.fc
    assert net.get_classifier(name_only=True) == "fc"
    assert (net.num_classes, net.num_features) == (5, 2048)
    net.reset_classifier(3)
    assert net(x).shape == (2, 3)
    assert net.fc.weight.dtype == torch.float64
    assert not net.fc.training
    net.reset_classifier(0)
    assert (net.num_classes, net(x).shape) == (0, (2, 2048))
    torch.testing.assert_close(net(x), net.forward_features(x).mean((2, 3)))
    net.reset_classifier(4, "catavgmax")
    assert (net.fc.in_features, net(x).shape) == (4096, (2, 4))
    net.reset_classifier(0, "")
    assert net(x).shape == (2, 2048, 1, 1)
    bare = small(num_classes=0)
    assert not [name for name in bare.state_dict() if name.startswith("fc")]
    assert bare.eval()(x.float()).shape == (2, 2048)


# Pyramids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"output_stride": 16}, {"output_stride": 8}, {"modulation": "pixel"}, {"ndim": 3}, {"in_chans": 2}],
    ids=["default", "stride16", "stride8", "pixel", "video", "two-channels"],
)
def test_pyramid(options: dict[str, Any], backend: str) -> None:
    whole = small(backend=backend, **options).eval()
    net = small(features_only=True, backend=backend, **options).eval()
    net.load_state_dict({name: x for name, x in whole.state_dict().items() if not name.startswith("fc.")})
    spatial = (*(2,) * (options.get("ndim", 2) - 2), 64, 96)
    x = feature_map(1, options.get("in_chans", 3), *spatial)
    seen: dict[str, Tensor] = {}
    for level in whole.feature_info:
        module = whole.get_submodule(level["module"])
        module.register_forward_hook(lambda m, args, out, name=level["module"]: seen.setdefault(name, out.clone()))
    net.relu.register_forward_hook(lambda *_: None)  # both stems are called module by module
    with torch.no_grad():
        last = whole.forward_features(x)
        maps = net(x)
    assert net.feature_info.module_name() == ["relu", "layer1", "layer2", "layer3", "layer4"]
    assert net.feature_info.channels() == [m.shape[1] for m in maps] == [64, 256, 512, 1024, 2048]
    assert net.feature_info.reduction() == [64 // m.shape[-2] for m in maps] == [96 // m.shape[-1] for m in maps]
    assert net.feature_info.reduction()[-1] == options.get("output_stride", 32)
    for m, wanted in zip(maps, seen.values(), strict=True):
        torch.testing.assert_close(m, wanted, rtol=0, atol=0)
    torch.testing.assert_close(maps[-1], last, rtol=0, atol=0)


def test_pyramid_s_levels() -> None:
    every = small(features_only=True).eval()
    x = feature_map(1, 3, 64, 64)
    with torch.no_grad():
        maps = every(x)
        for indices, wanted in (((1, 3), [1, 3]), ((3, 1), [1, 3]), ((-1,), [4]), (2, [3, 4]), ((0,), [0])):
            net = small(features_only=True, out_indices=indices).eval()
            missing, unexpected = net.load_state_dict(every.state_dict(), strict=False)
            assert not missing
            assert all(int(name[5]) > max(wanted) for name in unexpected)
            got = net(x)
            assert len(got) == len(wanted)
            for m, level in zip(got, wanted, strict=True):
                torch.testing.assert_close(m, maps[level], rtol=0, atol=0)
            assert net.feature_info.channels() == [m.shape[1] for m in got]
    with torch.device("meta"):
        net = vcr_ops.vcrnet50(features_only=True, out_indices=(1, 2, 3, 4))
    assert isinstance(net, vcr_ops.VCRPyramid)
    assert net.feature_info.reduction() == [4, 8, 16, 32]


def test_every_parameter_of_a_pyramid_is_used() -> None:
    net = small(features_only=True, out_indices=(2,))
    sum(m.square().mean() for m in net(feature_map(2, 3, 32, 32))).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_intermediates() -> None:
    net = small().eval()
    x = feature_map(1, 3, 64, 64)
    with torch.no_grad():
        last, maps = net.forward_intermediates(x)
        torch.testing.assert_close(last, net.forward_features(x), rtol=0, atol=0)
        assert len(maps) == 5
        only = net.forward_intermediates(x, indices=[1, 2], stop_early=True, intermediates_only=True)
    for m, wanted in zip(only, maps[1:3], strict=True):
        torch.testing.assert_close(m, wanted, rtol=0, atol=0)
    assert net.prune_intermediate_layers([1, 2]) == [1, 2]
    assert len(net.layer3) == len(net.layer4) == net.num_classes == 0


def test_torchvision_s_detectors_take_it_as_a_backbone() -> None:
    """At pixel level, with frozen norms: the paper's Mask R-CNN has an FPN on such maps."""
    utils = imported("torchvision.models.detection.backbone_utils")
    net = vcr_ops.freeze_batch_norm(vcr_ops.set_modulation(small(), "pixel"))
    names = {f"layer{stage}": str(stage) for stage in (1, 2, 3, 4)}
    backbone = utils.BackboneWithFPN(net, names, net.feature_info.channels()[1:], 32)
    x = feature_map(1, 3, 64, 96)
    maps = backbone(x)
    assert [tuple(m.shape) for m in maps.values()][:4] == [(1, 32, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    sum(m.square().mean() for m in maps.values()).backward()
    assert net.layer1[0].modulator.scale_weight.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing(backend: str) -> None:
    net = small(backend=backend)
    plain, x = copy.deepcopy(net), feature_map(2, 3, 32, 32)
    net.set_grad_checkpointing()
    for m in (net, plain):
        m(x).square().mean().backward()
    assert_same(
        {name: p.grad for name, p in net.named_parameters()}, {name: p.grad for name, p in plain.named_parameters()}, 0
    )
    fused = re.compile(r"layer.*\.(bn2|reasoner\.bn)\.")
    for name, b in net.named_buffers():
        if fused.match(name):
            assert torch.equal(b, plain.get_buffer(name)), name


# timm


def test_timm_s_names() -> None:
    timm = imported("timm")
    assert set(timm.list_models("vcrnet*")) == {"vcrnet50", "vcrnet101"}
    assert not timm.list_models("vcrnet*", pretrained=True)
    with torch.device("meta"):
        net = timm.create_model("vcrnet101", num_classes=7, modulation="pixel", drop_path_rate=0.1, in_chans=1)
    assert type(net) is vcr_ops.VCRNet
    assert (len(net.layer3), net.fc.out_features, net.conv1.in_channels) == (23, 7, 1)
    assert net.layer4[-1].drop_path.p == pytest.approx(0.1)
    assert net.layer1[0].modulation == "pixel"
    assert net.default_cfg["input_size"] == (3, 224, 224)
    with pytest.raises(RuntimeError, match=r"[Nn]o pretrained weights"):
        timm.create_model("vcrnet50", pretrained=True)


def test_timm_s_pyramids() -> None:
    timm = imported("timm")
    torch.manual_seed(0)
    net = timm.create_model("vcrnet50", num_classes=0).eval()
    x = feature_map(1, 3, 64, 64)
    with torch.no_grad():
        wanted = net.forward_intermediates(x, intermediates_only=True)
        for cls in ("list", "getter"):
            pyramid = timm.create_model(
                "vcrnet50", features_only=True, out_indices=(0, 2, 4), feature_cls=cls, num_classes=0
            ).eval()
            names = {name: re.sub(r"^(body|model)\.", "", name) for name in pyramid.state_dict()}
            pyramid.load_state_dict({name: net.state_dict()[ours] for name, ours in names.items()})
            got = pyramid(x)
            for m, level in zip(got.values() if isinstance(got, dict) else got, (0, 2, 4), strict=True):
                torch.testing.assert_close(m, wanted[level], rtol=0, atol=0)
            assert pyramid.feature_info.channels() == [64, 512, 2048]
            assert pyramid.feature_info.reduction() == [2, 8, 32]


def test_timm_s_layer_decay() -> None:
    optim = imported("timm.optim")
    net = small()
    groups = optim.create_optimizer_v2(net, opt="sgd", lr=0.1, weight_decay=0.01, layer_decay=0.5).param_groups
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert len(scale) == len(list(net.parameters()))
    assert scale[id(net.conv1.weight)] < scale[id(net.layer1[0].conv1.weight)] < scale[id(net.layer4[0].conv1.weight)]
    assert scale[id(net.fc.weight)] == 1


def fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("order", ["timm-first", "ours-first"])
def test_import_order_does_not_matter(order: str) -> None:
    imported("timm")
    both = ["timm = imported('timm')", "import vcr_ops"]
    if order == "ours-first":
        both = ["import vcr_ops, sys; assert 'timm' not in sys.modules", *both]
    code = "\n".join(
        [
            "import torch",
            "from tests.packages import imported",
            *both,
            "import sys",
            "with torch.device('meta'): net = timm.create_model('vcrnet50')",
            "assert not [f for f in sys.meta_path if type(f).__module__.startswith('vcr_ops')]",
            "print(type(net) is vcr_ops.VCRNet, timm.models.__spec__.loader is timm.models.__loader__)",
        ]
    )
    assert fresh(code) == "True True"


def test_a_timm_that_lacks_something_gets_a_warning() -> None:
    code = "\n".join(
        [
            "import sys, types, warnings",
            "for name in ('timm', 'timm.models', 'timm.data'): sys.modules[name] = types.ModuleType(name)",
            "with warnings.catch_warnings(record=True) as caught:",
            "    warnings.simplefilter('always')",
            "    import vcr_ops",
            "print([str(w.message) for w in caught if 'timm' in str(w.message)][0][:52])",
        ]
    )
    assert fresh(code) == "vcr_ops can't register its networks with this timm:"


# Bad input


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_classes": -1}, ValueError, "num_classes is -1; it takes at least 0"),
        (
            {"global_pool": "mean"},
            ValueError,
            "global_pool is 'mean'; it takes one of 'avg', 'max', 'avgmax', 'catavgmax'",
        ),
        ({"global_pool": ""}, ValueError, "global_pool is '', which takes num_classes=0; num_classes is 5"),
        ({"drop_rate": 1.0}, ValueError, "drop_rate is 1.0; it takes a probability, at least 0 and below 1"),
        ({"drop_path_rate": "0.1"}, TypeError, "drop_path_rate is '0.1'; it takes a number"),
        ({"dropout": -0.1}, ValueError, "dropout is -0.1; it takes a probability"),
        ({"in_chans": 0}, ValueError, "in_chans is 0; it takes at least 1"),
        ({"output_stride": 4}, ValueError, "output_stride is 4; it takes 32, 16 or 8"),
        (
            {"output_stride": 16, "replace_stride_with_dilation": (False, False, True)},
            ValueError,
            "output_stride and replace_stride_with_dilation say the same",
        ),
    ],
)
def test_network_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        small(**options)


@pytest.mark.parametrize(
    "indices, error, message",
    [
        ((0, 5), ValueError, "out_indices is (0, 5); the levels are 0 to 4"),
        ((), ValueError, "out_indices is empty; it takes at least one level"),
        (6, ValueError, "out_indices is 6, the last so many levels; there are 5"),
        (0, ValueError, "out_indices is 0; it takes at least 1"),
        ("1", TypeError, "out_indices is '1'; it takes an int, a sequence of ints or None"),
        ((1.0,), TypeError, "out_indices is (1.0,); it takes an int, a sequence of ints or None"),
    ],
)
def test_levels_that_are_not_there(indices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        small(features_only=True, out_indices=indices)


def test_builders_arguments() -> None:
    with pytest.raises(ValueError, match="out_indices is given, but features_only=False takes none"):
        vcr_ops.vcrnet50(out_indices=(1,))
    with pytest.raises(ValueError, match=r"layers is \(1, 2, 3\); it takes the numbers of blocks of four stages"):
        vcr_ops.VCRNet((1, 2, 3))
    with pytest.raises(ValueError, match=r"layers\[1\] is 0; it takes at least 1"):
        vcr_ops.VCRNet((1, 0, 1, 1))
    with pytest.raises(ValueError, match="output_fmt is 'NLC'; it takes one of 'NCHW'"):
        small().forward_intermediates(feature_map(1, 3, 32, 32), output_fmt="NLC")
    with pytest.raises(ValueError, match="p is 1; it takes a probability"):
        DropPath(1)
