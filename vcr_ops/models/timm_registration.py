"""timm knows our networks, in whichever order the two packages are imported, and is not imported for that.

Where timm is there already, the networks are registered at once. Else a finder waits on ``sys.meta_path`` for
``timm.models`` to be imported, and registers them when that is done. It finds nothing by itself: it asks the finders
behind it, and lets their loader tell when it is through.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WHOLE = "timm.models"


def register() -> None:
    """Register vcrnet50 and vcrnet101 with timm; imports it. A timm that lacks what this takes gets a warning."""
    try:
        importlib.import_module(f"{__package__}.timm_entries")
    except ImportError as error:  # neither package's import shall fail for that
        warnings.warn(f"vcr_ops can't register its networks with this timm: {error}", stacklevel=2)


class _Loader(importlib.abc.Loader):
    """Another loader, and then :func:`register`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:  # what a loader may have besides, as get_source
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _Finder.drop()
        register()


class _Finder(importlib.abc.MetaPathFinder):
    busy = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WHOLE or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec

    @classmethod
    def drop(cls) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, cls)]


def when_imported() -> None:
    """Register now where timm is imported, else as soon as it is."""
    if _WHOLE in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Finder())
