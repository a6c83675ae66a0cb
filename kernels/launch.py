"""Launches whose Python side costs little: what depends on shapes, strides and alignment alone is worked out once.

Triton binds and specialises every argument anew at every launch, 10 µs and more for kernels of 25 arguments. So a
launcher asks a *plan* for its ``Launch``: a function of all that the tile, the grid and the binary depend on, which
remembers its results. Tensors are handed over as addresses, since Triton asks the driver about each tensor.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from triton import knobs, runtime
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

_P = ParamSpec("_P")
_PLANS_KEPT = 1 << 14
_plans: list[Callable] = []


class Launch:
    """One kernel, its grid and options, and the binary once it is known.

    It must only be called with arguments of the same dtypes, alignment and sizes: one plan, one binary. All tensors must be
    on one GPU; nothing else asks, and one that is not would be read at an address that means nothing there.
    """

    def __init__(self, kernel: JITFunction, grid: tuple[int, int, int], **options: Any) -> None:
        self._kernel, self._grid, self._options = kernel, grid, options
        self._run: Callable[..., Any] | None = None
        self._tensors: list[int] = []

    def __call__(self, *args: Any) -> None:
        """args: every parameter of the kernel in its order, constexprs included."""
        if self._run is not None:
            addressed = list(args)
            for place in self._tensors:
                addressed[place] = args[place].data_ptr()
            self._run(*addressed)
            return
        binary = self._kernel[self._grid](*args, **self._options)
        if isinstance(binary, CompiledKernel):  # Triton's interpreter has none
            self._tensors = [place for place, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
            self._run = _runner(binary, self._grid, args[self._tensors[0]].get_device())


def _runner(binary: CompiledKernel, grid: tuple[int, int, int], device: int) -> Callable[..., None]:
    """``binary[grid]``, without what that prepares for a profiler's hooks at every launch while there are none."""
    with_hooks, hooks, stream_of = binary[grid], knobs.runtime, runtime.driver.active.get_current_stream
    run, function, metadata = binary.run, binary.function, binary.packed_metadata

    def launch(*args: Any) -> None:
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            with_hooks(*args)
        else:
            run(*grid, stream_of(device), function, metadata, None, None, None, *args)

    return launch


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
