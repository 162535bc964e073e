"""torchvision and timm where they are installed: their own ResNeXts."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch


def imported(name: str) -> Any:
    """The package; skips the test where it isn't installed.

    torchvision's wheels bring ops that a torch for CPUs alone can't load. None of them matter here, but to describe to
    torch ops that aren't there is an error, which is passed over.
    """
    real = torch.library.register_fake

    def lenient(op: Any, *args: Any, **options: Any) -> Callable[[Any], Any]:
        def register(function: Any) -> Any:
            try:
                return real(op, *args, **options)(function)
            except RuntimeError:
                return function

        return register

    torch.library.register_fake = lenient  # type: ignore[assignment]
    try:
        importlib.import_module("torchvision")
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs torchvision and timm, which the library itself doesn't: {error}")
    finally:
        torch.library.register_fake = real
