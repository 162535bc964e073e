"""Runs the tests marked ``triton`` in a child process, under Triton's interpreter, and reports them as if run here.

Triton decides when a kernel is defined whether it is interpreted or compiled, so one process can't do both. The child
works beside this process; its reports arrive one by one through a file, and the closing line counts all of them.
``TRITON_INTERPRET=1 pytest`` runs these tests alone and directly, as a debugger needs it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import pytest

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
REPORTS = "VCR_OPS_TEST_REPORTS"  # the environment variable that tells a child where its reports go


class Child:
    """A pytest process that runs the given tests under the interpreter."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.config = config
        self.folder = tempfile.TemporaryDirectory(prefix="vcr_ops-interpreter-")
        folder = Path(self.folder.name)
        names, reports, self.log = folder / "tests", folder / "reports", folder / "log"
        names.write_text("".join(f"{item.nodeid}\n" for item in items))
        reports.touch()
        self.reports: IO[str] = reports.open()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{names}"],
            cwd=config.rootpath,
            env=os.environ | {"TRITON_INTERPRET": "1", REPORTS: str(reports)},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def run(self, item: pytest.Item) -> None:
        """Pass on what the child reports of a test, as soon as it does."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports_of(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def _reports_of(self, item: pytest.Item) -> Any:
        while True:
            over = self.process.poll() is not None  # before reading: what it wrote last must not be missed
            line = self.reports.readline()
            if line.endswith("\n"):
                report = self.config.hook.pytest_report_from_serializable(config=self.config, data=json.loads(line))
                if isinstance(report.longrepr, list):
                    report.longrepr = tuple(report.longrepr)  # a reason to skip; JSON has no tuples
                if report.nodeid == item.nodeid:
                    yield report
                    if report.when == "teardown":
                        return
            elif over:
                text = f"The interpreter's process ended ({self.process.returncode}):\n{self.log.read_text()[-4000:]}"
                place = item.location
                yield pytest.TestReport(item.nodeid, place, {}, outcome="failed", longrepr=text, when="call")
                return
            else:
                time.sleep(0.02)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reports.close()
        self.folder.cleanup()


class InParent:
    """Hands the marked tests to a child."""

    child: Child | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        marked = [item for item in items if item.get_closest_marker("triton")]
        if marked and importlib.util.find_spec("triton") is None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="Triton isn't installed"))
        elif marked and not config.option.collectonly:
            self.child = Child(config, marked)
            # Last, so that both processes have something to do.
            items[:] = [item for item in items if not item.get_closest_marker("triton")] + marked

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if self.child is None or not item.get_closest_marker("triton"):
            return None
        self.child.run(item)
        return True

    def pytest_unconfigure(self) -> None:
        if self.child is not None:
            self.child.stop()


class InChild:
    """Leaves only the marked tests, and writes their reports where the parent waits for them."""

    def __init__(self) -> None:
        self.parent = os.getppid()
        self.path = os.environ.get(REPORTS)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        others = [item for item in items if not item.get_closest_marker("triton")]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("triton")]

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.path is not None:
            data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
            with open(self.path, "a") as file:
                file.write(json.dumps(data) + "\n")
            if os.getppid() != self.parent:
                pytest.exit("the process that waits for the reports is gone")


def plugin() -> object:
    """What this process needs."""
    if not INTERPRETED:
        return InParent()
    if importlib.util.find_spec("triton") is not None:
        speed_up()
    return InChild()


def speed_up() -> None:
    """Spare the interpreter what it does again and again; about two thirds of its time.

    It replaces triton.language's functions whenever a kernel calls a function, though once a launch is enough. It does
    every addition of ints a second time in 64 bits, which no map that it can run needs. And it works out the same few
    types, and what every value of such a type has alike, for every value.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages: dict[Any, frozenset[int]] = {}
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        if function not in languages:
            modules = function.__globals__.values()
            languages[function] = frozenset(id(x) for x in modules if x is tl or x is tl.core)
        if languages[function] <= patched:
            return None
        patched.update(languages[function])
        return patch(function)

    def run_grid(self: Any, *args: Any, **options: Any) -> Any:
        patched.clear()  # at its end, a launch puts back what it has replaced
        types.clear()
        return run(self, *args, **options)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run_grid
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    types = remember_types(tl, interpreter)


def remember_types(tl: Any, interpreter: Any) -> dict[Any, dict[str, Any]]:
    """All of ``block_type(element, shape)``, and of ``tensor(handle, type)`` but the handle, depends on nothing else.

    Returns what is remembered of block types; pointers' types are new ones in every launch.
    """
    make_type, make_tensor, make_np_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    types: dict[Any, dict[str, Any]] = {}  # what they hold keeps the element's type, and so its id

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *[x.value if isinstance(x, tl.constexpr) else x for x in shape])
        known = types.get(key)
        if known is None:
            make_type(self, element_ty, shape)
            types[key] = self.__dict__
        else:
            self.__dict__ = known

    def tensor(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("of_tensors")
        if known is None:
            make_tensor(self, handle, type)
            type.of_tensors = {name: x for name, x in self.__dict__.items() if name != "handle"}
        else:
            self.__dict__.update(known)
            self.handle = handle

    def np_dtype(type: Any) -> Any:
        if "of_arrays" not in type.__dict__:
            type.of_arrays = make_np_dtype(type)
        return type.of_arrays

    tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype = block_type, tensor, np_dtype
    return types
