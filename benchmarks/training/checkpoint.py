"""What a run needs to go on as if it had never stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .settings import Settings


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _are_numbers(x: object) -> bool:
    return isinstance(x, list) and all(map(_is_number, x))


# What a checkpoint has, and how that is told and called.
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "settings": (lambda x: isinstance(x, Mapping), "a mapping"),
    "network": (lambda x: isinstance(x, Mapping), "a state dict"),
    "average": (lambda x: isinstance(x, Mapping), "a state dict"),
    "optimizer": (lambda x: x is None or isinstance(x, Mapping), "a state dict or None"),
    "step": (lambda x: isinstance(x, int) and not isinstance(x, bool), "an int"),
    "losses": (_are_numbers, "a list of numbers"),
    "times": (_are_numbers, "a list of numbers"),
    "start": (_is_number, "a number"),
    "peak": (_is_number, "a number"),
}


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
        ValueError: the file can't be read, is of a run with other settings, or isn't what :func:`save` writes; says all
            that is missing or of another type.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the checkpoint {path} can't be read: {text}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no run's checkpoint: it holds a {type(state).__name__}")
    kept = state.get("settings")
    if isinstance(kept, Mapping):
        wanted = asdict(settings)
        other = [f"{name} {kept.get(name)!r}, not {x!r}" for name, x in wanted.items() if kept.get(name) != x]
        if other:
            raise ValueError(
                f"the checkpoint {path} is of another run ({'; '.join(other)}); remove it, or name another folder"
            )
    problems = [f"no {name}" for name in _ENTRIES if name not in state]
    problems += [
        f"{name} is a {type(state[name]).__name__}, not {what}"
        for name, (fits, what) in _ENTRIES.items()
        if name in state and not fits(state[name])
    ]
    if problems:
        raise ValueError(f"{path} is no run's checkpoint: {'; '.join(problems)}")
    return state


def restore(path: Path, *parts: tuple[str, Any, Any]) -> None:
    """Give modules and optimizers, each with its name in the checkpoint, their states.

    Raises:
        ValueError: some don't fit; says which, and why.
    """
    found = [_restored(*part) for part in parts]
    if any(found):
        raise ValueError(f"the checkpoint {path} doesn't fit the run: {'; '.join(filter(None, found))}")


def _restored(name: str, module: Any, state: Any) -> str:
    """What keeps a module or optimizer from having a state; "" where it has it now."""
    try:
        module.load_state_dict(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"{name} ({type(error).__name__}: {' '.join(str(error).split())})"
    return ""
