"""Proves: batch norm, shortcut and ReLU around the middle are one right op on CPUs, where nobody could tell."""

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
from tests.small import assert_same, enliven, feature_map, results
from vcr_ops.modules.norm_relu import run_norm_relu
from vcr_ops.ops.norm_relu.op import NO_NORM, NormConstants, batch_norm_relu, norm_relu, norm_relu_

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
    """How often a call of the module runs one of the ops."""
    with Recorded() as seen:
        module(*inputs)
    return seen.names.count("norm_relu") + seen.names.count("batch_norm_relu")


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
        mine = y.clone()
        assert norm_relu_(mine, constants(bn, parameters), other, constants(bn2, parameters)) is mine
        assert torch.equal(mine, out)
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


def training_step(
    y: Tensor, bn: Any, shortcut: Tensor | None, grad: Tensor, dtype: torch.dtype, *, ours: bool
) -> Result:
    """Outputs and gradients in a type; the running statistics are among the outputs."""
    bn = copy.deepcopy(bn).train()
    if dtype == torch.float64:
        bn = bn.double()
    leaves = {"y": y.detach().to(dtype).requires_grad_()}
    if shortcut is not None:
        leaves["shortcut"] = shortcut.detach().to(dtype).requires_grad_()
    if ours:
        with Recorded() as seen:
            out = run_norm_relu(leaves["y"], bn, nn.ReLU(), "cpp", leaves.get("shortcut"))
        assert seen.names.count("batch_norm_relu") == 1
    else:
        z = bn(leaves["y"])
        out = torch.relu(z + leaves["shortcut"] if shortcut is not None else z)
    if bn.weight is not None:
        leaves |= {"weight": bn.weight, "bias": bn.bias}
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(dtype))
    for x, gradient in zip(leaves.values(), gradients, strict=True):
        assert gradient.dtype == x.dtype
        assert gradient.shape == x.shape
    outputs = {"out": out.detach(), "mean": bn.running_mean, "var": bn.running_var}
    assert bn.num_batches_tracked == 1
    return Result(outputs, dict(zip(leaves, gradients, strict=True)))


