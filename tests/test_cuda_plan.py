"""The reads that explain tells of the CUDA kernels are those that their launchers plan: both on the same sizes."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from vcr_ops import cuda_plan
from vcr_ops.cuda_plan import Device, Sizes

ROOT = Path(__file__).resolve().parent.parent
H100 = Device(227 << 10, 132, True, 50 << 20)
A100 = Device(163 << 10, 108, False, 40 << 20)
PAPER = [(4, 4, 56), (8, 4, 28), (16, 4, 14), (32, 8, 7)]  # p, pt, height


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """What the launchers plan for (device, sizes, exchanges, training), by their own code."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    program = tmp_path_factory.mktemp("plan") / "plan"
    folders = [f"-I{ROOT / folder}" for folder in ("csrc", "tests/kernels/cuda", "tests/kernels/cpu")]
    source = ROOT / "tests/kernels/cuda/plan.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", "-pthread", *folders, source, "-o", program], check=True)

    def plan(cases):
        lines = [
            " ".join(str(int(x)) for x in (*device, *size, exchanges, training))
            for device, size, exchanges, training in cases
        ]
        done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
        return [tuple(word == "1" for word in line.split()) for line in done.stdout.splitlines()]

    return plan


def cases():
    """The paper's stages on two GPUs and the least, then sizes around every limit."""
    for device in (H100, A100, Device(), H100._replace(l2=0)):
        for p, pt, height in PAPER:
            for N in (1, 3, 16):
                for bytes_, last, exchanges, training in ((2, 0, 1, 0), (4, 1, 1, 1), (8, 0, 0, 1), (2, 1, 0, 0)):
                    yield device, Sizes(N, 32, p, pt, height**2, bytes_, bool(last)), bool(exchanges), bool(training)
    draw = random.Random(0)
    for _ in range(4000):
        shared = draw.choice([48, 64, 99, 163, 227]) << 10
        device = Device(shared, draw.choice([1, 16, 108]), draw.random() < 0.5, draw.choice([0, 1 << 24]))
        p, C = draw.choice([1, 3, 4, 7, 16, 33, 200]), draw.choice([1, 2, 5, 32])
        S = draw.choice([1, 7, 49, 100, 784, 3137, 12544, (1 << 24) - 1, 1 << 24])
        last = draw.random() < 0.5 and C * p > 1  # of one channel all maps are contiguous
        size = Sizes(draw.choice([1, 2, 64]), C, p, draw.choice([1, 4, p]), S, draw.choice([2, 4, 8]), last)
        yield device, size, draw.random() < 0.5, draw.random() < 0.5


def test_the_arithmetic_is_that_of_the_launchers(planned) -> None:
    given = list(cases())
    found = planned(given)
    assert len(found) == len(given)
    seen = set()
    for (device, size, exchanges, training), (evaluates, resident) in zip(given, found, strict=True):
        where = f"{device}, {size}, {exchanges}, {training}"
        assert cuda_plan.samples_at_once(device, size, training) == resident, where
        if not training:
            assert cuda_plan.evaluates_at_once(device, size, "dynamic" if exchanges else "none") == evaluates, where
        seen.add((evaluates, resident, training))
    assert len(seen) == 6, "every answer"


def test_what_fits_the_least_gpu_fits_all() -> None:
    """explain goes by that one where it doesn't know the GPU."""
    for _, size, exchanges, training in cases():
        edges = "dynamic" if exchanges else "none"
        for device in (H100, A100):
            for plan in (cuda_plan.evaluates_at_once, cuda_plan.samples_at_once):
                argument = edges if plan is cuda_plan.evaluates_at_once else training
                assert plan(device, size, argument) or not plan(Device(), size, argument), f"{size}, {edges}"
