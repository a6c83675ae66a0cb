"""Tests that need a process of their own, because Triton must be told at its import how it is to run.

A module with ``CHILD_ENVIRONMENT = {name: value or None}`` is collected as any other, but each of its tests runs in a child,
which is started with these variables (None: without this one) and kept for the tests that follow. The parent hands it an item
at a time, and takes over how that went. In the child, and where the variables are such already, tests run as usual.
"""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

_IN_CHILD = "BATCHINV_TEST_CHILD"
_children: dict[tuple[str, ...], "Child"] = {}


class Child:
    """A pytest process that runs the items whose ids it is told, line by line, and answers with how each went."""

    def __init__(self, file: Path, root: Path, environment: Mapping[str, str | None]) -> None:
        variables = {**os.environ, "PYTEST_ADDOPTS": "", _IN_CHILD: "1"}
        for name, value in environment.items():
            variables.pop(name, None)
            if value is not None:
                variables[name] = value
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:batchinv", "-p", "no:cacheprovider", "--capture=no"]
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._process = subprocess.Popen([*command, str(file)], cwd=root, env=variables, text=True, **pipes)
        atexit.register(self._process.kill)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def run(self, name: str) -> str | None:
        """What went wrong in this item, or None."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it said follows
        said = []
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return json.loads(line.removeprefix(_ANSWER))
            said.append(line)
        return f"the child process ended with status {self._process.wait()}\n" + "".join(said)


_ANSWER = "\0answer "


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    environment = getattr(pyfuncitem.module, "CHILD_ENVIRONMENT", None)
    if environment is None or _IN_CHILD in os.environ:
        return None
    key = (str(pyfuncitem.path), *sorted(f"{name}={value}" for name, value in environment.items()))
    if key not in _children or _children[key].has_ended():
        _children[key] = Child(pyfuncitem.path, pyfuncitem.config.rootpath, environment)
    failure = _children[key].run(pyfuncitem.name)
    if failure is not None:
        pytest.fail(failure, pytrace=False)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """In the child: the items that the parent asks for, until it closes the pipe."""
    if _IN_CHILD not in os.environ:
        return None
    items = {item.name: item for item in session.items}
    for line in sys.stdin:
        _failures.clear()
        name = line.rstrip("\n")
        if name in items:
            session.config.hook.pytest_runtest_protocol(item=items[name], nextitem=None)
        else:
            _failures.append(f"the child process has no item {name}")
        print(f"\n{_ANSWER}{json.dumps(''.join(_failures) or None)}", flush=True)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failures.append(report.longreprtext)


_failures: list[str] = []
