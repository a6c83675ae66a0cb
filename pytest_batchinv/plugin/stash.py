"""What the plugin keeps on pytest's objects."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_batchinv.mode import Mode
    from pytest_batchinv.plugin.settings import Settings
    from pytest_batchinv.report.record import Record
    from pytest_batchinv.report.results import Results


class Run:
    """One run of one test. settings: with its marker's arguments. records: what its checks found so far."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stack = ExitStack()
        self.records: list[Record] = []
        self.mode: Mode | None = None


RUN = pytest.StashKey[Run]()  # on an item
SETTINGS: pytest.StashKey[Settings] = pytest.StashKey()  # on the config
RESULTS: pytest.StashKey[Results] = pytest.StashKey()  # on the config, where the run is reported: not on xdist's workers
MODELS = pytest.StashKey[Callable[..., Any]]()  # on the config: loads a model, or gives one that it has loaded
