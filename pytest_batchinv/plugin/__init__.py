"""The pytest plugin: hooks only. With --batch-invariant off they skip marked tests, and load and do nothing else."""

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from pytest_batchinv import items, markers, options, settings
from pytest_batchinv.fixtures import batch_invariant, batchinv_engine, batchinv_settings, compile_mode, engine_maker
from pytest_batchinv.keys import MAKE_ENGINE, SETTINGS

__all__ = ["batch_invariant", "batchinv_engine", "batchinv_settings", "compile_mode"]


def pytest_addoption(parser: pytest.Parser) -> None:
    options.declare(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    for line in markers.HELP:
        config.addinivalue_line("markers", line)
    with _usage_errors():
        config.stash[SETTINGS] = settings.resolve(config)
        if config.stash[SETTINGS].enabled:
            _start(config)


def _start(config: pytest.Config) -> None:
    from pytest_batchinv import preflight, report, xdist

    ours = config.stash[SETTINGS]
    config.stash[MAKE_ENGINE] = engine_maker()
    if xdist.is_worker(config):
        xdist.share_cores(config)
        if ours.device != "cpu" and (why := xdist.take_gpu(config)):
            config.pluginmanager.register(xdist.Refusal(why), "batchinv-refusal")
        return
    preflight.check(ours, config)
    config.pluginmanager.register(Reporter(report.Results(ours)), "batchinv-reporter")
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(xdist.WorkerSlots(), "batchinv-worker-slots")


def pytest_report_header(config: pytest.Config) -> list[str]:
    if not config.stash[SETTINGS].enabled:
        return []
    from pytest_batchinv.report import terminal

    return terminal.header(config.stash[SETTINGS])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    with _collection_errors(metafunc.definition.nodeid):
        items.check_markers(metafunc.definition)
        modes = items.compile_modes(metafunc)
    if modes:
        metafunc.parametrize("compile_mode", modes, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.stash[SETTINGS].enabled:
        _skip_what_needs_the_mode(items)


def _skip_what_needs_the_mode(collected: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason=items.NEEDS_OPTION)
    for item in collected:
        if items.needs_option(item):
            item.add_marker(skip)


def pytest_runtest_setup(item: pytest.Item) -> None:
    with _test_errors():
        items.check_markers(item)  # again, for the tests of a unittest.TestCase: they pass no pytest_generate_tests
    items.skip_on_other_gpus(item)
    if item.config.stash[SETTINGS].enabled:
        items.begin(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    try:
        return (yield)
    finally:
        items.end(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if call.when == "call" and report.passed and (why := items.nothing_happened(item)):
        report.outcome, report.longrepr = "failed", why
    return report


class Reporter:
    """Where the run is reported, so not on xdist's workers: gathers the results, prints and writes them."""

    def __init__(self, results: Any) -> None:
        self.results = results
        self.written: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.results.outcomes.update(items.outcome(report))
        self.results.records += items.records(report)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        from pytest_batchinv.report import json

        self.results.exit_status = int(exitstatus)
        try:
            self.written = [json.write(self.results, path) for path in self.results.settings.report]
        except OSError as error:
            self.written = [f"NOT WRITTEN: {error}"]
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        from pytest_batchinv.report import terminal

        terminalreporter.section("batch invariance")
        for line in [*terminal.summary(self.results), *self.written]:
            terminalreporter.write_line(line)


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


@contextlib.contextmanager
def _collection_errors(nodeid: str) -> Iterator[None]:
    """Errors in a test's markers. From xdist's workers collection errors reach the controller, usage errors do not."""
    try:
        yield
    except ValueError as error:
        raise pytest.Collector.CollectError(f"{nodeid}: {error}") from None


@contextlib.contextmanager
def _test_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        pytest.fail(str(error), pytrace=False)
