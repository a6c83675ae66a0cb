"""torch's own kernels, which stay at hand where the table holds their entries."""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

Kernel = Callable[..., Any]
"""Called with a keyset before the arguments."""

_kernels: dict[tuple[str, str], Kernel] = {}


def remember(overload: OpOverload, key: str) -> Kernel | None:
    """The kernel that holds this entry of the dispatcher now; None where there is none. Called before ours takes its place."""
    try:
        kernel = torch.library.get_kernel(overload, key).call_boxed
    except (RuntimeError, ValueError):  # the latter for a key that Python has no name for
        return None
    _kernels[overload.name(), key] = kernel
    return kernel


def kernel_of(overload: str, key: str) -> Kernel:
    """The kernel that was remembered last. Raises KeyError where none was: the mode has not been entered in this process."""
    return _kernels[overload, key]
