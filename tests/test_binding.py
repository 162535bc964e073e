"""Proves: a call of an op leaves no memory behind, and the op for inference is the whole middle's."""

import itertools
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad

import vcr_ops
from vcr_ops import VisualConceptReasoning, backend, use_backend

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
