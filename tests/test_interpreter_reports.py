"""Proves: what the interpreter's process reports of a test arrives, however it is written."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from .interpreter import Child


def test_a_report_that_is_read_before_it_is_written_out(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The child's file may end within a line at any time."""
    config, item = request.config, request.node
    report = pytest.TestReport(item.nodeid, item.location, {}, outcome="passed", longrepr=None, when="teardown")
    line = json.dumps(config.hook.pytest_report_to_serializable(config=config, report=report)) + "\n"
    pieces = iter((line[:10], line[10:30], line[30:]))
    child = Child.__new__(Child)
    with (tmp_path / "reports").open("w") as to, (tmp_path / "reports").open() as child.reports:

        def poll() -> None:
            to.write(next(pieces))
            to.flush()

        child.config, child.begun, child.process = config, "", cast(Any, SimpleNamespace(poll=poll))
        assert [each.nodeid for each in child._reports_of(item)] == [item.nodeid]
