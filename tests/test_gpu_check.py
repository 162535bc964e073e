"""scripts/gpu_check.sh says what it would run, refuses wrong usage and rehearses without a GPU; so do the GPU tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("build", "warm", "tests", "large", "memcheck", "racecheck", "passes", "faster", "bench")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts/gpu_check.sh"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        timeout=300,
    )


def test_dry_run_prints_every_part_and_runs_none(tmp_path):
    done = check("--dry-run", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(PARTS)
    assert sum(int(line.split()[3]) for line in lines) < 8 * 60
    assert not (tmp_path / "out").exists()


def test_a_quick_look_takes_four_minutes(tmp_path):
    lines = check("--dry-run", "--quick", str(tmp_path)).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(PARTS)
    assert 180 < sum(int(line.split()[3]) for line in lines) <= 240
    left_out = [line.split()[0] for line in lines if "left out: it has no time; --limit" in line]
    assert left_out == ["large", "racecheck"]
    for line in lines:  # what is begun ends in time
        for seconds in re.findall(r"(?:--seconds|SECONDS=)\\?[ =]?(\d+)", line):
            assert 0 < int(seconds) < int(line.split()[3]) or line.split()[0] in left_out, line
    # a limit that is given counts
    own = ("--limit", "racecheck=25", "--limit", "passes=90")
    done = check("--dry-run", "--only", "large", "racecheck", "passes", *own, "--quick", str(tmp_path))
    assert [int(line.split()[3]) for line in done.stdout.splitlines()] == [0, 25, 90]
    assert done.stdout.count("it has no time") == 1


def test_the_benchmark_begins_with_what_is_compiled(tmp_path):
    (line,) = check("--dry-run", "--only", "bench", str(tmp_path)).stdout.splitlines()
    assert "--compiled-first 36 --seconds 60 " in line
    assert "--compiled-first" not in check("--dry-run", "--only", "bench", "--quick", str(tmp_path)).stdout


def test_the_benchmark_has_the_time_that_others_leave(tmp_path):
    """A Python that does nothing: all of the time before is left over."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    options = ("--rehearse", "--only", "memcheck", "passes", "bench")
    for more, limits in (((), (30, 60, 175)), (("--limit", "bench=100"), (30, 60, 100))):
        done = check(*options, *more, str(tmp_path / "out"), PYTHON=str(python), VCR_OPS_GPU_REHEARSAL="cpp")
        assert done.returncode == 0, done.stdout
        found = [int(seconds) for seconds in re.findall(r"=== .* \(at most (\d+) s\)", done.stdout)]
        assert found[:2] == list(limits[:2])
        assert limits[2] - 10 <= found[2] <= limits[2]
        (seconds,) = re.findall(r"--seconds (\d+)", (tmp_path / "out/bench.log").read_text())
        assert int(seconds) == found[2] - 25


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--build", "--sanitizer"], ["build", "memcheck", "racecheck"]),
        (["--bench"], ["warm", "passes", "faster", "bench"]),
        (["--only", "large", "tests"], ["tests", "large"]),
    ],
)
def test_parts_can_be_chosen(arguments, parts, tmp_path):
    done = check("--dry-run", *arguments, str(tmp_path))
    assert [line.split()[0] for line in done.stdout.splitlines()] == parts


def test_one_backend_alone(tmp_path):
    lines = check("--dry-run", "--backend", "cuda", str(tmp_path)).stdout.splitlines()
    said = {line.split()[0]: line for line in lines}
    assert "VCR_OPS_CUDA=1" in said["build"]
    assert "left out: Triton isn't asked for" in said["warm"]
    assert "--backend\\ cuda" in said["passes"]
    assert "triton" not in said["passes"]
    assert "left out: one backend alone" in said["faster"]
    assert said["bench"].count("--backend cuda") == 1
    assert "VCR_OPS_CUDA=0" in check("--dry-run", "--backend", "triton", "--build", str(tmp_path)).stdout


def test_limits_can_be_set(tmp_path):
    done = check("--dry-run", "--only", "passes", "bench", "--limit", "bench=600", str(tmp_path))
    assert [int(line.split()[3]) for line in done.stdout.splitlines()] == [60, 600]
    assert "--seconds 575" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--fast", "out"],
        ["--only", "everything"],
        ["one", "two"],
        ["--backend", "cpp", "out"],
        ["--limit", "everything=3", "out"],
        ["--limit", "bench", "out"],
    ],
)
def test_wrong_usage(arguments):
    done = check("--dry-run", *arguments)
    assert done.returncode == 2
    assert done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_run(tmp_path):
    done = check(str(tmp_path))
    assert done.returncode == 2
    assert "--rehearse and --dry-run need none" in done.stderr


def test_a_part_that_fails_is_told_and_the_next_one_runs(tmp_path):
    environment = {"VCR_OPS_GPU_REHEARSAL": "none"}  # no such backend: every test fails
    arguments = ("--rehearse", "--backend", "triton", "--only", "memcheck", "passes", str(tmp_path))
    done = check(*arguments, **environment)
    assert done.returncode == 1
    table = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in table[2:4]] == [["memcheck", "FAILED"], ["passes", "passed"]]
    assert "takes one of 'auto'" in (tmp_path / "memcheck.log").read_text()
    assert (tmp_path / "passes-triton.json").is_file()
    assert "training step of the middle: at most" in done.stdout


def test_the_table_of_the_faster_backend_is_copied(tmp_path):
    done = check("--rehearse", "--only", "faster", str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "faster_table.json").read_text() == (ROOT / "vcr_ops/faster.json").read_text()
    assert json.loads((tmp_path / "faster.json").read_text())["kind"] == "gpu-faster"


def rehearse(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "VCR_OPS_GPU_REHEARSAL": "composite", **environment},
        timeout=300,
    )


def test_gpu_tests_pass_in_a_rehearsal():
    """Not all of them: parity, gradients and layouts are the CPU's own tests over again."""
    done = rehearse(
        "tests/gpu/test_graphs.py", "tests/gpu/test_large.py", "tests/gpu/test_modules.py", "-k", "not compiled"
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_gpu_tests_are_skipped_when_the_time_is_over():
    done = rehearse("tests/gpu/test_large.py", VCR_OPS_GPU_TEST_SECONDS="0")
    assert "4 skipped" in done.stdout
    assert "out of time" in done.stdout
