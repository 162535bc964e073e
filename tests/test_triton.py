"""The way to the Triton kernels, and what is said where they can't run. The kernels themselves are tested with the
other backends', under the interpreter."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import vcr_ops
from tests.small import VARIANTS, assert_same, feature_map, middle, results
from vcr_ops import backend, library
from vcr_ops.backend import Case, resolve
from vcr_ops.ops import dispatch
from vcr_ops.ops.vcr_middle import op as vcr_middle
from vcr_ops.triton_common.sizes import sizes_of


def why_not(case: Case, monkeypatch: pytest.MonkeyPatch, **gpu: Any) -> str:
    """What is said on a machine that has Triton, and a GPU as described."""
    monkeypatch.setattr(backend, "_checked", {})
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: gpu.get("triton", True) or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu.get("available", True))
    monkeypatch.setattr(torch.version, "cuda", gpu.get("cuda"))
    monkeypatch.setattr(torch.version, "hip", gpu.get("hip"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: gpu["capability"])
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda number: SimpleNamespace(gcnArchName=gpu["gcn"] + ":sramecc+")
    )
    return backend.BACKENDS["triton"].why_not(case) or ""


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Case("cuda", number=1)
    assert "pip install 'triton>=3.6'" in why_not(cuda, monkeypatch, triton=False)
    assert "nvidia-smi" in why_not(cuda, monkeypatch, available=False, cuda="13.0")
    assert "built without CUDA or ROCm; install one" in why_not(cuda, monkeypatch, available=False)
    assert "cuda:1 is sm_75; use backend='composite'" in why_not(cuda, monkeypatch, capability=(7, 5))
    assert "is gfx1100; use backend='composite'" in why_not(cuda, monkeypatch, hip="7.0", gcn="gfx1100")
    for able in ({"capability": (8, 0)}, {"capability": (10, 0)}, {"hip": "7.0", "gcn": "gfx942"}):
        assert why_not(cuda, monkeypatch, **able) == ""
    assert "these are on 'cpu'; use backend='cpp'" in why_not(Case("cpu"), monkeypatch)
    assert "these are on 'mps'; use backend='composite'" in why_not(Case("mps"), monkeypatch)
    assert "torch.func can't look into the Triton" in why_not(Case("cuda", "torch.func"), monkeypatch)


def test_auto_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not(Case("cuda"), monkeypatch, triton=False)
    with pytest.raises(RuntimeError, match=r"'triton' can't run here .auto takes it for CUDA and ROCm .*pip install"):
        resolve("auto", Case("cuda"))
    monkeypatch.setattr(library, "_loaded", False)
    monkeypatch.setattr(library, "PATH", library.PATH.with_name("nowhere.so"))
    with pytest.raises(RuntimeError, match=r"aren't built .* build it with"):
        resolve("auto", Case("cuda"))


def test_a_map_in_the_wrong_place() -> None:
    with pytest.raises(RuntimeError, match="its kernels are for CUDA and ROCm tensors, and these are on 'cpu'"):
        middle("triton")(feature_map(2, 12, 3, 3))


def test_importing_needs_no_triton() -> None:
    """Nor does a step on the CPU. (torch.utils.flop_counter imports Triton where it is installed.)"""
    code = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch, vcr_ops
vcr_ops.VisualConceptReasoning(8, 2)(torch.randn(2, 8, 3, 3)).sum().backward()
print([name for name in sys.modules if name.startswith("vcr_ops") and "triton" in name])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert out.stdout == "[]\n"


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_fake_tensors_need_no_gpu(dtype: torch.dtype, channels_last: bool) -> None:
    # No gradients here: autograd itself needs a build with CUDA, and aborts without one.
    m = vcr_ops.VisualConceptReasoning(12, 3)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        m.to_empty(device="cuda")
        y = torch.empty(2, 12, 4, 5, device="cuda", dtype=dtype)
        if channels_last:
            y = y.to(memory_format=torch.channels_last)
        for training in (True, False):
            out = m.train(training)(y)  # "auto"
            assert (out.shape, out.dtype, out.device.type) == (y.shape, dtype, "cuda")
            assert out.stride() == y.stride()


class StandIn:
    """Puts C++ kernels in the place of Triton's, on CPU tensors, and notes each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setitem(backend.BACKENDS, "triton", backend.Backend("triton", ("cpu",), "", lambda case: None))
        for name in library.OPS:
            op = getattr(torch.ops.vcr_ops, name).default
            monkeypatch.setitem(dispatch._functions, (op, "triton"), self.function(name, op))

    def function(self, name: str, op: Any) -> Any:
        def run(*args: Any) -> Any:
            self.calls.append(name)
            return op(*args)

        return run


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_modules_take_the_named_backend_both_ways(variant: str, stand_in: StandIn) -> None:
    y = feature_map(4, 12, 4, 5)
    m = middle("triton", **VARIANTS[variant])
    found = results(m, y)
    assert stand_in.calls == ["vcr_middle", "vcr_middle_backward"]
    assert_same(found, results(middle("cpp", **VARIANTS[variant]), y))
    m.eval()
    with torch.no_grad():
        m(y)
    assert stand_in.calls[2:] == ["vcr_middle"]
    m.reasoner.register_forward_hook(lambda *_: None)
    results(m.train(), y)
    assert stand_in.calls[3:] == [
        *("concept_sample", "concept_reason", "concept_modulate"),
        *("concept_modulate_backward", "concept_reason_backward", "concept_sample_backward"),
    ]


