"""Proves: both networks have the parameters of the paper's Tables 1, 3 and 5, and the contract's state dicts."""

import importlib

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

PACKAGES = ["python_ref", "vcr_ops"]


def build(package: str, name: str, *args, **options) -> nn.Module:
    """``package.name(...)`` on the meta device: nothing is allocated."""
    function = getattr(importlib.import_module(package), name)
    with torch.device("meta"):
        return function(*args, **options)


def millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}"


TABLES = {
    "table1-50": ("vcrnet50", 1000, {}, "25.26"),
    "table1-50-pixel": ("vcrnet50", 1000, {"modulation": "pixel"}, "25.26"),
    "table1-101": ("vcrnet101", 1000, {}, "44.60"),
    "table3-365-classes": ("vcrnet50", 365, {}, "23.96"),
    "table5-pool": ("vcrnet50", 1000, {"sampler": "pool"}, "25.17"),
    # Printed: 25.17. The 1x1 maps have 7,552 weights more than "pool", which is printed as 25.17 as well.
    "table5-static-sampler": ("vcrnet50", 1000, {"sampler": "static"}, "25.18"),
    "table5-dynamic-sampler": ("vcrnet50", 1000, {"sampler": "dynamic"}, "25.26"),
    "table5-no-edges": ("vcrnet50", 1000, {"edges": "none"}, "25.26"),
    # Printed: 25.28. 16 blocks of 32 x 32 are 16,384 more than "none", which is 25.257.
    "table5-static-edges": ("vcrnet50", 1000, {"edges": "static"}, "25.27"),
    "table5-dynamic-edges": ("vcrnet50", 1000, {"edges": "dynamic"}, "25.26"),
    "table5-scale": ("vcrnet50", 1000, {"affine": "scale"}, "25.22"),
    "table5-shift": ("vcrnet50", 1000, {"affine": "shift"}, "25.22"),
    "table5-both": ("vcrnet50", 1000, {"affine": "both"}, "25.26"),
}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name, classes, options, wanted", TABLES.values(), ids=TABLES.keys())
def test_parameter_counts(package, name, classes, options, wanted):
    assert millions(build(package, name, classes, **options)) == wanted


def test_plain_networks():
    assert millions(build("python_ref", "resnext50")) == "25.03"
    assert millions(build("python_ref", "resnext101")) == "44.18"
    assert millions(build("python_ref", "resnext50", 365)) == "23.73"


VARIANTS = [
    {},
    {"sampler": "static", "edges": "static"},
    {"sampler": "pool", "edges": "none"},
    {"affine": "scale"},
    {"affine": "shift"},
    {"modulation": "pixel"},
]


