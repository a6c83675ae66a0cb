"""The cases: what is measured, at which sizes, against whom. Each fills a Result within a Budget.

A case is a module with ``run(bench: Bench) -> None``; it names every point that it plans, one by one.
"""

import dataclasses
import importlib
import traceback
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TypeVar

import torch
from measurements import Budget, Result
from timing import Stopwatch, reason

from pytest_batchinv.kernels.aten.common import kernel_set

T = TypeVar("T")

SECONDS = {"gemm": 60, "rows": 60, "attention": 45, "launch": 15, "forward": 200, "fp8": 45, "convolution": 150}
"""The cases in the order in which they run, and the seconds that each may take unless the command line says otherwise."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_DISTANCE = {"bf16": 0.02, "fp16": 0.005, "fp32": 1e-4}
"""A result further from stock torch's than this is wrong, and its time says nothing."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for. layers: how many of the model's layers stay, None for all."""

    device: torch.device
    dtypes: tuple[str, ...] = ("bf16",)
    quick: bool = False
    model: str = "random:qwen3-8b"
    layers: int | None = None
    compiled: bool = True
    forwards: tuple[str, ...] = ()


@dataclasses.dataclass
class Bench:
    """What a case works with, and the result that it fills."""

    options: Options
    stopwatch: Stopwatch
    budget: Budget
    result: Result

    @property
    def device(self) -> torch.device:
        return self.options.device

    @property
    def kernels(self) -> ModuleType:
        """Our launchers for this device, by the names of ``kernels/reference.py``."""
        return kernel_set(torch.empty(0, device=self.device))

    def plan(self, items: Iterable[T], measure: Callable[[T], None]) -> None:
        """Measures item by item while time is left. One that fails is an error of the result; the next ones still run."""
        for item in self.budget.affordable(items, self.result):
            try:
                measure(item)
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{place.filename.rpartition('/')[2]}:{place.lineno}"
                self.result.errors.append(f"{item}: {reason(error)} ({where})")

    def check(self, label: str, dtype: str, distance: float, limit: float | None = None) -> None:
        """Notes an error where our result is far from stock torch's (or is NaN)."""
        limit = MAX_DISTANCE[dtype] if limit is None else limit
        if not distance <= limit:
            self.result.errors.append(
                f"{label}: our result is {distance:.2g} away from the baseline's, more than {limit:g}; "
                "correct the kernel before timing it"
            )


class ModeDidNothing(RuntimeError):
    """No overload of the table was called in the mode, so what was timed was stock torch twice."""


def module_of(case: str) -> ModuleType:
    return importlib.import_module(f"cases.{case}")
