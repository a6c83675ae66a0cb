"""pytest-batchinv: makes torch batch-invariant, and proves it. Its names load on first use: importing it is free."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_batchinv.check import BatchVarianceError, assert_batch_invariant
    from pytest_batchinv.mode import batch_invariant_mode
    from pytest_batchinv.shapes import BatchShape

__all__ = ["BatchShape", "BatchVarianceError", "assert_batch_invariant", "batch_invariant_mode"]

_HOMES = {
    "BatchShape": "shapes",
    "BatchVarianceError": "check",
    "assert_batch_invariant": "check",
    "batch_invariant_mode": "mode",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
