"""The CUDA library without a GPU: what it needs of the machine it loads on, that it loads beside a PyTorch with CUDA or
without, and what its backend and its build say where it can't run. CI runs this under a PyTorch with CUDA, too."""

import ctypes
import re
import shutil
import subprocess
import sys

import pytest
import torch

import vcr_ops
from tests.small import feature_map, middle
from vcr_ops import _C, backend, library
from vcr_ops.backend import Case, resolve

pytestmark = pytest.mark.abi

ARCHS = library.cuda_archs()
WITH_CUDA = torch.backends.cuda.is_built() and not torch.version.hip
built = pytest.mark.skipif(not library.CUDA_PATH.is_file(), reason="built without nvcc")
# Beside a PyTorch with CUDA, vcr_ops has loaded it, and keeps what it has registered.
ROUND = """
import torch, vcr_ops
from vcr_ops import library
from vcr_ops.ops import dispatch
ops = [getattr(torch.ops.vcr_ops, name).default for name in library.OPS]
if not library.has_cuda():
    torch.ops.load_library(str(library.CUDA_PATH))
    for op in ops:
        dispatch._keep_library_s(op, "CUDA", "cuda")
for op in ops:
    assert "binding_cuda" in str(dispatch._functions[op, "cuda"].func.__self__), op
z = torch.zeros(2, 12, 3, 3)
zeros = torch.zeros(3, 4)
modulate = dispatch._functions[torch.ops.vcr_ops.concept_modulate.default, "cuda"]
try:
    modulate(z, z[:, :3, 0], None, None, zeros, zeros, None)
except ValueError as error:
    print(error)
"""


def undefined(file) -> set[str]:
    text = subprocess.run(["nm", "-D", "--undefined-only", file], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in text.splitlines()}


def test_build_info_tells_whether_it_was_built() -> None:
    assert bool(ARCHS) == library.CUDA_PATH.is_file()
    assert all(re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch) for arch in ARCHS)
    assert _C.build_info()["cuda_archs"] == ARCHS
    report = subprocess.run([sys.executable, "-m", "vcr_ops"], check=True, capture_output=True, text=True).stdout
    assert f"CUDA: {', '.join(ARCHS) or 'none'}" in report
    assert re.search(r"^cuda on cpu +its kernels are for CUDA tensors, and these are on 'cpu'; use", report, re.M)


@built
@pytest.mark.skipif(not shutil.which("nm"), reason="reads ELF with binutils")
def test_it_needs_torch_s_stable_abi_and_nothing_of_cuda() -> None:
    names = undefined(library.CUDA_PATH)
    from_torch = {name for name in names if "torch" in name or "c10" in name}
    assert {name for name in from_torch if not re.fullmatch(r"(aoti_)?torch_\w+", name)} == set()
    # Only libtorch_cuda has these, and the library must load without it.
    assert from_torch & {"torch_c10_cuda_check_msg", "aoti_torch_get_current_cuda_stream"} == set()
    assert {name for name in names if re.match(r"cuda|cu[A-Z]|_?Py", name)} == set()


@built
def test_it_loads_here_and_refuses_other_tensors() -> None:
    """In a process of its own: PyTorch without CUDA would keep it for the rest of this one."""
    done = subprocess.run([sys.executable, "-c", ROUND], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "vcr_ops: the CUDA kernels take CUDA tensors\n"), done.stderr


@built
@pytest.mark.skipif(not WITH_CUDA, reason="this PyTorch has no CUDA")
def test_it_finds_the_stream_of_a_pytorch_with_cuda() -> None:
    assert library.has_cuda()
    assert ctypes.CDLL("libtorch_cuda.so").aoti_torch_get_current_cuda_stream


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_named_where_it_cannot_run() -> None:
    y = feature_map(2, 12, 3, 3)
    with pytest.raises(RuntimeError, match=r"'cuda' can't run here .*on 'cpu'; use backend='cpp'"):
        middle("cuda")(y)
    if not WITH_CUDA:
        with pytest.raises(RuntimeError, match=r"'cuda' can't run here .* is built without CUDA; install one that has"):
            resolve("cuda", Case("cuda"))
    with pytest.raises(RuntimeError, match=r"torch.func can't look into the CUDA kernels; use backend='composite'"):
        resolve("cuda", Case("cuda", "torch.func"))
    explained = vcr_ops.explain(middle("cuda"), y)
    assert (explained.backend, explained.reason) == ("cuda", "the keyword backend names it")
    assert "its kernels are for CUDA tensors" in (explained.why_not or "")


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "CUDA_PATH", library.CUDA_PATH.with_name("nowhere.so"))
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for name in ("_cuda_loaded", "_cuda_problem"):
        monkeypatch.setattr(library, name, getattr(library, name))
    monkeypatch.setattr(library, "_cuda_loaded", False)
    library._load_cuda()
    assert re.search(
        r"nowhere.so is missing\); install nvcc and build with `VCR_OPS_CUDA=1 pip", library.cuda_why_not() or ""
    )


@pytest.mark.cuda
def test_too_wide_a_concept_is_refused() -> None:
    """In words, before anything is launched, in both directions; and what the words advise helps."""
    said = r"more channels than the shared memory of cuda:0 has room for; take more concepts, or backend='triton' or"
    z, state = feature_map(1, 12000, 1, 1), torch.ones(1, 1, 1)
    ones = torch.ones(1, 12000)

    def modulate(z: torch.Tensor, concepts: int, backend: str) -> torch.Tensor:
        of_each = ones.view(concepts, -1)
        return vcr_ops.concept_modulate(z, state.expand(1, concepts, 1), of_each, of_each, backend=backend)

    with pytest.raises(RuntimeError, match=said):
        modulate(z, 1, "cuda")
    with pytest.raises(RuntimeError, match=said):
        vcr_ops.concept_sample(z, torch.ones(1, 12000, 1), sampler="pool", backend="cuda")
    for concepts, helps in ((1, "composite"), (6, "cuda")):
        assert torch.equal(modulate(z, concepts, helps), torch.relu(z + 1))
    # the gradient takes more room
    z = feature_map(1, 5000, 1, 1).requires_grad_()
    ones = torch.ones(1, 5000)
    out = modulate(z, 1, "cuda")
    with pytest.raises(RuntimeError, match=said):
        out.sum().backward()


def test_on_meta_and_fake_tensors_it_needs_no_gpu() -> None:
    m = middle("cuda").to("meta")
    out = m(torch.empty(2, 12, 3, 3, device="meta", requires_grad=True))
    out.sum().backward()
    assert out.shape == (2, 12, 3, 3)
    assert backend.resolve("cuda", Case("cuda", fake=True)).name == "cuda"
