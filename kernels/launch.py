"""Launches whose Python side costs little: what depends on shapes, strides and alignment alone is worked out once.

Triton binds and specialises every argument anew at every launch, 10 µs and more for kernels of 25 arguments. So a
launcher asks a *plan* for its ``Launch``: a function of all that the numbers, the tile, the grid and the binary depend on,
which remembers its results. Tensors are handed over as addresses, since Triton asks the driver about each tensor.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
import triton
from triton import knobs, runtime
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

_P = ParamSpec("_P")
_PLANS_KEPT = 1 << 14
_KNOWS_ENTRY = triton.__version__.startswith("3.6.") and torch.version.hip is None
"""Triton 3.6, which torch 2.11 has: others hand something else to what launches in the end."""
_plans: list[Callable] = []


class Launch:
    """One kernel, its grid and options, all its arguments but the tensors, and the binary once it is known.

    It must only be called with tensors of the same dtypes, alignment and sizes, and with the same ones absent: one plan, one
    binary. All must be on one GPU; nothing else asks, and one that is not would be read at an address that means nothing there.
    """

    def __init__(self, kernel: JITFunction, grid: tuple[int, int, int], arguments: tuple[Any, ...], **options: Any) -> None:
        self._kernel, self._grid, self._arguments, self._options = kernel, grid, arguments, options
        self._run: Callable[[tuple, tuple], None] | None = None

    def __call__(self, *tensors: Any, numbers: tuple[float, ...] = ()) -> None:
        """tensors: the kernel's first parameters, as tensors or as TMA descriptors; None for what it neither reads nor writes.

        numbers: the next ones, if any change from call to call. Then come ``arguments``, constexprs included.
        """
        if self._run is not None:
            self._run(tensors, numbers)
            return
        present = next(x for x in reversed(tensors) if isinstance(x, torch.Tensor))
        stood_in = [present if x is None else x for x in tensors]
        binary = self._kernel[self._grid](*stood_in, *numbers, *self._arguments, **self._options)
        if isinstance(binary, CompiledKernel):  # Triton's interpreter has none
            addresses = _addresses_beside_descriptors if any(hasattr(x, "block_shape") for x in tensors) else _addresses
            self._run = _runner(binary, self._grid, addresses, self._arguments, present.get_device())


def _addresses(tensors: tuple) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _addresses_beside_descriptors(tensors: tuple) -> list[Any]:
    return [x if hasattr(x, "block_shape") else 0 if x is None else x.data_ptr() for x in tensors]


def _runner(
    binary: CompiledKernel, grid: tuple[int, int, int], addresses: Callable[[tuple], list], arguments: tuple, device: int
) -> Callable[[tuple, tuple], None]:
    """``binary[grid]``, without what that prepares at every launch for a profiler's hooks, while there are none."""
    with_hooks, hooks, stream_of = binary[grid], knobs.runtime, runtime.driver.active.get_current_stream
    run, before = _entry(binary)

    def launch(tensors: tuple, numbers: tuple) -> None:
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            with_hooks(*addresses(tensors), *numbers, *arguments)
        else:
            run(*grid, stream_of(device), *before, *addresses(tensors), *numbers, *arguments)

    return launch


def _entry(binary: CompiledKernel) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """What launches the binary, and what it is handed between the stream and the kernel's arguments."""
    run, metadata = binary.run, binary.packed_metadata
    if _KNOWS_ENTRY and not run.global_scratch_size and not run.profile_scratch_size:
        # What ``run`` calls in the end, after a microsecond spent on scratch memory that our kernels do not use.
        cooperative, pdl = run.launch_cooperative_grid, run.launch_pdl
        return run.launch, (binary.function, cooperative, pdl, None, None, metadata, None, None, None)
    return run, (binary.function, metadata, None, None, None)


def plan(function: Callable[_P, Any]) -> Callable[_P, Any]:
    """Remembers what the function returned for these arguments, which must be hashable."""
    remembering = functools.lru_cache(_PLANS_KEPT)(function)
    _plans.append(remembering)
    return remembering


def forget_plans() -> None:
    for remembering in _plans:
        remembering.cache_clear()


def alignment(*tensors: torch.Tensor | None) -> int:
    """One bit a tensor: whether it begins at a multiple of 16 bytes, which is what Triton specialises."""
    return alignment_bits(*[tensor is not None and tensor.data_ptr() % 16 == 0 for tensor in tensors])


def alignment_bits(*aligned: bool) -> int:
    bits = 0
    for is_aligned in aligned:
        bits = 2 * bits + is_aligned
    return bits