@pytest.mark.parametrize("size", [size for size in SIZES if size[0]] + [(5, 40, 7, 7), (3, 16, 30, 37)], ids=str)
@pytest.mark.parametrize("shortcut", ["none", "plain"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_training(dtype: str, layout: str, shortcut: str, size: tuple[int, ...]) -> None:
    kind = DTYPES[dtype]
    closeness = Closeness(kind, f"batch_norm_relu {dtype} {layout} {shortcut} {size}")
    for seed in range(5):
        torch.manual_seed(seed)
        maps = [(torch.randn(size) * 2 + 3 * (k == 0)).to(kind) for k in range(3)]
        y, other, grad = (x.contiguous(memory_format=FORMATS[layout]) for x in maps)
        other = other if shortcut == "plain" else None
        bn = draw_norm(size[1], seed)
        exact = equation(y, bn.train(), other, None, torch.float64)
        grad = grad.masked_fill(near_kink(y, bn, other), 0)  # there the ReLU may go either way
        assert exact.shape == grad.shape
        sides = [
            training_step(y, bn, other, grad, kind, ours=True),
            training_step(y, bn, other, grad, kind, ours=False),
            training_step(y, bn, other, grad, torch.float64, ours=False),
        ]
        closeness.add(*sides)
    closeness.check()


def near_kink(y: Tensor, bn: Any, shortcut: Tensor | None) -> Tensor:
    z = copy.deepcopy(bn).double().train()(y.double())
    z = z if shortcut is None else z + shortcut.double()
    return z.detach().abs() < (0.05 if y.dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
def test_gradcheck(layout: str, shortcut: bool, affine: bool) -> None:
    torch.manual_seed(0)
    y, other = (
        torch.randn(3, 5, 4, 3, dtype=torch.float64).contiguous(memory_format=FORMATS[layout]) for _ in range(2)
    )
    weight, bias = torch.randn(2, 5, dtype=torch.float64)
    inputs = [y, weight if affine else None, bias if affine else None, 1e-3, other if shortcut else None]
    for x in inputs:
        if isinstance(x, Tensor):
            x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: batch_norm_relu(*a)[0], inputs)
    out = batch_norm_relu(*inputs)[0]
    (first,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="batch_norm_relu: the fused kernels have no double backward"):
        first.sum().backward()


def test_batch_norm_s_own_rules() -> None:
    """Buffers step by step beside nn.BatchNorm's, whatever its options; what it refuses is refused alike."""
    torch.manual_seed(0)
    for options in ({}, {"momentum": None}, {"momentum": 0.3, "affine": False}, {"track_running_stats": False}):
        ours, theirs = (nn.BatchNorm2d(6, **options) for _ in range(2))
        for _ in range(3):
            y = torch.randn(4, 6, 5, 3)
            with torch.no_grad():
                found, wanted = run_norm_relu(y, ours, torch.relu, "auto"), torch.relu(theirs(y))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
            for name, buffer in theirs.named_buffers():
                torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-6, atol=1e-7)
    bn = nn.BatchNorm2d(6)
    with vcr_ops.no_running_stats_update():
        run_norm_relu(torch.randn(4, 6, 5, 3), bn, nn.ReLU(), "auto")
    assert bn.num_batches_tracked == 0
    assert torch.equal(bn.running_mean, torch.zeros(6))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        run_norm_relu(torch.randn(1, 6, 1, 1), bn, nn.ReLU(), "auto")


def test_training_strides_threads_and_parts(threads: Any) -> None:
    torch.manual_seed(0)
    base = torch.randn(4, 12, 9, 8)
    bn = draw_norm(6, 1).train()
    for y in (base[:3, ::2, :5, :4], base.transpose(2, 3)[:3, 3:9, :5, :4], torch.randn(3, 6, 1, 1).expand(3, 6, 5, 4)):
        for grad in (torch.randn(1).expand(3, 6, 5, 4), torch.randn(3, 4, 5, 6).transpose(1, 3)):
            y = y + torch.randn(3, 6, 1, 1) if y.stride(2) == 0 else y
            for other in (None, base[1:, 3:9, 2:7, 1:5]):
                found = training_step(y, bn, other, grad, torch.float32, ours=True).tensors()
                wanted = training_step(y, bn, other, grad, torch.float32, ours=False).tensors()
                for name, x in wanted.items():
                    torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5, msg=name)
    for layout in FORMATS.values():
        y, other, grad = (torch.randn(5, 48, 40, 41).contiguous(memory_format=layout) for _ in range(3))
        big, sides = draw_norm(48, 2), []
        for count in (1, 2, 3):
            threads(count)
            sides.append(training_step(y, big, other, grad, torch.float32, ours=True).tensors())
        for side in sides[1:]:
            assert all(torch.equal(x, side[name]) for name, x in sides[0].items())
    frozen = draw_norm(6, 3).train().requires_grad_(False)
    y = torch.randn(3, 6, 5, 4)
    assert not run_norm_relu(y, frozen, nn.ReLU(), "auto").requires_grad
    x = torch.randn(3, 6, 5, 4, requires_grad=True)
    run_norm_relu(y, frozen, nn.ReLU(), "auto", x).sum().backward()
    assert x.grad is not None
    half = draw_norm(6, 3).train().bfloat16()
    run_norm_relu(y.bfloat16(), half, nn.ReLU(), "auto").sum().backward()
    assert half.weight.grad.dtype == torch.bfloat16


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
    "training": (lambda b: b.train(), 2),
    "a training norm": (lambda b: b.bn3.train(), 1),
    "a hook on bn1": (hook_on("bn1"), 1),
    "a hook on relu": (hook_on("relu"), 0),
    "a hook on downsample": (hook_on("downsample"), 2),
    "a hook on downsample's norm": (hook_on("downsample.1"), 2),
    "a hook on a convolution": (hook_on("conv3"), 2),
    "another norm": (lambda b: setattr(b, "bn3", nn.GroupNorm(2, 16).eval()), 1),
    "a subclass of BatchNorm": (lambda b: setattr(b, "bn1", Other(8).eval()), 1),
    "no running statistics": (without_statistics, 2),
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


