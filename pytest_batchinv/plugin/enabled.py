"""The hooks of a run with --batch-invariant: around each test, and where the run is reported."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from pytest_batchinv.plugin import lifecycle, preflight, progress, seeds, xdist
from pytest_batchinv.plugin.fixtures import model_loader
from pytest_batchinv.plugin.settings import Settings
from pytest_batchinv.plugin.stash import MODELS, RESULTS, SETTINGS
from pytest_batchinv.report import html, json, junit, terminal, unfinished
from pytest_batchinv.report.record import Record
from pytest_batchinv.report.results import Results
from pytest_batchinv.report.words import counted


def start(config: pytest.Config) -> None:
    """Raises ValueError where the run cannot begin."""
    settings = config.stash[SETTINGS]
    config.stash[MODELS] = model_loader()
    resumed = Resumed.of(settings)
    config.pluginmanager.register(resumed, "batchinv-resumed")
    config.pluginmanager.register(AroundTests(), "batchinv-around-tests")
    if xdist.is_worker(config):
        xdist.share_cores(config)
        if settings.device != "cpu" and (why := xdist.take_gpu(config)):
            config.pluginmanager.register(xdist.Refusal(why), "batchinv-refusal")
        return
    preflight.check(settings, config)
    config.stash[RESULTS] = Results(settings)
    config.pluginmanager.register(Reporter(config.stash[RESULTS], resumed), "batchinv-reporter")
    config.pluginmanager.register(progress.Display(config), "batchinv-progress")
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(xdist.WorkerSlots(), "batchinv-worker-slots")
        xdist.hand_out_tests_one_by_one(config)


class AroundTests:
    """In every process that runs tests. The mode is on in a marked test and in its function-scoped fixtures.

    Wider fixtures are built with the mode off, whichever test asks for them first. To build one in the mode, enter
    ``batch_invariant_mode()`` in it.
    """

    def __init__(self) -> None:
        self.item: pytest.Item | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """torch.compile logs thousands of lines for the handler of TORCH_TRACE; pytest would print them with every failure."""
        logs = session.config.pluginmanager.getplugin("logging-plugin")
        if logs is not None:  # nobody has said -p no:logging
            logs.report_handler.addFilter(lambda record: record.name != "torch.__trace")

    @pytest.fixture(autouse=True)
    def _batchinv_mode(self, request: pytest.FixtureRequest) -> Iterator[None]:
        if not lifecycle.in_mode(request.node):
            yield
            return
        with lifecycle.mode_of(request.node):
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        if fixturedef.scope == "function" or self.item is None:
            return (yield)
        with lifecycle.building_wider_fixture(self.item, fixturedef.argname):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.item = item
        lifecycle.begin(item)
        self._seed(item)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._seed(item)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Generator[None, Any, Any]:
        if isinstance(collector, pytest.File):
            seeds.load_torch()  # modules draw while they are imported
        self._seed(collector)
        return (yield)

    def _seed(self, node: pytest.Item | pytest.Collector) -> None:
        """A test alone draws what it draws among others: each collection and each phase starts from one seed."""
        seeds.start(node.config.stash[SETTINGS].seed)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        try:
            return (yield)
        finally:
            self.item = None
            lifecycle.end(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        if call.when == "call" and report.passed and (why := lifecycle.nothing_happened(item)):
            report.outcome, report.longrepr = "failed", why
        if call.when == "teardown":  # whose report JUnit's file takes the properties of
            report.user_properties += junit.properties(lifecycle.kept(item))
        return report


class Resumed:
    """In every process that collects: leaves out the tests that an unfinished run has proven."""

    def __init__(self, proven: dict[str, list[Record]], words: str) -> None:
        self.proven, self.words = proven, words

    @classmethod
    def of(cls, settings: Settings) -> Resumed:
        """Raises ValueError where what is to be resumed is no unfinished run of this command."""
        if settings.resume is None:
            return cls({}, "")
        seeds.load_torch()
        from pytest_batchinv.receipt import receipt

        try:
            earlier = unfinished.read(settings.resume, settings)
        except ValueError as error:
            raise ValueError(f"--batchinv-resume: {error}") from None
        proven = unfinished.proven(earlier, receipt())
        again = len({record.nodeid for record in earlier.records}) - len(proven)
        other = f"; {counted(again, 'test')} of it run again, as sources, versions or the machine are others" if again else ""
        return cls(proven, f"{counted(len(proven), 'test')} proven by {settings.resume.name}, left out{other}")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left_out = [item for item in items if item.nodeid in self.proven]
        if left_out:
            items[:] = [item for item in items if item.nodeid not in self.proven]
            config.hook.pytest_deselected(items=left_out)


class Reporter:
    """Where the run is reported, so not on xdist's workers: gathers the results, prints and writes them."""

    def __init__(self, results: Results, resumed: Resumed) -> None:
        self.results, self.resumed = results, resumed
        self.results.records += (record for records in resumed.proven.values() for record in records)
        self.written: list[str] = []
        reports = [path for path in results.settings.report if path.suffix == ".json"]
        self.keeper = unfinished.Keeper(results, reports[0]) if reports else None
        if self.keeper is not None:
            for nodeid in resumed.proven:
                self.keeper.take(nodeid, "passed", "teardown")

    def pytest_report_header(self) -> list[str]:
        resumed = [f"batch invariance: {self.resumed.words}"] if self.resumed.words else []
        return [*terminal.header(self.results.settings), *resumed]

    @pytest.hookimpl(tryfirst=True)  # before JUnit's file takes the report's properties
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.results.outcomes.update(lifecycle.outcome(report))
        self.results.records += lifecycle.records(report)
        if self.keeper is not None:
            self.keeper.take(report.nodeid, report.outcome, report.when)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        self.results.exit_status = int(exitstatus)
        is_complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        try:
            if self.keeper is not None and (how := self.keeper.end(is_complete)):
                self.written.append(how)
            for path in sorted(self.results.settings.report, key=lambda path: path.suffix == ".html"):
                writer = html if path.suffix == ".html" else json
                self.written.append(writer.write(self.results, path))
        except OSError as error:
            self.written.append(f"NOT WRITTEN: {error}")
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("batch invariance")
        for line in [*terminal.summary(self.results), *self.written]:
            terminalreporter.write_line(line)