def test_backward_keeps_the_backend_of_its_forward(stand_in: StandIn) -> None:
    y = feature_map(4, 12, 4, 5).requires_grad_()
    with vcr_ops.use_backend("triton"):
        ours = middle("auto")(y)
    with vcr_ops.use_backend("cpp"):
        other = middle("auto")(y)
        ours.sum().backward()
    assert stand_in.calls == ["vcr_middle", "vcr_middle_backward"]
    with vcr_ops.use_backend("triton"):
        other.sum().backward()
    assert len(stand_in.calls) == 2


def test_what_looks_on_sees_the_op(stand_in: StandIn) -> None:
    m, y = middle("triton"), feature_map(4, 12, 4, 5)
    with FlopCounterMode(display=False) as counter:
        m(y)
    assert counter.get_total_flops() > 0
    assert stand_in.calls == []  # it went through the dispatcher, where the CPU's key is the C++ kernel's


def test_meta_tensors_take_the_fake_kernel(stand_in: StandIn) -> None:
    m = middle("triton").to("meta")
    assert m(torch.empty(4, 12, 4, 5, device="meta")).shape == (4, 12, 4, 5)
    assert stand_in.calls == []


def test_no_double_backward(stand_in: StandIn) -> None:
    m, y = middle("triton"), feature_map(4, 12, 4, 5).requires_grad_()
    (dy,) = torch.autograd.grad(m(y).square().sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="have no double backward; use backend='composite'"):
        torch.autograd.grad(dy.square().sum(), y)


def test_the_gpu_s_key_holds_a_chooser(stand_in: StandIn) -> None:
    """A kernel of its own for CUDA, on which the named backend is called, else the first."""
    forward = vcr_middle._forward
    assert torch._C._dispatch_has_kernel_for_dispatch_key("vcr_ops::vcr_middle", "CUDA")
    seen: list[str] = []
    dispatch._functions[forward, "first"] = lambda *args: seen.append("first")
    dispatch._functions[forward, "second"] = lambda *args: seen.append("second")
    kernel = dispatch._serve(forward, "CPU", ("first", "second"))
    try:
        kernel()
        backend._context.name = "second"
        kernel()
        backend._context.name = "third"
        kernel()
    finally:
        backend._context.name = ""
        del dispatch._functions[forward, "first"], dispatch._functions[forward, "second"]
    assert seen == ["first", "second", "first"]


@pytest.mark.triton
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_is_eager(variant: str, channels_last: bool) -> None:
    """Through the dispatcher's key, without a graph break. A compiled call goes by the context."""
    from torch._dynamo.backends.debugging import aot_eager

    torch.compiler.reset()
    m = middle("triton", **VARIANTS[variant])
    y = feature_map(3, 12, 2, 3)
    if channels_last:
        y = y.to(memory_format=torch.channels_last)
    names: list[str] = []
    from vcr_ops.triton_common.launch import hooks

    hooks.append(lambda launch: names.append(launch.name))
    try:
        with vcr_ops.use_backend("triton"):
            eager = results(m, y)
            launched = [name for name in names if name != "move_running_stats"]  # compiled, these are the compiler's
            names.clear()
            compiled = torch.compile(m, fullgraph=True, backend=aot_eager)
            assert_same(results(m, y, compiled), eager)
            assert names == launched != []
            m.eval()
            with torch.no_grad():
                assert torch.equal(compiled(y), m(y))
    finally:
        hooks.pop()


def test_too_many_positions() -> None:
    y = torch.empty((1, 8, 2**31), device="meta")
    with pytest.raises(ValueError, match="the map has 2147483648 positions; the Triton kernels take up to 2147418112"):
        sizes_of(y, (2, 4, 4))


@pytest.mark.triton
def test_the_interpreter_takes_cpu_tensors_by_name_alone() -> None:
    assert resolve("auto", Case("cpu")).name == "cpp"
    assert resolve("triton", Case("cpu")).name == "triton"
    y: Tensor = feature_map(2, 12, 2, 3).half()
    with torch.no_grad():
        assert middle("triton")(y).dtype == torch.float16


