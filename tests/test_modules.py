"""The module tree is PyTorch's own: state dicts, copies, frozen parts, hooks and other norms work as ever."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import python_ref
import vcr_ops
from tests.small import BACKENDS, VARIANTS, assert_same, block, enliven, feature_map, middle, results

C, P, PT = 3, 4, 4


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in module.state_dict().items()}


BN = {"weight": (PT,), "bias": (PT,), "running_mean": (PT,), "running_var": (PT,), "num_batches_tracked": ()}


@pytest.mark.parametrize("sampler", ["dynamic", "static", "pool"])
@pytest.mark.parametrize("edges", ["dynamic", "static", "none"])
@pytest.mark.parametrize("affine", ["both", "scale", "shift"])
def test_state_dict(sampler: str, edges: str, affine: str) -> None:
    found = shapes(middle(sampler=sampler, edges=edges, affine=affine))
    expected: dict[str, tuple[int, ...]] = {f"bn.{name}": (12,) if shape else () for name, shape in BN.items()}
    expected["sampler.value"] = (C, P, PT)
    if sampler == "dynamic":
        expected |= {"sampler.query": (C, P, PT), "sampler.key": (C, P, PT)}
    if sampler == "static":
        expected["sampler.logit"] = (C, P)
    if edges != "none":
        expected["reasoner.edge"] = (PT, C) if edges == "dynamic" else (C, C)
    expected |= {f"reasoner.bn.{name}": shape for name, shape in BN.items()}
    for name in ("scale", "shift"):
        if affine in ("both", name):
            expected[f"modulator.{name}_weight"] = (C, PT, P)
        expected[f"modulator.{name}_bias"] = (C, P)
    assert found == expected


def test_state_dicts_are_the_reference_s() -> None:
    options: dict[str, Any]
    for options in (
        {},
        {"modulation": "pixel", "sampler": "static", "edges": "static"},
        {"affine": "shift", "ndim": 3},
    ):
        ours, theirs = vcr_ops.VCRBlock(64, 64, 2, **options), python_ref.VCRBlock(64, 64, 2, **options)
        assert shapes(ours) == shapes(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
    assert shapes(vcr_ops.vcrnet50(10)) == shapes(python_ref.vcrnet50(10))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_block_is_the_reference_s(variant: str, backend: str, training: bool) -> None:
    ours = block(backend, **VARIANTS[variant]).double().train(training)
    theirs: Any = python_ref.VCRBlock(16, 4, groups=3, base_width=80, **VARIANTS[variant]).double().train(training)
    theirs.load_state_dict(ours.state_dict())
    x = feature_map(3, 16, 6, 5, dtype=torch.float64)
    assert_same(results(ours, x), results(theirs, x), 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_network_s_conventions(backend: str) -> None:
    net = vcr_ops.vcrnet50(
        7, zero_init_residual=True, replace_stride_with_dilation=(False, True, True), backend=backend
    )
    assert all(bool((b.bn3.weight == 0).all()) for b in net.modules() if isinstance(b, vcr_ops.VCRBlock))
    assert net.layer3[0].conv2.dilation == (1, 1)
    assert net.layer3[1].conv2.dilation == net.layer4[0].conv2.dilation == (2, 2)
    assert net.layer4[1].conv2.dilation == (4, 4)
    net.eval()
    with torch.no_grad():
        stem = net.maxpool(net.bn1(net.conv1(feature_map(1, 3, 64, 64))))
        assert net.layer4(net.layer3(net.layer2(net.layer1(stem)))).shape == (1, 2048, 8, 8)
    video = vcr_ops.vcrnet50(5, ndim=3, backend=backend, modulation="pixel").eval()
    with torch.no_grad():
        assert video(feature_map(1, 3, 2, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_init_is_the_plain_block(backend: str) -> None:
    ours = vcr_ops.VCRBlock(16, 4, groups=3, base_width=80, zero_init=True, backend=backend).double()
    plain = python_ref.Bottleneck(16, 4, groups=3, base_width=80).double()
    plain.load_state_dict({name: x for name, x in ours.state_dict().items() if name in plain.state_dict()})
    x = feature_map(3, 16, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies(backend: str) -> None:
    m = middle(backend)
    y = feature_map(2, 12, 3, 5)
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    expected = results(m, y)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(buffer, weights_only=False)):
        assert_same(results(other, y), expected, 0)
    assert "modulation='channel'" in repr(m)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_meta_device(backend: str) -> None:
    with torch.device("meta"):
        m = vcr_ops.VCRBlock(64, 64, 2, backend=backend)
        x = torch.empty(2, 64, 8, 8, requires_grad=True)
    out = m(x)
    assert out.shape == (2, 256, 4, 4)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.device.type == "meta"
    m.to_empty(device="cpu")
    assert m.sampler.value.device.type == "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_channels_last(backend: str, training: bool) -> None:
    m = block(backend).train(training)
    x = feature_map(2, 16, 5, 6)
    expected = results(m, x)
    m = m.to(memory_format=torch.channels_last)
    y = x.to(memory_format=torch.channels_last).requires_grad_()
    assert copy.deepcopy(m)(y).is_contiguous(memory_format=torch.channels_last)
    assert_same(results(m, y), expected)
    inner = middle(backend)
    z = feature_map(2, 12, 2, 3, 4, channels_last=True)
    inner.bn = nn.BatchNorm3d(12)
    out = inner(z)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters(backend: str) -> None:
    m = middle(backend)
    y = feature_map(2, 12, 3, 5)
    everything = results(m, y)
    for frozen in (
        ["bn.weight"],
        ["sampler.query", "modulator.scale_bias", "reasoner.edge"],
        list(dict(m.named_parameters())),
    ):
        some = copy.deepcopy(m)
        for name, p in some.named_parameters():
            p.requires_grad_(name not in frozen)
        assert_same(results(some, y), {k: v for k, v in everything.items() if k[1:] not in frozen}, 0)
        out = some(y.requires_grad_(False))
        assert out.requires_grad == (len(frozen) < 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["bn", "reasoner.bn"])
def test_one_frozen_batch_norm(backend: str, frozen: str) -> None:
    """eval() of one batch norm in a training module freezes its statistics, not the other's."""
    m, theirs = middle(backend).double(), reference(12, 3)
    theirs.load_state_dict(m.state_dict())
    y = feature_map(3, 12, 3, 5, dtype=torch.float64)
    for each in (m, theirs):
        each.get_submodule(frozen).eval()
    assert_same(results(m, y), results(theirs, y), 1e-9)