def batch_norm_entries(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    shapes = dict.fromkeys((f"{name}.{x}" for x in ("weight", "bias", "running_mean", "running_var")), (channels,))
    return {**shapes, f"{name}.num_batches_tracked": ()}


def middle_entries(C: int, p: int, sampler="dynamic", edges="dynamic", affine="both", modulation="channel"):
    pt = max(p // 4, 4)
    entries = {"sampler.value": (C, p, pt), **batch_norm_entries("reasoner.bn", pt)}
    if sampler == "dynamic":
        entries |= {"sampler.query": (C, p, pt), "sampler.key": (C, p, pt)}
    if sampler == "static":
        entries |= {"sampler.logit": (C, p)}
    if edges != "none":
        entries |= {"reasoner.edge": (pt, C) if edges == "dynamic" else (C, C)}
    if affine != "shift":
        entries |= {"modulator.scale_weight": (C, pt, p)}
    if affine != "scale":
        entries |= {"modulator.shift_weight": (C, pt, p)}
    return entries | {"modulator.scale_bias": (C, p), "modulator.shift_bias": (C, p)}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("ndim", [2, 3])
def test_state_dict_of_a_block(package, options, ndim):
    block = build(package, "VCRBlock", 48, 64, stride=2, groups=8, base_width=24, ndim=ndim, **options)
    C, p, kernel = 8, 24, (3,) * ndim
    wanted = {
        "conv1.weight": (C * p, 48, *(1,) * ndim),
        "conv2.weight": (C * p, p, *kernel),
        "conv3.weight": (256, C * p, *(1,) * ndim),
        "downsample.0.weight": (256, 48, *(1,) * ndim),
        **batch_norm_entries("bn1", C * p),
        **batch_norm_entries("bn2", C * p),
        **batch_norm_entries("bn3", 256),
        **batch_norm_entries("downsample.1", 256),
        **middle_entries(C, p, **options),
    }
    assert shapes(block) == wanted


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_state_dict_of_the_middle(package, options):
    middle = build(package, "VisualConceptReasoning", 40, 8, **options)
    assert shapes(middle) == {**batch_norm_entries("bn", 40), **middle_entries(8, 5, **options)}


@pytest.mark.parametrize("name", ["vcrnet50", "vcrnet101"])
def test_both_packages_have_the_same_state_dicts(name):
    assert shapes(build("vcr_ops", name)) == shapes(build("python_ref", name))


@pytest.mark.parametrize("package", PACKAGES)
def test_projection_is_made_only_where_the_shape_changes(package):
    assert build(package, "VCRBlock", 256, 64).downsample is None
    assert build(package, "VCRBlock", 64, 64).downsample is not None
    assert build(package, "VCRBlock", 256, 64, 2).downsample is not None
    given = nn.Identity()
    assert build(package, "VCRBlock", 256, 64, 1, given).downsample is given


@pytest.mark.parametrize("package", PACKAGES)
def test_initialisation(package):
    block = getattr(importlib.import_module(package), "VCRBlock")(64, 64)  # noqa: B009
    assert (block.modulator.scale_bias == 1).all()
    assert (block.modulator.shift_bias == 0).all()
    for name in ("sampler.value", "sampler.query", "sampler.key", "reasoner.edge", "modulator.scale_weight"):
        assert block.get_parameter(name).std() > 0.05
    block = getattr(importlib.import_module(package), "VCRBlock")(64, 64, zero_init=True)  # noqa: B009
    assert not block.modulator.scale_weight.any()
    assert not block.modulator.shift_weight.any()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("modulation", ["channel", "pixel"])
def test_zero_init_computes_what_a_trained_resnext_block_computes(package, training, modulation):
    import python_ref

    torch.manual_seed(0)
    plain = python_ref.Bottleneck(64, 64, groups=8, base_width=8).double()
    for x in plain.state_dict().values():
        if x.is_floating_point():
            x.copy_(torch.rand_like(x) + 0.1)
    block = (
        importlib.import_module(package)
        .VCRBlock(64, 64, groups=8, base_width=8, modulation=modulation, zero_init=True)
        .double()
    )
    missing, unexpected = block.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.split(".")[0] in ("sampler", "reasoner", "modulator") for name in missing)
    x = torch.randn(2, 64, 6, 5, dtype=torch.float64)
    plain.train(training)
    block.train(training)
    torch.testing.assert_close(block(x), plain(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block.bn2.running_var, plain.bn2.running_var, rtol=1e-12, atol=1e-12)


# Convolutions and products alone are counted here; the paper's tool counts norms and pools as well (0.01 to 0.02).
GFLOPS = {
    "resnext50": ("resnext50", {}, 4.24),
    "resnext101": ("resnext101", {}, 7.99),
    "vcrnet50": ("vcrnet50", {}, 4.26),
    "vcrnet50-pixel": ("vcrnet50", {"modulation": "pixel"}, 4.29),
    "vcrnet101": ("vcrnet101", {}, 8.01),
}


@pytest.mark.parametrize("name, options, wanted", GFLOPS.values(), ids=GFLOPS.keys())
def test_flops_of_the_equations(name, options, wanted):
    network = build("python_ref", name, **options).eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 224, 224, device="meta"))
    assert wanted - 0.025 <= counter.get_total_flops() / 2e9 <= wanted
