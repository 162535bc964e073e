"""Keyword, context and environment name a backend; one that is named and can't run raises; auto hides nothing."""

import subprocess
import sys
import threading

import pytest
import torch

import vcr_ops
from tests.small import feature_map, middle
from vcr_ops import backend, library
from vcr_ops.backend import Case, choose, resolve

CPU = Case("cpu")


def test_auto_takes_the_device_s_own() -> None:
    assert resolve("auto", CPU).name == resolve(None, CPU).name == "cpp"
    assert choose("auto", Case("cuda"))[0].name == "triton"
    for device in ("mps", "xpu", "meta"):
        assert resolve("auto", Case(device)).name == "composite"
    for tracing in ("torch.func", "ONNX export"):
        for device in ("cpu", "cuda"):
            assert resolve("auto", Case(device, tracing)).name == "composite"


def test_keyword_over_context_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "ENVIRONMENT", "composite")
    assert choose("auto", CPU)[1] == "the environment variable VCR_OPS_BACKEND names it"
    with vcr_ops.use_backend("cpp"):
        chosen, reason = choose("auto", CPU)
        assert (chosen.name, reason) == ("cpp", "use_backend names it")
        chosen, reason = choose("composite", CPU)
        assert (chosen.name, reason) == ("composite", "the keyword backend names it")
        with vcr_ops.use_backend("auto"):
            assert choose(None, CPU)[0].name == "cpp"
    assert resolve("auto", CPU).name == "composite"


def test_context_nests_and_ends_with_an_error() -> None:
    context = vcr_ops.use_backend("composite")
    with pytest.raises(ZeroDivisionError), context, context:  # noqa: PT012
        assert resolve("auto", CPU).name == "composite"
        raise ZeroDivisionError
    assert resolve("auto", CPU).name == "cpp"

    @vcr_ops.use_backend("composite")
    def decorated() -> str:
        return resolve("auto", CPU).name

    assert decorated() == "composite"


def test_context_is_of_its_thread() -> None:
    seen = []
    with vcr_ops.use_backend("composite"):
        thread = threading.Thread(target=lambda: seen.append(resolve("auto", CPU).name))
        thread.start()
        thread.join()
    assert seen == ["cpp"]


def test_context_reaches_modules_and_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", False)
    monkeypatch.setattr(library, "PATH", library.PATH.with_name("nowhere.so"))
    y, m = feature_map(2, 12, 3, 3), middle("auto")
    with vcr_ops.use_backend("composite"):
        m(y)
        vcr_ops.concept_sample(y, m.sampler.value, sampler="pool")
    for run in (lambda: m(y), lambda: vcr_ops.concept_sample(y, m.sampler.value, sampler="pool")):
        with pytest.raises(
            RuntimeError, match=r"backend 'cpp' can't run here .* aren't built .* is missing\); build it with"
        ):
            run()


def test_named_backend_that_cannot_run_raises() -> None:
    with pytest.raises(
        RuntimeError, match=r"'cpp' can't run here .the keyword backend names it.: .* 'cuda'; use backend="
    ):
        resolve("cpp", Case("cuda"))
    with pytest.raises(RuntimeError, match=r"torch.func can't look into the C.. ops; use backend='composite'"):
        resolve("cpp", Case("cpu", "torch.func"))


def test_library_that_does_not_load(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_ops.so"  # type: ignore[operator]
    broken.write_text("no library")
    monkeypatch.setattr(library, "_loaded", False)
    monkeypatch.setattr(library, "PATH", broken)
    with pytest.raises(
        RuntimeError, match=f"doesn't load under torch {torch.__version__.split('+')[0]}.* build it with"
    ):
        resolve("auto", CPU)


@pytest.mark.parametrize("name", ["CPP", "metal", "", 3])
def test_unknown_names(name: object) -> None:
    message = (
        "backend is .*; it takes one of 'auto', 'cpp', 'triton', 'cuda', 'composite'"
        if name
        else "name is ''; it takes"
    )
    with pytest.raises(ValueError, match=message):
        resolve(name, CPU) if name else vcr_ops.use_backend(name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"name is .*; it takes one of 'auto', 'cpp', 'triton', 'cuda', 'composite'"):
        vcr_ops.use_backend(name)  # type: ignore[arg-type]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=100
    )


def test_environment_variables() -> None:
    code = "import vcr_ops; from vcr_ops.backend import *; print(resolve('auto', Case('cpu')).name)"
    assert run_python(code, VCR_OPS_BACKEND="composite").stdout == "composite\n"
    unknown = run_python(code, VCR_OPS_BACKEND="fast")
    assert "ValueError: the environment variable VCR_OPS_BACKEND is 'fast'; it takes one of 'auto'" in unknown.stderr
    forced = run_python("import vcr_ops; print(vcr_ops.library.active_isa())", VCR_OPS_ISA="baseline")
    if library.isa_levels()[0] == "baseline":
        assert forced.stdout == "baseline\n"
    unknown = run_python("import vcr_ops", VCR_OPS_ISA="mmx")
    assert "RuntimeError: VCR_OPS_ISA is 'mmx'; " in unknown.stderr


def test_names_are_those_of_the_cpp_side() -> None:
    from vcr_ops import variants

    _C = pytest.importorskip("vcr_ops._C")
    names = _C.variants()
    for key, value in (("sampler", variants.SAMPLERS), ("edges", variants.EDGES), ("modulation", variants.MODULATIONS)):
        assert tuple(names[key]) == value
