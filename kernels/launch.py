"""Launches whose Python side costs little: what depends on shapes, strides and alignment alone is worked out once.

Triton binds and specialises every argument anew at every launch, 10 µs and more for kernels of 25 arguments. So a
launcher asks a *plan* for its ``Launch``: a function of all that the tile, the grid and the binary depend on, which
remembers its results.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

_P = ParamSpec("_P")
_PLANS_KEPT = 1 << 14
_plans: list[Callable] = []


class Launch:
    """One kernel, its grid and options, and the binary once it is known.

    It must only be called with arguments of the same dtypes, alignment and sizes: one plan, one binary.
    """

    def __init__(self, kernel: JITFunction, grid: tuple[int, int, int], **options: Any) -> None:
        self._kernel, self._grid, self._options = kernel, grid, options
        self._run: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> None:
        """args: every parameter of the kernel in its order, constexprs included."""
        if self._run is not None:
            self._run(*args)
            return
        binary = self._kernel[self._grid](*args, **self._options)
        if isinstance(binary, CompiledKernel):  # Triton's interpreter has none
            self._run = binary[self._grid]


def plan(function: Callable[_P, Any]) -> Callable[_P, Any]:
    """Remembers what the function returned for these arguments, which must be hashable."""
    remembering = functools.lru_cache(_PLANS_KEPT)(function)
    _plans.append(remembering)
    return remembering


def forget_plans() -> None:
    for remembering in _plans:
        remembering.cache_clear()


def alignment(*tensors: torch.Tensor) -> int:
    """One bit a tensor: whether it begins at a multiple of 16 bytes, which is what Triton specialises."""
    bits = 0
    for tensor in tensors:
        bits = 2 * bits + (tensor.data_ptr() % 16 == 0)
    return bits
