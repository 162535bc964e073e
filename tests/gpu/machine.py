"""What the GPU tests ask of the machine, and what stands in for it in a rehearsal.

``VCR_OPS_GPU_BACKENDS=NAME,...`` is what is tested: "triton", "cuda" or both (default).
``VCR_OPS_GPU_REHEARSAL=NAME,...`` runs these tests without a GPU, on CPU tensors and by those backends: "cpp",
"composite", "triton" under its interpreter, or "cuda" executed on the host (tests/cuda_on_host.py). Nothing but this
file knows of it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests import cuda_on_host
from tests.grid import Case

REHEARSED = os.environ.get("VCR_OPS_GPU_REHEARSAL", "")
BACKENDS = tuple((REHEARSED or os.environ.get("VCR_OPS_GPU_BACKENDS") or "triton,cuda").split(","))
# Triton decides when it is imported whether kernels are interpreted: such tests have a process of their own.
MARKS = [pytest.mark.gpu, *([pytest.mark.triton] if REHEARSED and "triton" in BACKENDS else [])]
DEVICE = "cpu" if REHEARSED else "cuda"
LARGE = 1 << 12 if REHEARSED else 1 << 31  # elements that no 32-bit offset reaches
DTYPES = ("f32", "bf16", "f16")


def ready(backend: str, case: Case) -> str:
    """``backend``, unless it stands in for one that can do more."""
    if REHEARSED and backend != "triton" and case.dtype == "f16":
        pytest.skip("float16 features are refused on the CPU")
    return backend


def prepare() -> None:
    """Outside pytest: what a rehearsal needs."""
    if REHEARSED and cuda_on_host.LIBRARY:
        cuda_on_host.turn_on()


def synchronize() -> None:
    if not REHEARSED:
        torch.cuda.synchronize()


def free_bytes() -> int:
    """Memory that nobody has taken."""
    return 1 << 60 if REHEARSED else torch.cuda.mem_get_info()[0]


def other_device() -> str | None:
    """A device that is not the current one."""
    if REHEARSED:
        return "cpu"
    count = torch.cuda.device_count()
    return f"cuda:{(torch.cuda.current_device() + 1) % count}" if count > 1 else None


def current_device() -> int:
    return 0 if REHEARSED else torch.cuda.current_device()


@contextmanager
def side_stream() -> Iterator[None]:
    """A stream that waits for the current one, and the current one for it."""
    if REHEARSED:
        yield
        return
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@contextmanager
def no_host_sync() -> Iterator[None]:
    """An operation that makes the host wait for the GPU raises."""
    if REHEARSED:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """(replay, outputs): ``function`` as a CUDA graph, whose outputs each replay overwrites."""
    if REHEARSED:
        outputs = function()

        def replay() -> None:
            for kept, fresh in zip(outputs, function(), strict=True):
                kept.copy_(fresh)

        return replay, outputs
    with side_stream():
        for _ in range(3):
            function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions of float32 are float32, not TF32; matrix products are so anyway."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
