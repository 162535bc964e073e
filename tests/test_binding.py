"""Proves: a call leaves no memory behind, and what the hot path takes instead of other calls does as they do."""

import itertools
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad

import vcr_ops
from vcr_ops import VisualConceptReasoning, backend, use_backend
from vcr_ops.ops.running_stats.op import move_running_stats

from .ops import adapters
from .test_registration import forward_arguments

OPS = torch.ops.vcr_ops
assert vcr_ops.library.has_library()


def resident() -> int:
    """Bytes of memory that the process has in use."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_calls_leave_no_memory():
    """Also of what the dispatcher hands over for us to free: names, and optional tensors."""
    h, edge, saved = torch.randn(1, 2, 2), torch.randn(2, 2), None

    def call(times: int) -> None:
        nonlocal saved
        for _ in range(times):
            state, _, _, saved = OPS.concept_reason(h, edge, None, None, None, None, 1e-5, "dynamic", True)
            OPS.concept_reason_backward(state, h, edge, None, None, saved, "dynamic", True)

    call(3000)
    before = resident()
    call(30000)
    assert resident() - before < 1 << 20  # 32 bytes a call would be nearly two million


def given(case):
    return case.norm != "batch" and case.state == "given"


def infer_arguments(case, inputs):
    return forward_arguments(case, inputs, False)[:-1]


def inference_cases(layout="contiguous", dtype="f32"):
    adapter = adapters()["vcr_middle"]
    return [case for case in adapter.variants(dtype=dtype, size="N2C4p3S7", layout=layout) if given(case)]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced_channels"])
def test_inference_is_the_middle_s_map(layout, dtype):
    adapter = adapters()["vcr_middle"]
    cases = inference_cases(layout, dtype)
    assert len(cases) > 2
    for i, case in enumerate(cases):
        inputs = {name: x.detach() for name, x in adapter.leaves(adapter.draw(case)[0], case).items()}
        arguments = infer_arguments(case, inputs)
        out = OPS.vcr_middle_infer.default(*arguments)
        expected = OPS.vcr_middle.default(*arguments, False)[0]
        assert out.equal(expected), case
        assert out.stride() == expected.stride()
        if i < 3:
            torch.library.opcheck(
                OPS.vcr_middle_infer.default, arguments, test_utils=("test_schema", "test_faketensor")
            )


def test_inference_says_what_it_can_t_do():
    case = inference_cases()[0]
    adapter = adapters()["vcr_middle"]
    leaves = adapter.leaves(adapter.draw(case)[0], case)
    arguments = infer_arguments(case, leaves)
    torch.library.opcheck(OPS.vcr_middle_infer.default, arguments, test_utils="test_autograd_registration")
    with pytest.raises(NotImplementedError, match="vcr_middle_infer is for inference"):
        OPS.vcr_middle_infer(*arguments).sum().backward()
    for place, without in ((18, "batch"), (10, None)):
        wrong = list(arguments)
        wrong[place] = without
        with torch.no_grad(), pytest.raises(ValueError, match="inference takes given statistics"):
            OPS.vcr_middle_infer(*wrong)
    mixed = [x.to("meta") if i == 5 else x for i, x in enumerate(arguments)]
    with torch.no_grad(), pytest.raises(ValueError, match=r"^vcr_middle_infer takes tensors on one device"):
        OPS.vcr_middle_infer(*mixed)


def test_short_cut_takes_what_resolve_takes(monkeypatch: pytest.MonkeyPatch):
    """Keyword, context, environment and device; and nothing else that looks on."""
    y = torch.randn(2, 8, 2, 2)
    names = (None, "auto", "cpp", "composite")
    for keyword, context, environment in itertools.product(names, names[1:], ("", *names[1:])):
        monkeypatch.setattr(backend, "ENVIRONMENT", environment)
        for inside in (use_backend(context), mock.MagicMock()):
            with inside:
                expected = backend.resolve(keyword, backend.case_of(y)).name == "cpp"
                assert backend.takes_cpp(keyword, y) == expected, (keyword, context, environment)
    monkeypatch.setattr(backend, "ENVIRONMENT", "")
    assert backend.takes_cpp(None, y)
    with forward_ad.dual_level():
        assert not backend.takes_cpp(None, y)
    seen = []
    torch.func.vmap(lambda x: (seen.append(backend.takes_cpp(None, y)), x)[1])(y)
    with torch._subclasses.FakeTensorMode() as mode:
        seen.append(backend.takes_cpp(None, mode.from_tensor(y)))
    assert seen == [False, False]
    assert not backend.takes_cpp(None, y.to("meta"))


def test_hot_path_takes_the_op_for_inference():
    """In evaluation alone, and where statistics are running ones."""
    m = VisualConceptReasoning(8, 4).eval()
    y = torch.randn(2, 8, 3, 3)
    called = []

    def count(name, op):
        return lambda *arguments: (called.append(name), op(*arguments))[1]

    from vcr_ops.ops.vcr_middle import op

    with mock.patch.multiple(op, _infer=count("infer", op._infer), _forward=count("forward", op._forward)):
        with torch.no_grad():
            m(y)
        m(y)
        with torch.no_grad():
            m.train()(y)
    assert called == ["infer", "forward", "forward"]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_wrong_types_are_told_on_the_hot_path(training):
    """What the C++ op refuses comes in the words of the checks."""
    m = VisualConceptReasoning(8, 4).train(training)
    y = torch.randn(2, 8, 3, 3)
    with torch.set_grad_enabled(training):
        for name in ("value", "query", "scale_bias"):
            module = m.modulator if name == "scale_bias" else m.sampler
            kept = getattr(module, name)
            setattr(module, name, torch.nn.Parameter(kept.detach().double()))
            with pytest.raises(TypeError, match=f"^{name} is float64; beside float32 y it takes float32$"):
                m(y)
            setattr(module, name, kept)
        m(y)
        if training:
            return
        for kind in (torch.int32, torch.float16):
            m.bn.running_mean = torch.zeros(8, dtype=kind)
            with pytest.raises(TypeError, match=r"^norm_mean is "):
                m(y)
        m.bn.running_mean = torch.zeros(8, dtype=torch.float64)
        assert m(y).dtype is torch.float32


def norms_to_move(dtype, channels=(5, 3)):
    """Whole numbers, so that no order of operations rounds."""
    norms = []
    for i, size in enumerate(channels):
        norms.append(torch.tensor(7 + i))
        norms += [torch.randint(-8, 8, (size,)).to(dtype) for _ in range(4)]
    return norms


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2])
def test_running_statistics_move_as_torch_moves_them(count, dtype, momentum):
    norms = norms_to_move(dtype)[: 5 * count]
    expected = [x.clone() for x in norms]
    for begin in range(0, 5 * count, 5):
        counter, mean, var, batch_mean, batch_var = expected[begin : begin + 5]
        counter.add_(1)
        mean.lerp_(batch_mean, momentum)
        var.lerp_(batch_var, momentum)
    versions = [x._version for x in norms]
    assert move_running_stats(norms, momentum)
    for x, wanted in zip(norms, expected, strict=True):
        assert x.equal(wanted)
    moved = [x._version - version for x, version in zip(norms, versions, strict=True)]
    assert moved == [1, 1, 1, 0, 0] * count


def test_running_statistics_that_the_op_can_t_move():
    """It says so, and none has moved."""
    arguments = [*norms_to_move(torch.float32), 0.25]
    torch.library.opcheck(OPS.move_running_stats.default, arguments, test_utils=("test_schema", "test_faketensor"))
    for place, other in (
        (0, torch.tensor(1.0)),
        (1, torch.zeros(5, dtype=torch.float64)),
        (2, torch.zeros(10)[::2]),
        (3, torch.zeros(4)),
        (6, None),
        (9, torch.zeros(3, dtype=torch.bfloat16)),
    ):
        norms = norms_to_move(torch.float32)
        norms[place] = other
        before = [None if x is None else x.clone() for x in norms]
        moved = OPS.move_running_stats(*norms, 0.25)
        if place == 6:  # one norm alone
            assert moved
            continue
        assert not moved
        assert all(x is other or x.equal(y) for x, y in zip(norms, before, strict=True))


@pytest.mark.parametrize("change", ["nothing", "momenta", "cumulative", "strided", "float64", "inference"])
def test_modules_move_what_the_op_can_t(change):
    """Beside nn.BatchNorm: the counters and statistics of two batches; the op moves them in the plain case alone."""
    m, y = VisualConceptReasoning(8, 4), torch.randn(3, 8, 3, 3)
    plain = torch.nn.BatchNorm2d(8)
    for bn in (m.bn, plain):
        if change in ("momenta", "cumulative"):
            bn.momentum = 0.5 if change == "momenta" else None
        elif change == "strided":
            bn.running_var = torch.ones(16)[::2]
        elif change == "float64":
            bn.running_mean = bn.running_mean.double()
    from vcr_ops.modules import running_stats

    counts = []
    count = mock.Mock(side_effect=lambda *a: counts.append(move_running_stats(*a)) or counts[-1])
    with mock.patch.object(running_stats, "move_running_stats", count):
        for scale in (1.0, 3.0):
            with torch.inference_mode(change == "inference"):
                m(scale * y)
            if change != "float64":
                plain(scale * y)
            else:
                batch = scale * y.double().mean((0, 2, 3))
                plain.running_mean.lerp_(batch, plain.momentum)
                plain.num_batches_tracked.add_(1)
    assert any(counts) == (change == "nothing")
    assert m.bn.num_batches_tracked.item() == plain.num_batches_tracked.item() == 2
    torch.testing.assert_close(m.bn.running_mean, plain.running_mean)
    if change != "float64":
        torch.testing.assert_close(m.bn.running_var, plain.running_var)
