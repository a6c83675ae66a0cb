"""What the plugin keeps on pytest's objects."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from pytest_batchinv.settings import Settings


@dataclass
class Run:
    """One run of one test. settings: with its marker's arguments. calls_before: the mode's hits when it was entered."""

    settings: Settings
    stack: ExitStack = field(default_factory=ExitStack)
    mode: Any = None
    calls_before: int = 0


RUN = pytest.StashKey[Run]()  # on an item
SETTINGS = pytest.StashKey[Settings]()  # on the config
MAKE_ENGINE = pytest.StashKey[Callable[..., Any]]()  # on the config: builds an engine, or gives one that it has built
