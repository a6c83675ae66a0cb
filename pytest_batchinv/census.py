"""Which operators a subject calls, and which of them nobody has vouched for."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_batchinv.kernels import overloads, rowlocal, table


class _Census(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: set[tuple[torch._ops.OpOverload, bool]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = torch.utils._pytree.tree_leaves((args, kwargs))
        on_cpu = any(isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.is_floating_point() for x in tensors)
        self.calls.add((func, on_cpu))
        return func(*args, **(kwargs or {}))


def unclassified_ops(run: Callable[[], object]) -> list[str]:
    """Names of the overloads that ``run()`` calls which are neither in the table nor row-local.

    Only operators on the dispatcher are seen; run eager code.
    """
    with _Census() as census:
        run()
    return sorted({overload.name() for overload, on_cpu in census.calls if not _is_vouched_for(overload, on_cpu)})


def _is_vouched_for(overload: torch._ops.OpOverload, on_cpu: bool) -> bool:
    return overload.namespace == "batchinv" or overload in _covered() or rowlocal.is_row_local(overload, on_cpu)


def _covered() -> set[torch._ops.OpOverload]:
    leaves = [
        overload for name in (*table.BACKEND_KERNELS, *table.POINTWISE) if (overload := overloads.overload_of(name)) is not None
    ]
    return {*leaves, *(sibling.overload for overload in leaves for sibling in overloads.siblings(overload))}