def computed_by_torch(run: Any) -> set[str]:
    """PyTorch's ops that launch a kernel on a GPU: all but those that make or view memory."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    views = {"empty", "empty_strided", "empty_like", "new_empty", "view", "detach", "narrow", "slice", "as_strided"}
    names = {event.key.removeprefix("aten::") for event in profiler.key_averages() if event.key.startswith("aten::")}
    return names - views - {"movedim", "permute", "detach_", "alias", "transpose", "select", "expand_as", "result_type"}


@pytest.mark.triton
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_module_s_training_step_makes_eight_launches(variant: str, channels_last: bool) -> None:
    """The running statistics of both norms, and their counters, take one of them; PyTorch launches nothing."""
    from vcr_ops.triton_common.record import holding

    m = middle("triton", **VARIANTS[variant])
    y = feature_map(4, 12, 4, 5, channels_last=channels_last).requires_grad_()
    leaves = [y, *m.parameters()]
    grad = feature_map(4, 12, 4, 5, channels_last=channels_last)
    with holding() as launches:
        torch.autograd.grad(m(y), leaves, grad)  # what is done once is over
        launches.clear()
        assert computed_by_torch(lambda: torch.autograd.grad(m(y), leaves, grad)) == set()
    assert [each.name for each in launches] == [
        "channel_stats",
        "concept_sample",
        "concept_reason",
        "concept_modulate",
        "move_running_stats",
        "modulate_backward_sums",
        "small_gradients",
        "middle_input_grad",
    ]


MOMENTA = [(0.1, 0.1), (0.7, None), (None, 0.0), (1.0, 0.3)]


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("momenta", MOMENTA)
@pytest.mark.parametrize("kept, dtype", [("float32", "float32"), ("float64", "float64"), ("float16", "float32")])
def test_running_statistics_move_as_pytorch_moves_them(momenta: Any, kept: str, dtype: str) -> None:
    """NaN and infinity as well; each buffer's version is counted, so that autograd sees the change."""
    from torch import nn

    from vcr_ops.modules.running_stats import update_running_stats
    from vcr_ops.triton_common.launch import hooks

    def norms() -> list[Any]:
        made: list[Any] = [nn.BatchNorm2d(1030, momentum=momenta[0]), nn.BatchNorm1d(7, momentum=momenta[1])]
        return [bn.to(getattr(torch, kept)) for bn in made]

    ours, plain = norms(), norms()
    generator = torch.Generator().manual_seed(0)
    names: list[str] = []
    hooks.append(lambda launch: names.append(launch.name))
    try:
        for _ in range(3):
            batch = [torch.rand(2, n, generator=generator, dtype=torch.float64) for n in (1030, 7)]
            batch[0][0, 3], batch[1][1, 5], batch[1][0, 2] = float("nan"), float("inf"), -float("inf")
            found = [x.to(getattr(torch, dtype)).unbind() for x in batch]
            before = [x._version for bn in ours for x in bn.buffers()]
            update_running_stats([(bn, *x) for bn, x in zip(ours, found, strict=True)], False, triton=True)
            assert all(x._version > v for x, v in zip((x for bn in ours for x in bn.buffers()), before, strict=True))
            update_running_stats([(bn, *x) for bn, x in zip(plain, found, strict=True)], False)
    finally:
        hooks.pop()
    assert names == ["move_running_stats"] * 3
    for bn, other in zip(ours, plain, strict=True):
        for mine, theirs in zip(bn.buffers(), other.buffers(), strict=True):
            rounding = torch.finfo(mine.dtype).eps if mine.is_floating_point() else 0.0
            torch.testing.assert_close(mine, theirs, rtol=2 * rounding, atol=rounding, equal_nan=True)


@pytest.mark.triton
def test_running_statistics_that_no_kernel_can_write() -> None:
    """Strided buffers are moved all the same; nothing is moved where nothing is kept."""
    from torch import nn

    from vcr_ops.modules.running_stats import update_running_stats
    from vcr_ops.triton_common.launch import hooks

    bn: Any = nn.BatchNorm1d(3)
    bn.running_mean = torch.zeros(3, 2)[:, 0]
    names: list[str] = []
    hooks.append(lambda launch: names.append(launch.name))
    try:
        batch = torch.ones(3), torch.ones(3)
        update_running_stats([(bn, *batch)], False, triton=True)
        torch.testing.assert_close(bn.running_mean, torch.full((3,), 0.1))
        assert int(bn.num_batches_tracked) == 1
        update_running_stats([(nn.BatchNorm1d(3, track_running_stats=False), *batch)], False, triton=True)
        update_running_stats([(nn.BatchNorm1d(3).eval(), *batch)], False, triton=True)
        assert names == []
        bn.running_mean = None
        update_running_stats([(bn, *batch)], False, triton=True)
        assert names == ["move_running_stats"]
        assert int(bn.num_batches_tracked) == 2
    finally:
        hooks.pop()
