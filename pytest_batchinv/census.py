"""Which operators a subject calls, and which of them nobody has vouched for."""

from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_batchinv.kernels import doors, rowlocal, table


class _Census(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[torch._ops.OpOverload] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def unclassified_ops(run: Callable[[], object]) -> list[str]:
    """Names of the overloads that ``run()`` calls which are neither in the table nor row-local.

    Only operators on the dispatcher are seen; run eager code.
    """
    with _Census() as census:
        run()
    return sorted(overload.name() for overload in census.calls if not _is_vouched_for(overload))


def _is_vouched_for(overload: torch._ops.OpOverload) -> bool:
    return overload.namespace == "batchinv" or overload in _covered() or rowlocal.is_row_local(overload)


def _covered() -> set[torch._ops.OpOverload]:
    leaves = [overload for name in (*table.LEAVES, *table.POINTWISE) if (overload := doors.overload_of(name)) is not None]
    return {*leaves, *(sibling.overload for overload in leaves for sibling in doors.siblings(overload))}