@pytest.mark.parametrize("layout", FORMATS)
def test_block_s_training_step(layout: str) -> None:
    """Gradients and buffers are those of the modules one by one."""
    b = block().train()
    x = X.contiguous(memory_format=FORMATS[layout])
    assert fused(b, x) == 2
    found = results(b, x.clone())
    for name in ("bn1", "bn3"):
        b.get_submodule(name).register_forward_hook(lambda *_: None)
    assert fused(copy.deepcopy(b), x) == 0
    wanted = results(b, x.clone())
    assert_same(found, wanted, 1e-4)


def test_gradients_of_known_statistics_take_the_modules() -> None:
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
    op, in_place = torch.ops.vcr_ops.norm_relu.default, torch.ops.vcr_ops.norm_relu_.default
    bn = constants(draw_norm(8, 0), torch.float32)
    y, shortcut = torch.randn(2, 2, 8, 6, 5)
    for memory_format in FORMATS.values():
        y, shortcut = (x.contiguous(memory_format=memory_format) for x in (y, shortcut))
        for arguments in ((y, *bn, None, *NO_NORM), (y, *bn, shortcut, *bn), (y, *NO_NORM, shortcut, *NO_NORM)):
            for each in (op, in_place):
                torch.library.opcheck(each, arguments, test_utils=("test_schema", "test_faketensor"))
    for arguments in ((y, bn.weight, bn.bias, 1e-5, shortcut), (y, None, None, 1e-5, None)):
        leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in arguments]
        torch.library.opcheck(
            torch.ops.vcr_ops.batch_norm_relu.default,
            leaves,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"),
        )
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


def test_no_slice_is_written_in_place() -> None:
    bn, before = constants(draw_norm(8, 0), torch.float32), torch.randn(2, 16, 6, 5)
    for slice_of in (lambda x: x[:, ::2], lambda x: x[:, :8, :, :3], lambda x: x[:, :8, 2:]):
        y = before.clone()
        with pytest.raises(ValueError, match="y is written in place: it must be a contiguous or a channels_last map"):
            torch.ops.vcr_ops.norm_relu_.default(slice_of(y), *bn, None, *NO_NORM)
        assert torch.equal(y, before)


class Convolution(nn.Conv2d):
    """Keeps what it gave."""

    def forward(self, x: Tensor) -> Tensor:
        self.given = super().forward(x)
        return self.given


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_only_what_nobody_else_has_is_overwritten(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    block = vcr_ops.VCRBlock(16, 8, groups=4, base_width=64).eval().to(memory_format=memory_format)
    x = torch.randn(2, 16, 6, 5).contiguous(memory_format=memory_format)
    before = x.clone()
    with torch.inference_mode():
        out = block(x)
    with torch.no_grad():
        assert torch.equal(block(x), out)
        assert torch.equal(x, before)
        with Recorded():  # where something looks on, nothing is overwritten
            torch.testing.assert_close(block(x), out)
        mine = copy.deepcopy(block)
        for name in ("conv1", "conv3"):
            old = getattr(mine, name)
            new = Convolution(old.in_channels, old.out_channels, 1, bias=False).to(memory_format=memory_format)
            new.load_state_dict(old.state_dict())
            setattr(mine, name, new)
        torch.testing.assert_close(mine(x), out)
        for name in ("conv1", "conv3"):
            assert (getattr(mine, name).given < 0).any()  # before the ReLU
        kept: list[Tensor] = []
        handles = [
            getattr(block, name).register_forward_hook(lambda *a: kept.append(a[2])) for name in ("conv1", "conv3")
        ]
        torch.testing.assert_close(block(x), out)
        assert all((given < 0).any() for given in kept)
        for handle in handles:
            handle.remove()
    allocated = []
    for each in (block, mine):
        with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
            each(x)
        allocated.append(sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()))
    maps = sum(4 * given.numel() for given in kept)
    assert allocated[1] - allocated[0] >= maps, (*allocated, maps)  # a map less for each norm


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
