"""The examples in the documentation run, one after another in each file."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import vcr_ops

from .packages import imported
from .resnexts import resnet

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = {"vcr_ops.viz": "vcr_ops.viz.__main__", "benchmarks": "benchmarks.__main__"}


def run(file: Path, commands: bool = False, **names: object) -> int:
    """Runs a file's examples in one namespace, where asked its commands, too; returns how many there were."""
    found = EXAMPLE.findall(file.read_text(encoding="utf-8"))
    if not commands:
        found = [(kind, source) for kind, source in found if kind == "python"]
    for number, (kind, source) in enumerate(found):
        if kind == "python":
            if "import timm" in source and not has_timm():
                continue
            exec(compile(source, f"{file.name}, example {number + 1}", "exec"), names)
        else:
            for line in source.splitlines():
                command(line)
    return len(found)


def has_timm() -> bool:
    try:
        imported("timm")
    except pytest.skip.Exception:
        return False
    return True


def command(line: str) -> None:
    """Runs ``python -m MODULE ...``, in this process: to start another takes longer than the examples."""
    python, option, module, *arguments = shlex.split(line)
    assert (python, option) == ("python", "-m"), line
    assert importlib.import_module(COMMANDS[module]).main(arguments) == 0, line


def test_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("matplotlib", "PIL", "sklearn", "skimage"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    importlib.import_module("PIL.Image").new("RGB", (80, 64), "teal").save("a.jpg")
    assert run(ROOT / "docs/guide.md", commands=True, trained=resnet("torchvision")) == 13
    assert {"index.html", "layer3-0-attention-0.png"} <= {file.name for file in Path("pictures").iterdir()}
    assert Path("tables.json").stat().st_size > 1000
    assert Path("benchmarks/out/train/results.json").stat().st_size > 1000


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    state = vcr_ops.vcrnet50().state_dict()
    torch.save(state, "vcrnet50.pth")
    new = (".sampler.", ".reasoner.", ".modulator.")
    torch.save({key: x for key, x in state.items() if not any(part in key for part in new)}, "resnext50_32x4d.pth")
    assert run(ROOT / "README.md", trained=resnet("torchvision")) == 4
