"""The backends that tests run on. Triton's kernels run under its interpreter (interpreter.py), the CUDA C++ ones on the
host (cuda_on_host.py)."""

import pytest

TRITON = pytest.param("triton", marks=pytest.mark.triton)
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
KERNELS = ["cpp", TRITON, CUDA]
BACKENDS = [*KERNELS, "composite"]


def with_backends(cpp, triton, composite=(), cuda=None):
    """Parametrize ``case, backend`` with each backend's own cases; CUDA's are the C++ ones."""
    params = [pytest.param(case, "cpp", id=f"{case.id}-cpp") for case in cpp]
    params += [pytest.param(case, "triton", id=f"{case.id}-triton", marks=pytest.mark.triton) for case in triton]
    cuda = cpp if cuda is None else cuda
    params += [pytest.param(case, "cuda", id=f"{case.id}-cuda", marks=pytest.mark.cuda) for case in cuda]
    params += [pytest.param(case, "composite", id=f"{case.id}-composite") for case in composite]
    return pytest.mark.parametrize("case, backend", params)


def on_triton(*values):
    """Further parameters beside those of the other backends: the same with "triton" as the last one."""
    return pytest.param(*values, "triton", marks=pytest.mark.triton)
