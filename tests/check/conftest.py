"""Each check here has an example database of its own, and a sweep that no slow machine cuts short."""

import hypothesis
import pytest
from hypothesis.database import InMemoryExampleDatabase
from scan_data import scanned_data  # noqa: F401

from pytest_batchinv import context
from pytest_batchinv.search import sweep


@pytest.fixture(autouse=True)
def _whole_sweeps(monkeypatch):
    monkeypatch.setattr(sweep, "SECONDS", 120.0)


@pytest.fixture
def database():
    """In Hypothesis' profile, where the checks take it from."""
    before = hypothesis.settings.get_current_profile_name()
    database = InMemoryExampleDatabase()
    hypothesis.settings.register_profile("of_this_test", derandomize=False, database=database)
    hypothesis.settings.load_profile("of_this_test")
    yield database
    hypothesis.settings.load_profile(before)


@pytest.fixture
def emitted():
    found = []
    with context.collecting(found.append):
        yield found
