"""What a run needs to go on as if it had never stopped."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .settings import Settings


def save(path: Path, settings: Settings, state: dict[str, Any]) -> None:
    """The file is there whole or not at all, whenever the process dies."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        torch.save({"settings": asdict(settings), **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def load(path: Path, settings: Settings) -> dict[str, Any] | None:
    """None where there is no file yet.

    Raises:
        ValueError: the file can't be read, or is of a run with other settings; says which.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True)
        kept = state.pop("settings")
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, AttributeError) as error:
        raise ValueError(f"the checkpoint {path} can't be read: {str(error).splitlines()[0]}") from error
    wanted = asdict(settings)
    wanted["layers"], kept["layers"] = tuple(wanted["layers"]), tuple(kept["layers"])
    other = [f"{name} {kept.get(name)!r}, not {x!r}" for name, x in wanted.items() if kept.get(name) != x]
    if other:
        raise ValueError(
            f"the checkpoint {path} is of another run ({'; '.join(other)}); remove it, or name another folder"
        )
    return state
