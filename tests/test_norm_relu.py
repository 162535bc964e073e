"""Proves: batch norm, shortcut and ReLU around the middle are one right op in evaluation, where nobody could tell."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import python_ref
import vcr_ops
from tests.closeness import Closeness, Result
from tests.small import enliven, feature_map
from vcr_ops.modules.norm_relu import run_norm_relu
from vcr_ops.ops.norm_relu.op import NO_NORM, NormConstants, norm_relu

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SIZES = [(2, 24, 5, 7), (3, 5, 1, 1), (1, 33, 3, 3), (2, 1, 4, 4), (2, 64, 56, 5), (0, 8, 3, 3)]


class Recorded(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.split("::")[-1])
        return func(*args, **(kwargs or {}))


def fused(module: Any, *inputs: Tensor) -> int:
    """How often a call of the module runs the op."""
    with Recorded() as seen:
        module(*inputs)
    return seen.names.count("norm_relu")


def draw_norm(channels: int, seed: int) -> nn.BatchNorm2d:
    torch.manual_seed(seed)
    bn = nn.BatchNorm2d(channels).eval()
    for x, mean in ((bn.weight, 1.0), (bn.bias, 0.0), (bn.running_mean, 0.2)):
        nn.init.normal_(x, mean, 0.5)
    nn.init.uniform_(bn.running_var, 0.5, 1.5)
    return bn


def equation(y: Tensor, norm: Any, shortcut: Tensor | None, shortcut_norm: Any, dtype: torch.dtype) -> Tensor:
    """relu(bn(y) + bn(shortcut)) as modules in one type."""

    def apply(x: Tensor, bn: nn.BatchNorm2d | None) -> Tensor:
        return x.to(dtype) if bn is None else copy.deepcopy(bn).to(dtype)(x.to(dtype))

    with torch.no_grad():
        z = apply(y, norm)
        return torch.relu(z if shortcut is None else z + apply(shortcut, shortcut_norm))


def constants(bn: nn.BatchNorm2d | None, dtype: torch.dtype) -> NormConstants:
    if bn is None:
        return NO_NORM
    numbers = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    return NormConstants(*(x.detach().to(dtype) for x in numbers), bn.eps)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shortcut", ["none", "plain", "normed"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype: str, layout: str, shortcut: str, size: tuple[int, ...]) -> None:
    kind, fine = DTYPES[dtype], torch.float64
    parameters = torch.float32 if dtype == "bf16" else kind
    closeness = Closeness(kind, f"norm_relu {dtype} {layout} {shortcut} {size}")
    for seed in range(5):
        torch.manual_seed(seed)
        y = torch.randn(size, dtype=fine).to(kind).contiguous(memory_format=FORMATS[layout])
        other = None if shortcut == "none" else torch.randn(size, dtype=fine).to(kind)
        if other is not None:
            other = other.contiguous(memory_format=FORMATS[layout])
        bn = draw_norm(size[1], seed)
        bn2 = draw_norm(size[1], seed + 100) if shortcut == "normed" else None
        out = norm_relu(y, constants(bn, parameters), other, constants(bn2, parameters))
        assert out.dtype == kind
        assert out.shape == y.shape
        assert min(size) <= 1 or out.is_contiguous(memory_format=FORMATS[layout])
        found = equation(y, bn, other, bn2, torch.float32 if dtype == "bf16" else kind).to(kind)
        if dtype == "f64":  # nothing finer is at hand: to rounding
            torch.testing.assert_close(out, found, rtol=1e-14, atol=1e-14)
        else:
            closeness.add(
                Result({"out": out}), Result({"out": found}), Result({"out": equation(y, bn, other, bn2, fine)})
            )
    if dtype != "f64":
        closeness.check()


def test_strides_of_every_kind() -> None:
    torch.manual_seed(0)
    bn, bn2 = draw_norm(6, 1), draw_norm(6, 2)
    base = torch.randn(4, 12, 9, 8)
    maps = [
        base[:3, ::2, :5, :4],
        base[:3, :6, 2:7, 3:7],
        base.transpose(2, 3)[:3, 3:9, :5, :4],
        base.contiguous(memory_format=torch.channels_last)[:3, :6, :5, :4],
        torch.randn(3, 6, 1, 1).expand(3, 6, 5, 4),
        torch.randn(3, 6, 5, 4),
    ]
    for y in maps:
        for shortcut in maps:
            before = y.clone(), shortcut.clone()
            out = norm_relu(y, constants(bn, torch.float32), shortcut, constants(bn2, torch.float32))
            torch.testing.assert_close(out, equation(y, bn, shortcut, bn2, torch.float32))
            assert torch.equal(y, before[0])
            assert torch.equal(shortcut, before[1])


def test_threads_batch_and_nonfinite_numbers(threads: Any) -> None:
    torch.manual_seed(0)
    bn = constants(draw_norm(64, 1), torch.float32)
    for memory_format in FORMATS.values():
        y, shortcut = (torch.randn(4, 64, 130, 131).contiguous(memory_format=memory_format) for _ in range(2))
        y[0, 3, 5, 7], y[1, 4, 6, 8], y[2, 5, 7, 9] = torch.nan, torch.inf, -torch.inf
        found = []
        for count in (1, 2, 3):
            threads(count)
            found.append(norm_relu(y, bn, shortcut))
        for other in found[1:]:
            assert torch.equal(found[0].view(torch.int32), other.view(torch.int32))
        for n in range(4):  # these are small maps, which aren't written past the caches
            alone = norm_relu(y[n : n + 1], bn, shortcut[n : n + 1])
            assert torch.equal(alone.view(torch.int32), found[0][n : n + 1].view(torch.int32))
        wanted = torch.relu(
            nn.functional.batch_norm(y, bn.mean, bn.var, bn.weight, bn.bias, False, eps=bn.eps) + shortcut
        )
        assert torch.equal(found[0].isnan(), wanted.isnan())
        assert torch.equal(found[0].isinf(), wanted.isinf())


def block(**options: Any) -> Any:
    torch.manual_seed(0)
    made = vcr_ops.VCRBlock(8, 4, 2, groups=2, base_width=64, **options)
    enliven(made)
    return made.eval()


X = feature_map(2, 8, 6, 5)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_is_what_its_modules_compute(dtype: str, layout: str) -> None:
    b = block(dropout=0.1, drop_path=0.1).to(DTYPES[dtype])
    x = X.to(DTYPES[dtype]).contiguous(memory_format=FORMATS[layout])
    with torch.no_grad():
        assert fused(b, x) == 2
        found = b(x)
        for name in ("bn1", "bn3", "downsample.1"):
            b.get_submodule(name).register_forward_hook(lambda *_: None)
        assert fused(b, x) == 0
        wanted = b(x)
    assert found.dtype == wanted.dtype
    assert found.stride() == wanted.stride()
    rounding = {"f32": 2e-6, "f64": 1e-14, "bf16": 0.03}[dtype]
    torch.testing.assert_close(found, wanted, rtol=rounding, atol=rounding)


def test_networks_and_folded_ones() -> None:
    torch.manual_seed(0)
    network = vcr_ops.VCRNet((1, 1, 1, 1), 10, 2, 4).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert fused(network, x) == 9
        found = network(x)
        folded = vcr_ops.fold(network)
        assert fused(folded, x) == 9
        torch.testing.assert_close(folded(x), found, rtol=1e-4, atol=1e-4)
        with vcr_ops.use_backend("composite"):
            assert fused(network, x) == 0
            torch.testing.assert_close(network(x), found, rtol=1e-4, atol=1e-4)
        frozen = vcr_ops.freeze_batch_norm(copy.deepcopy(network)).train()
        assert fused(frozen, x) == 9
        torch.testing.assert_close(frozen(x), found)


class Other(nn.BatchNorm2d):
    """A subclass may do more."""


def hook_on(name: str) -> Any:
    def change(b: Any) -> None:
        b.get_submodule(name).register_forward_hook(lambda *_: None)

    return change


def without_statistics(b: Any) -> None:
    b.bn1 = nn.BatchNorm2d(8, track_running_stats=False).eval()


# What is done to a block, and how many of its two ops are left.
CHANGES = {
    "nothing": (lambda b: None, 2),
    "training": (lambda b: b.train(), 0),
    "a training norm": (lambda b: b.bn3.train(), 1),
    "a hook on bn1": (hook_on("bn1"), 1),
    "a hook on relu": (hook_on("relu"), 0),
    "a hook on downsample": (hook_on("downsample"), 2),
    "a hook on downsample's norm": (hook_on("downsample.1"), 2),
    "a hook on a convolution": (hook_on("conv3"), 2),
    "another norm": (lambda b: setattr(b, "bn3", nn.GroupNorm(2, 16).eval()), 1),
    "a subclass of BatchNorm": (lambda b: setattr(b, "bn1", Other(8).eval()), 1),
    "no running statistics": (without_statistics, 1),
    "another activation": (lambda b: setattr(b, "relu", nn.GELU()), 0),
    "a forward of its own": (lambda b: setattr(b.bn1, "forward", b.bn1.forward), 1),
    "another shortcut": (lambda b: setattr(b, "downsample", nn.Conv2d(8, 16, 1, 2).eval()), 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_only_where_nobody_could_tell(name: str) -> None:
    change, left = CHANGES[name]
    b = block()
    change(b)
    with torch.no_grad():
        assert fused(b, X) == left


def test_hooks_run() -> None:
    b, seen = block(), []
    for path in ("downsample", "downsample.0", "downsample.1", "bn1", "relu", "bn3", "conv1"):
        b.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    with torch.no_grad():
        b(X)
    assert sorted(seen) == sorted(["downsample", "downsample.0", "downsample.1", "bn1", "relu", "relu", "bn3", "conv1"])
    other, called = block(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        with torch.no_grad():
            other(X)
    finally:
        handle.remove()
    for module in (other.bn1, other.bn3, other.downsample, other.downsample[1]):
        assert module in called


def test_gradients_take_the_modules() -> None:
    b = block()
    assert fused(b, X) == 0
    x = X.clone().requires_grad_()
    b.requires_grad_(False)
    assert fused(b, x) == 0  # the input's gradient
    assert fused(b, X) == 2
    b.bn3.weight.requires_grad_(True)
    assert fused(b, X) == 1
    b(X).sum().backward()
    assert b.bn3.weight.grad is not None


def test_inference_mode_autocast_and_compile() -> None:
    b = block()
    with torch.no_grad():
        wanted = b(X)
    with torch.inference_mode():
        assert fused(b, X) == 2
        torch.testing.assert_close(b(X), wanted)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused(b, X) == 2
        torch.testing.assert_close(b(X), wanted.bfloat16(), rtol=0.05, atol=0.05)
    # a shortcut in another type than the branch
    same = vcr_ops.VCRBlock(16, 4, groups=2, base_width=64).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused(same, feature_map(2, 16, 6, 5)) == 1
    with torch.no_grad():
        compiled = torch.compile(b, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), wanted)


def test_transforms_and_flops() -> None:
    b = block()
    with torch.no_grad():
        wanted = torch.stack([b(x[None]) for x in X])
        torch.testing.assert_close(torch.func.vmap(lambda x: b(x[None]))(X), wanted, rtol=1e-5, atol=1e-5)
        with FlopCounterMode(display=False) as counted:
            b(X)
        flops = counted.get_total_flops()
        b.relu.register_forward_hook(lambda *_: None)
        with FlopCounterMode(display=False) as counted:
            b(X)
    assert counted.get_total_flops() == flops


def test_the_op_by_itself() -> None:
    op = torch.ops.vcr_ops.norm_relu.default
    bn = constants(draw_norm(8, 0), torch.float32)
    y, shortcut = torch.randn(2, 2, 8, 6, 5)
    for memory_format in FORMATS.values():
        y, shortcut = (x.contiguous(memory_format=memory_format) for x in (y, shortcut))
        for arguments in ((y, *bn, None, *NO_NORM), (y, *bn, shortcut, *bn), (y, *NO_NORM, shortcut, *NO_NORM)):
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(NotImplementedError, match="norm_relu is for inference"):
        op(y.clone().requires_grad_(), *bn, None, *NO_NORM).sum().backward()
    # memory is guarded whoever calls
    for wrong in (
        (y, *bn, shortcut[:1], *NO_NORM),
        (y[:, :4], *bn, None, *NO_NORM),
        (y, *bn, shortcut.double(), *NO_NORM),
    ):
        with pytest.raises(ValueError, match="vcr_ops: "):
            op(*wrong)


def test_a_norm_that_does_not_fit_raises_as_ever() -> None:
    y = torch.randn(2, 8, 6, 5)
    with torch.no_grad():
        for bn in (nn.BatchNorm2d(4), nn.BatchNorm3d(8), nn.BatchNorm2d(8).double()):
            with pytest.raises((RuntimeError, ValueError)) as ours:
                run_norm_relu(y, bn.eval(), nn.ReLU(), "auto")
            with pytest.raises((RuntimeError, ValueError)) as theirs:
                bn(y)
            assert str(ours.value) == str(theirs.value)
        with pytest.raises(RuntimeError, match="match the size"):
            run_norm_relu(y, nn.BatchNorm2d(8).eval(), nn.ReLU(), "auto", torch.randn(2, 8, 6, 4))


@pytest.mark.parametrize("adapter", [None, "paths"])
def test_converted_blocks(adapter: str | None) -> None:
    torch.manual_seed(0)
    net = python_ref.ResNet(python_ref.Bottleneck, (1, 1, 1, 1), 10, groups=2).eval()
    enliven(net)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        assert fused(net, x) == 0
        parts = {name: name for name in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample")}
        vcr_ops.convert(net, adapter=(lambda m: parts if hasattr(m, "conv3") else None) if adapter else None)
        assert fused(net, x) == 8
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