def reference(channels: int, concepts: int, **options: Any) -> Any:
    return python_ref.VisualConceptReasoning(channels, concepts, **options).double()


NORMS: dict[str, Any] = {
    "momentum": lambda n: nn.BatchNorm2d(n, momentum=0.3, eps=1e-3),
    "cumulative": lambda n: nn.BatchNorm2d(n, momentum=None),
    "untracked": lambda n: nn.BatchNorm2d(n, track_running_stats=False),
    "plain": lambda n: nn.BatchNorm2d(n, affine=False),
    "group": lambda n: nn.GroupNorm(3, n),
    "identity": lambda n: nn.Identity(),
    "instance": lambda n: nn.InstanceNorm2d(n, affine=True),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("at", ["bn", "reasoner.bn"])
def test_norms(backend: str, norm: str, at: str) -> None:
    """Three steps and an evaluation, beside the reference with the same norm."""
    ours, theirs = middle(backend).double(), reference(12, 3)
    if at == "bn":
        ours.bn, theirs.bn = NORMS[norm](12).double(), NORMS[norm](12).double()
    elif norm in ("group", "instance"):
        ours.reasoner.bn, theirs.reasoner.bn = nn.GroupNorm(2, 4).double(), nn.GroupNorm(2, 4).double()
    else:
        for m in (ours, theirs):
            old = NORMS[norm](4)
            m.reasoner.bn = nn.Identity()
            if norm != "identity":
                m.reasoner.bn = nn.BatchNorm1d(4, old.eps, old.momentum, old.affine, old.track_running_stats).double()
    enliven(ours)
    theirs.load_state_dict(ours.state_dict())
    for step in range(4):
        training = step != 2
        y = feature_map(3, 12, 3, 5, seed=step, dtype=torch.float64)
        ours.train(training)(y).sum().backward()
        theirs.train(training)(y).sum().backward()
        assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()), 1e-9)
        y.requires_grad_()
        assert_same(results(ours, y), results(theirs, y), 1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sync_batch_norm_outside_a_process_group(backend: str) -> None:
    m = middle(backend).double()
    expected = results(m, feature_map(2, 12, 3, 5, dtype=torch.float64))
    m = nn.SyncBatchNorm.convert_sync_batchnorm(m)
    assert type(m.bn) is type(m.reasoner.bn) is nn.SyncBatchNorm
    assert_same(results(m, feature_map(2, 12, 3, 5, dtype=torch.float64)), expected, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_module(backend: str) -> None:
    """Parameters, buffers and features in bfloat16, with norms that are fused and norms that are called."""
    y = feature_map(3, 12, 4, 5).bfloat16()
    m = middle(backend)
    expected = results(m, y.float())
    m = m.bfloat16()
    got = results(m, y)
    assert all(x.dtype in (torch.bfloat16, torch.int64) for x in got.values())
    assert_same({k: v.float() for k, v in got.items()}, {k: v.float() for k, v in expected.items()}, 0.05)
    hooked = copy.deepcopy(m)
    hooked.reasoner.bn.register_forward_hook(lambda *_: None)
    got = results(hooked, y)
    assert_same({k: v.float() for k, v in got.items()}, {k: v.float() for k, v in expected.items()}, 0.05)
    empty = m(y[:0])
    assert empty.shape == (0, 12, 4, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("modulation", ["channel", "pixel"])
@pytest.mark.parametrize("name", ["bn", "sampler", "reasoner", "reasoner.bn", "modulator"])
def test_hooks(backend: str, modulation: str, name: str) -> None:
    """Hooks of every kind run, what they see is what the module would give, and nothing else changes."""
    m = middle(backend, modulation=modulation).double()
    y = feature_map(2, 12, 3, 5, dtype=torch.float64)
    expected = results(m, y)
    seen: list[Tensor] = []

    def forward_hook(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    other = copy.deepcopy(m)
    other.get_submodule(name).register_forward_hook(forward_hook)
    assert_same(results(other, y, other), expected, 1e-9)
    assert len(seen) == 1
    for register in ("register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"):
        calls: list[object] = []
        other = copy.deepcopy(m)
        getattr(other.get_submodule(name), register)(lambda module, *args, calls=calls: calls.append(args))
        assert_same(results(other, y, other), expected, 1e-9)
        assert len(calls) == 1, register


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_hooks_change_is_honoured(backend: str) -> None:
    m = middle(backend)
    y = feature_map(2, 12, 3, 5)
    before = m(y)
    handle = m.bn.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    torch.testing.assert_close(m(y)[0, :, 0, 0], m(y)[1, :, 2, 2])
    handle.remove()
    handle = m.reasoner.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    bias = (m.modulator.scale_bias, m.modulator.shift_bias)
    torch.testing.assert_close(m(y), vcr_ops.concept_modulate(m.bn(y), torch.zeros(2, 3, 4), *bias, backend=backend))
    handle.remove()
    torch.testing.assert_close(m(y), before)
    names = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: names.append(type(module).__name__)
    )
    try:
        torch.testing.assert_close(m(y), before)
    finally:
        handle.remove()
    assert names == [
        "BatchNorm2d",
        "ConceptSampler",
        "BatchNorm1d",
        "ConceptReasoner",
        "ConceptModulator",
        "VisualConceptReasoning",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_subclasses_and_replaced_forwards_are_called(backend: str) -> None:
    class Half(vcr_ops.ConceptSampler):
        def forward(self, z: Tensor, return_attention: bool = False) -> Any:
            return super().forward(z / 2, return_attention)

    m = middle(backend)
    y = feature_map(2, 12, 3, 5)
    half = copy.deepcopy(m)
    half.sampler.__class__ = Half
    z = m.bn(y)
    expected = m.modulator(z, m.reasoner(m.sampler(z / 2)))
    torch.testing.assert_close(half(y), expected)
    replaced = copy.deepcopy(m)
    forward = replaced.sampler.forward
    replaced.sampler.forward = lambda z: forward(z / 2)
    torch.testing.assert_close(replaced(y), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parametrized(backend: str) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    m = middle(backend)
    y = feature_map(2, 12, 3, 5)
    doubled = copy.deepcopy(m)
    with torch.no_grad():
        doubled.sampler.value.mul_(2)
        doubled.bn.weight.mul_(2)
        doubled.reasoner.bn.weight.mul_(2)
    expected = doubled(y)
    for part, name in ((m.sampler, "value"), (m.bn, "weight"), (m.reasoner.bn, "weight")):
        nn.utils.parametrize.register_parametrization(part, name, Double())
    torch.testing.assert_close(m(y), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_kept_as_attributes(backend: str) -> None:
    """As in the replicas of nn.DataParallel."""
    m = middle(backend)
    y = feature_map(2, 12, 3, 5)
    expected = results(m, y)["out"]
    for module in m.modules():
        for name, p in list(module._parameters.items()):
            del module._parameters[name]
            setattr(module, name, None if p is None else p.detach().clone())
    torch.testing.assert_close(m(y), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend: str) -> None:
    m = middle(backend)
    y = feature_map(2, 12, 3, 5)
    for training in (False, True):
        m.train(training)
        expected = results(m, y)
        with torch.inference_mode():
            out = m(y)
            assert out.is_inference()
            torch.testing.assert_close(out.clone(), expected["out"])
        if training:
            assert_same(dict(m.named_buffers()), {k: v for k, v in expected.items() if "running" in k or "num" in k})
        m(y).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_saves_nothing(backend: str) -> None:
    m = middle(backend)
    with torch.no_grad():
        out = m(feature_map(2, 12, 3, 5).requires_grad_())
    assert not out.requires_grad
    assert not any(b.requires_grad for b in m.buffers())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    m, plain = middle(backend), nn.BatchNorm2d(12)
    before = {name: b.clone() for name, b in m.named_buffers()}
    y = torch.empty(0, 12, 3, 5, requires_grad=True)
    out = m(y)
    out.sum().backward()
    assert out.shape == y.shape
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in m.parameters())
    plain(y)
    for name, b in m.named_buffers():
        assert torch.equal(b, before[name] + (1 if "tracked" in name else 0)), name
    assert plain.num_batches_tracked == 1
    m.eval()
    assert m(y).shape == y.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_can_be_left_alone(backend: str) -> None:
    m = middle(backend)
    y = feature_map(2, 12, 3, 5)
    before = [b.clone() for b in m.buffers()]
    with vcr_ops.no_running_stats_update():
        first = m(y)
        m.reasoner(m.sampler(y))
    assert all(map(torch.equal, before, m.buffers()))
    torch.testing.assert_close(m(y), first)
    assert not torch.equal(before[0], m.bn.running_mean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_modules_make_the_middle(backend: str) -> None:
    m = middle(backend, modulation="pixel").double()
    y = feature_map(2, 12, 3, 5, dtype=torch.float64)
    other = copy.deepcopy(m)

    def one_by_one(y: Tensor) -> Tensor:
        z = other.bn(y)
        h, attention = other.sampler(z, return_attention=True)
        return other.modulator(z, other.reasoner(h), attention)

    assert_same(results(other, y, one_by_one), results(m, y), 1e-9)
