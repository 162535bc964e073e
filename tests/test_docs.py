"""The examples in the documentation run, one after another in each file."""

import re
from pathlib import Path

import pytest
import torch

import vcr_ops

from .resnexts import resnet

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(file: Path, **names: object) -> int:
    """Runs a file's examples in one namespace; returns how many there were."""
    found = EXAMPLE.findall(file.read_text(encoding="utf-8"))
    for number, source in enumerate(found):
        exec(compile(source, f"{file.name}, example {number + 1}", "exec"), names)
    return len(found)


def test_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    assert run(ROOT / "docs/guide.md") == 5


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    state = vcr_ops.vcrnet50().state_dict()
    torch.save(state, "vcrnet50.pth")
    new = (".sampler.", ".reasoner.", ".modulator.")
    torch.save({key: x for key, x in state.items() if not any(part in key for part in new)}, "resnext50_32x4d.pth")
    assert run(ROOT / "README.md", trained=resnet("torchvision")) == 4
