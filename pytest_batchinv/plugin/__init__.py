"""The pytest plugin: hooks only. With --batch-invariant off they skip marked tests, and load and do nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from pytest_batchinv.plugin import lifecycle, markers, options
from pytest_batchinv.plugin.fixtures import batch_invariant, batchinv_engine, batchinv_settings, compile_mode
from pytest_batchinv.plugin.stash import SETTINGS

__all__ = ["batch_invariant", "batchinv_engine", "batchinv_settings", "compile_mode"]


def pytest_addoption(parser: pytest.Parser) -> None:
    options.declare(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    for line in markers.HELP:
        config.addinivalue_line("markers", line)
    if not options.any_given(config):
        return
    with _usage_errors():
        from pytest_batchinv.plugin import settings

        config.stash[SETTINGS] = settings.resolve(config)
        if lifecycle.enabled(config):
            from pytest_batchinv.plugin import enabled

            enabled.start(config)
        else:
            _warn_of_what_is_not_written(config)


def _warn_of_what_is_not_written(config: pytest.Config) -> None:
    given = [f"--batchinv-{name}" for name in ("report", "resume") if config.getoption(f"batchinv_{name}")]
    if given and not hasattr(config, "workerinput"):
        words = f"{' and '.join(given)} has no effect without --batch-invariant: nothing is checked, and nothing is written"
        config.issue_config_time_warning(pytest.PytestConfigWarning(words), stacklevel=2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    with _collection_errors(metafunc.definition.nodeid):
        lifecycle.check_markers(metafunc.definition)
        modes = lifecycle.compile_modes(metafunc)
    if modes:
        metafunc.parametrize("compile_mode", modes, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if lifecycle.enabled(config):
        return
    skip = pytest.mark.skip(reason=lifecycle.NEEDS_OPTION)
    for item in items:
        if lifecycle.needs_option(item):
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    with _test_errors():
        lifecycle.check_markers(item)  # again, for the tests of a unittest.TestCase: they pass no pytest_generate_tests
    lifecycle.skip_on_other_gpus(item)


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
