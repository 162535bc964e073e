"""Runs the tests marked ``triton`` in a child process, under Triton's interpreter, and reports them as if run here.

Triton decides when a kernel is defined whether it is interpreted or compiled, so one process can't do both. The child
works beside this process; its reports arrive one by one through a file, and the closing line counts all of them.
``TRITON_INTERPRET=1 pytest`` runs these tests alone and directly, as a debugger needs it.
"""

from __future__ import annotations

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

from . import interpreter_patches

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
        self.begun = ""  # of a report, as far as the child has written it
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
            self.begun += self.reports.readline()
            if self.begun.endswith("\n"):
                line, self.begun = self.begun, ""
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
        interpreter_patches.apply()
    return InChild()
