"""Proves: frozen batch norms, ours, torchvision's and those that timm makes, are constant, right, and fused."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import python_ref
import vcr_ops
from tests.packages import imported
from tests.small import BACKENDS, VARIANTS, assert_same, enliven, feature_map, results
from vcr_ops.modules import middle as middle_module


def block(backend: str = "cpp", **options: Any) -> Any:
    torch.manual_seed(0)
    return enliven(vcr_ops.VCRBlock(16, 4, groups=3, base_width=80, backend=backend, **options)).double()


def reference(module: Any, options: dict[str, str]) -> Any:
    """python_ref's block with nn.BatchNorms in evaluation that have the same numbers, as constants."""
    theirs = python_ref.VCRBlock(16, 4, groups=3, base_width=80, **options).double()
    theirs.load_state_dict({**theirs.state_dict(), **module.state_dict()})
    for m in theirs.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.eval().requires_grad_(False)
    return theirs


def comparable(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in found.items() if name in ("out", "dy") or name.startswith("d")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_blocks(variant: str, backend: str) -> None:
    b = block(backend, **VARIANTS[variant])
    wanted = results(reference(b, VARIANTS[variant]), x := feature_map(3, 16, 5, 6, dtype=torch.float64))
    with torch.no_grad():
        before = copy.deepcopy(b).eval()(x)
    assert vcr_ops.freeze_batch_norm(b) is b
    assert all(type(bn) is vcr_ops.FrozenBatchNorm for bn in (b.bn1, b.bn2, b.bn3, b.reasoner.bn))
    assert vcr_ops.explain(b, x.detach()).path == "whole"
    b.train()
    found = results(b, x)
    assert_same(comparable(found), comparable(wanted), 1e-11)
    torch.testing.assert_close(found["out"], before, rtol=1e-11, atol=1e-11)
    for name, buffer in b.named_buffers():
        assert torch.equal(found[name], buffer), name
    assert not [name for name, _ in b.named_parameters() if "bn" in name]


def test_it_is_fused_and_says_what_it_moves() -> None:
    b = vcr_ops.freeze_batch_norm(block())
    x = feature_map(3, 16, 5, 6, dtype=torch.float64)
    with mock.patch.object(vcr_ops.FrozenBatchNorm, "forward", side_effect=AssertionError) as called:
        b.bn1, b.bn3 = nn.Identity(), nn.Identity()
        b(x)
        b.reasoner(feature_map(3, 3, 4, dtype=torch.float64))
    assert not called.called
    forward = vcr_ops.explain(b, x).step("training forward")
    assert (forward.reads, forward.writes) == (2, 1)


def test_by_itself() -> None:
    for shape in ((4, 6), (4, 6, 7), (2, 6, 4, 5), (2, 6, 2, 3, 4)):
        bn = enliven(vcr_ops.FrozenBatchNorm(6, eps=0.1)).double().train()
        plain = nn.BatchNorm2d(6, eps=0.1).double().eval()
        plain.load_state_dict(bn.state_dict(), strict=False)
        x = feature_map(*shape, dtype=torch.float64)
        wide = x.reshape(*shape, *(1,) * (4 - len(shape))) if len(shape) < 5 else x.flatten(3)
        torch.testing.assert_close(bn(x).flatten(), plain(wide).flatten())
    assert repr(vcr_ops.FrozenBatchNorm(6)) == "FrozenBatchNorm(6, eps=1e-05)"


def test_state_dicts_of_batch_norms_load() -> None:
    plain = block()
    frozen = vcr_ops.freeze_batch_norm(block())
    frozen.load_state_dict(plain.state_dict())
    torch.testing.assert_close(frozen.reasoner.bn.running_var, plain.reasoner.bn.running_var)
    assert "bn1.num_batches_tracked" in plain.state_dict()
    assert "bn1.num_batches_tracked" not in frozen.state_dict()
    network = vcr_ops.VCRNet((1, 1, 1, 1), 3, groups=2, width_per_group=1)
    other = vcr_ops.freeze_batch_norm(vcr_ops.VCRNet((1, 1, 1, 1), 3, groups=2, width_per_group=1))
    vcr_ops.load_resnext(other, enliven(network).state_dict())
    x = feature_map(2, 3, 32, 32)
    torch.testing.assert_close(other.train()(x), network.eval()(x))


def test_as_norm_layer() -> None:
    net = vcr_ops.VCRNet((1, 1, 1, 1), 3, groups=2, width_per_group=1, norm_layer=vcr_ops.FrozenBatchNorm)
    kinds = {type(m) for name, m in net.named_modules() if name.endswith(("bn1", "bn2", "bn3", "downsample.1"))}
    assert kinds == {vcr_ops.FrozenBatchNorm}
    net(feature_map(2, 3, 32, 32)).sum().backward()
    assert type(net.layer1[0].reasoner.bn) is nn.BatchNorm1d  # no norm of maps: freeze_batch_norm takes it along


@pytest.mark.parametrize("who", ["torchvision", "timm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_packages_norms_are_fused(who: str, backend: str) -> None:
    plain = block(backend)
    if who == "timm":
        frozen = imported("timm.layers").freeze_batch_norm_2d(copy.deepcopy(plain))
    else:
        kind = imported("torchvision.ops").FrozenBatchNorm2d
        frozen = vcr_ops.VCRBlock(16, 4, groups=3, base_width=80, norm_layer=kind, backend=backend).double()
        frozen.load_state_dict(plain.state_dict())
    assert type(frozen.bn2).__name__ == "FrozenBatchNorm2d"
    assert type(frozen.reasoner.bn) is nn.BatchNorm1d
    x = feature_map(3, 16, 5, 6, dtype=torch.float64)
    assert vcr_ops.explain(frozen, x).path == "whole"
    theirs = reference(plain, {})
    theirs.reasoner.bn.train().requires_grad_()
    assert_same(comparable(results(frozen.train(), x)), comparable(results(theirs, x)), 1e-11)
    # The same where it is called: a hook wants to see it.
    seen: list[Tensor] = []
    frozen.bn2.register_forward_hook(lambda m, args, out: seen.append(out))
    assert vcr_ops.explain(frozen, x).path == "after norm"
    assert_same(comparable(results(frozen, x)), comparable(results(theirs, x)), 1e-11)
    assert seen


def test_timm_freezes_what_was_synchronised() -> None:
    """Then it makes the reasoner's norm one of maps, too, which would not take rows if it were called."""
    plain = block()
    frozen = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    frozen = imported("timm.layers").freeze_batch_norm_2d(frozen)
    assert type(frozen.reasoner.bn).__name__ == "FrozenBatchNorm2d"
    x = feature_map(3, 16, 5, 6, dtype=torch.float64)
    assert_same(comparable(results(frozen.train(), x)), comparable(results(reference(plain, {}), x)), 1e-11)
    h = feature_map(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(frozen.reasoner(h), plain.eval().reasoner(h))


def test_converted_and_folded() -> None:
    models = imported("torchvision.models")
    kind = imported("torchvision.ops").FrozenBatchNorm2d
    torch.manual_seed(0)
    net = models.resnet.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 3, groups=4, width_per_group=4, norm_layer=kind)
    x = feature_map(2, 3, 32, 32)
    before = enliven(net).eval()(x)
    torch.testing.assert_close(vcr_ops.convert(net)(x), before, rtol=1e-4, atol=1e-5)
    ours = vcr_ops.freeze_batch_norm(enliven(vcr_ops.VCRNet((1, 1, 1, 1), 3, groups=2, width_per_group=1)).eval())
    ours, x = ours.double(), x.double()  # in float32 the two round apart, layer by layer
    folded = vcr_ops.fold(ours)
    assert type(folded.layer1[0].bn1) is type(folded.bn1) is nn.Identity
    torch.testing.assert_close(folded(x), ours(x))


def test_compiled() -> None:
    b = vcr_ops.freeze_batch_norm(block())
    x = feature_map(3, 16, 5, 6, dtype=torch.float64)
    call = torch.compile(copy.deepcopy(b), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(x), b(x))


def test_what_cannot_be_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))
    with pytest.raises(ValueError, match=r"without running statistics can't be frozen: 1\.0$"):
        vcr_ops.freeze_batch_norm(model)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match="model is a int; it takes"):
        vcr_ops.freeze_batch_norm(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_features is 0; it takes at least 1"):
        vcr_ops.FrozenBatchNorm(0)
    assert type(vcr_ops.freeze_batch_norm(nn.BatchNorm2d(3, affine=False))) is vcr_ops.FrozenBatchNorm
    shared = nn.BatchNorm2d(3)
    twice = vcr_ops.freeze_batch_norm(nn.Sequential(shared, shared))
    assert twice[0] is twice[1]
    assert middle_module.is_plain_batch_norm(twice[0])
