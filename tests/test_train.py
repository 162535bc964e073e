"""Training: resumed to the bit, the same in two processes, on the reference's curve, and from a converted parent."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training import checkpoint
from benchmarks.training.command import main
from benchmarks.training.data import DATASETS, batch_at, load
from benchmarks.training.loop import Run, accuracy, run
from benchmarks.training.networks import build
from benchmarks.training.processes import Processes
from benchmarks.training.report import differences, save, table
from benchmarks.training.settings import SYSTEMS, Settings

ROOT = Path(__file__).resolve().parent.parent
ALONE = Processes(0, 1, torch.device("cpu"))
SMALL = Settings("vcr", "digits", steps=6, batch=8, groups=4, base_width=4)


def quiet(text: str) -> None:
    pass


def trained(settings: Settings, folder: Path) -> Run:
    return run(settings, folder, ALONE, 3, quiet)


@pytest.mark.parametrize("name", DATASETS)
def test_data(name: str) -> None:
    data = load(name)
    assert data.images.shape[1] == 3
    assert set(data.labels.tolist()) == set(data.test_labels.tolist()) == set(range(data.classes))
    sides = [
        {x.numpy().tobytes() for x in images if x.std(dim=(1, 2)).max() > 0}
        for images in (data.images, data.test_images)
    ]
    assert name == "digits" or not sides[0] & sides[1]  # two people may have written the same eight by eight pixels
    whole = batch_at(data, 3, 8, 5)
    parts = [batch_at(data, 3, 8, 5, part, 2) for part in (0, 1)]
    for i in (0, 1):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
    assert not torch.equal(whole[0], batch_at(data, 3, 8, 6)[0])


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system(system: str, tmp_path: Path) -> None:
    if system == "vcr-converted":
        trained(replace(SMALL, system="resnext"), tmp_path)
    found = trained(replace(SMALL, system=system), tmp_path)
    assert len(found.losses) == SMALL.steps
    assert all(0 < x < 20 for x in found.losses)
    assert found.peak_mb > 0
    assert system in table([found])


def test_converted_starts_where_its_parent_ends(tmp_path: Path) -> None:
    parent = trained(replace(SMALL, system="resnext", steps=12), tmp_path)
    converted = trained(replace(SMALL, system="vcr-converted", steps=12), tmp_path)
    assert converted.start == parent.accuracy
    assert parent.start != parent.accuracy


def losses_of(network: nn.Module, dtype: torch.dtype, steps: int) -> list[float]:
    data = load("digits")
    network = network.to(dtype)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, 0.9)
    losses = []
    for step in range(steps):
        images, labels = batch_at(data, step, 16, 0)
        loss = F.cross_entropy(network(images.to(dtype)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_fused_is_on_the_reference_s_curve() -> None:
    steps = 10

    def losses(system: str, dtype: torch.dtype) -> list[float]:
        return losses_of(build(replace(SMALL, system=system), 10), dtype, steps)

    exact = losses("vcr-reference", torch.float64)
    assert losses("vcr", torch.float64) == pytest.approx(exact, rel=1e-8)
    fused, plain = losses("vcr", torch.float32), losses("vcr-reference", torch.float32)
    growth = 0.0
    for step in range(steps):
        # the fused path is off the exact curve no more than the equations are in float32, as errors grow
        growth = max(growth, abs(plain[step] - exact[step]))
        assert abs(fused[step] - exact[step]) <= 4 * growth + 1e-6 * exact[step]


def test_report(tmp_path: Path) -> None:
    runs = [trained(replace(SMALL, system=s), tmp_path) for s in ("vcr", "vcr-reference")]
    assert len(differences(runs)["digits", 0]) == SMALL.steps
    for file in save(runs, {}, tmp_path / "results"):
        assert file.stat().st_size > 1000


def command(folder: Path, *more: str, torchrun: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", *torchrun, "-m"] if torchrun else []
    return [
        *(start or [sys.executable, "-m"]),
        *("benchmarks", "train", "--systems", "vcr", "--datasets", "digits", "--seeds", "1", "--batch", "8"),
        *("--threads", "1", "--every", "2", "--folder", str(folder), *more),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def losses_in(folder: Path) -> list[float]:
    return torch.load(folder / "digits-vcr-0.pt", weights_only=True)["losses"]


def wait_for_step(path: Path, process: "subprocess.Popen[str]", step: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and torch.load(path, weights_only=True)["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint of step {step}: {process.communicate()[1]}")


def test_killed_and_started_again(tmp_path: Path, threads: Any, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ("--steps", "12")
    whole = trained(Settings("vcr", "digits", steps=12, batch=8), tmp_path)
    folder = tmp_path / "killed"
    process = subprocess.Popen(command(folder, *steps), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_step(folder / "digits-vcr-0.pt", process, 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = len(losses_in(folder))
    assert 0 < done < 12
    threads(1)
    assert main(command(folder, *steps)[4:]) == 0  # what the same command calls
    assert f"goes on at step {done}" in capsys.readouterr().err
    assert losses_in(folder) == whole.losses


def children_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(entry.name))
    return sorted(found)


@pytest.mark.skipif(not dist.is_available() or not Path("/proc/self/stat").exists(), reason="needs gloo and /proc")
def test_two_processes_one_of_which_dies(tmp_path: Path) -> None:
    steps = ("--steps", "10", "--dtype", "float64")  # in which rounding stays out of sight
    alone = trained(Settings("vcr", "digits", steps=10, batch=8, dtype="float64"), tmp_path).losses
    two = ("--nproc-per-node", "2", "--max-restarts", "1")
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "two"
    whole = subprocess.run(
        command(undisturbed, *steps, torchrun=two), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    start = command(folder, *steps, torchrun=two)
    process = subprocess.Popen(start, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_step(folder / "digits-vcr-0.pt", process, 2)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "failed (exitcode: " in said  # torchrun names the first that it sees, or the other, which lost its peer
    assert "goes on at step" in said
    both = losses_in(folder)
    assert len(both) == 10
    assert both == losses_in(undisturbed)  # to the bit
    assert both == pytest.approx(alone, rel=1e-8)  # sums over half a batch each are rounded in another order


def sharded(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        network = build(replace(SMALL, batch=4), 10)
        alone = build(replace(SMALL, batch=4), 10)
        for stage in (1, 2, 3, 4):
            fully_shard(getattr(network, f"layer{stage}")[0])
        fully_shard(network)
        images = load("digits").images[4 * rank : 4 * rank + 4]
        network(images).square().mean().backward()
        expected = [torch.zeros_like(p) for p in alone.parameters()]
        for part in (0, 1):
            fresh = build(replace(SMALL, batch=4), 10)
            fresh(load("digits").images[4 * part : 4 * part + 4]).square().mean().backward()
            for total, p in zip(expected, fresh.parameters(), strict=True):
                total += p.grad / 2
        for p, want in zip(network.parameters(), expected, strict=True):
            assert isinstance(p.grad, DTensor)
            got: Tensor = p.grad.full_tensor()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_fully_shard_takes_the_blocks(tmp_path: Path) -> None:
    mp.spawn(sharded, (str(tmp_path),), nprocs=2)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="system is 'vgg'"):
        Settings("vgg", "digits")
    with pytest.raises(ValueError, match="dataset is 'mnist'"):
        Settings("vcr", "mnist")
    with pytest.raises(ValueError, match="steps is 0"):
        replace(SMALL, steps=0)
    with pytest.raises(ValueError, match="a batch of 8 can't be divided among 3 processes"):
        run(SMALL, tmp_path, Processes(0, 3, torch.device("cpu")), 3, quiet)
    with pytest.raises(ValueError, match="there is none in"):
        trained(replace(SMALL, system="vcr-converted"), tmp_path)
    path = tmp_path / f"{SMALL.name}.pt"
    checkpoint.save(path, SMALL, {"step": 0})
    with pytest.raises(ValueError, match="is of another run \\(steps 6, not 7\\)"):
        trained(replace(SMALL, steps=7), tmp_path)
    missing = "no network; no average; no optimizer; no losses; no times; no start; no peak"
    with pytest.raises(ValueError, match=rf"{SMALL.name}\.pt is no run's checkpoint: {missing}"):
        trained(SMALL, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="can't be read"):
        trained(SMALL, tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=rf"{SMALL.name}\.pt is no run's checkpoint: it holds a list"):
        trained(SMALL, tmp_path)
    torch.save(build(SMALL, 10).state_dict(), path)  # a checkpoint, but no run's
    with pytest.raises(ValueError, match=r"is no run's checkpoint: no settings; no network; .* no peak"):
        trained(SMALL, tmp_path)
    state = dict(network={}, average={}, optimizer={"lr": 1}, step="6", losses=[0.5, "1"], times=[], start=1.0, peak=2)
    checkpoint.save(path, SMALL, state)
    text = "checkpoint: step is a str, not an int; losses is a list, not a list of numbers$"
    with pytest.raises(ValueError, match=text):
        trained(SMALL, tmp_path)
    checkpoint.save(path, SMALL, state | dict(step=6, losses=[]))
    text = (
        r"\.pt doesn't fit the run: network \(RuntimeError: .*conv1.*; average \(Run.*; optimizer \(KeyError: 'param_g"
    )
    with pytest.raises(ValueError, match=text):
        trained(SMALL, tmp_path)
    wrong = subprocess.run(command(tmp_path, "--every", "0"), cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--every is 0" in wrong.stderr


def test_accuracy_leaves_the_network_as_it_was() -> None:
    network = build(SMALL, 10)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    assert 0 <= accuracy(network, load("digits"), torch.device("cpu")) <= 100
    assert network.training
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())
