"""pytest-batchinv: makes torch batch-invariant, and proves it. Its names load on first use: importing it is free."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_batchinv.check import (
        BatchVarianceError,
        assert_batch_invariant,
        check_batch_invariant,
        check_negative_control,
    )
    from pytest_batchinv.mode import batch_invariant_mode
    from pytest_batchinv.shapes import BatchShape

__all__ = [
    "BatchShape",
    "BatchVarianceError",
    "assert_batch_invariant",
    "batch_invariant_mode",
    "check_batch_invariant",
    "check_negative_control",
]

_HOMES = {"BatchShape": "shapes", "batch_invariant_mode": "mode"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'check')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
