"""Launches whose Python side costs little: what depends on shapes, strides and alignment alone is worked out once.

Triton binds and specialises every argument anew at every launch, 10 µs and more for kernels of 25 arguments. So a plan
(``plans.py``) holds a ``Launch``, which keeps the binary that its first call got. Tensors are handed over as addresses, since
Triton asks the driver about each tensor.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton import knobs, runtime
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction


class Launch:
    """One kernel, its grid and options, all its arguments but the tensors, and the binary once it is known.

    It must only be called with tensors of the same dtypes, alignment and sizes, and with the same ones absent: one plan, one
    binary. All must be on one GPU; nothing else asks, and one that is not would be read at an address that means nothing there.
    While the kernel has pre-run hooks, or Triton has launch hooks, a call goes through Triton as a whole and runs them.
    """

    def __init__(self, kernel: JITFunction, grid: tuple[int, int, int], arguments: tuple[Any, ...], **options: Any) -> None:
        self._kernel, self._grid, self._arguments, self._options = kernel, grid, arguments, options
        self._run: Callable[[tuple[Any, ...], tuple[float, ...]], None] | None = None

    def __call__(self, *tensors: Any, numbers: tuple[float, ...] = ()) -> None:
        """tensors: the kernel's first parameters, as tensors or as TMA descriptors; None for what it neither reads nor writes.

        numbers: the next ones, if any change from call to call. Then come ``arguments``, constexprs included.
        """
        if self._run is not None:
            self._run(tensors, numbers)
            return
        binary = self._run_by_triton(tensors, numbers)
        if isinstance(binary, CompiledKernel):  # Triton's interpreter has none
            self._run = self._runner(binary, tensors)

    def _run_by_triton(self, tensors: tuple[Any, ...], numbers: tuple[float, ...]) -> CompiledKernel | None:
        present = _last_tensor(tensors)
        stood_in = [present if x is None else x for x in tensors]
        return self._kernel[self._grid](*stood_in, *numbers, *self._arguments, **self._options)

    def _runner(self, binary: CompiledKernel, tensors: tuple[Any, ...]) -> Callable[[tuple[Any, ...], tuple[float, ...]], None]:
        """What ``JITFunction.run`` does in the end, while nobody listens to it."""
        pre_run_hooks, hooks = self._kernel.pre_run_hooks, knobs.runtime
        run, function, metadata = binary.run, binary.function, binary.packed_metadata
        grid, arguments, by_triton = self._grid, self._arguments, self._run_by_triton
        stream_of, device = runtime.driver.active.get_current_stream, _last_tensor(tensors).get_device()
        addresses = _addresses_beside_descriptors if any(hasattr(x, "block_shape") for x in tensors) else _addresses

        def launch(tensors: tuple[Any, ...], numbers: tuple[float, ...]) -> None:
            if pre_run_hooks or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
                by_triton(tensors, numbers)
            else:  # None for the launch hooks, and for the metadata that is for them
                run(*grid, stream_of(device), function, metadata, None, None, None, *addresses(tensors), *numbers, *arguments)

        return launch


def _last_tensor(tensors: tuple[Any, ...]) -> Tensor:
    return next(x for x in reversed(tensors) if isinstance(x, Tensor))


def _addresses(tensors: tuple[Any, ...]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _addresses_beside_descriptors(tensors: tuple[Any, ...]) -> list[Any]:
    return [x if hasattr(x, "block_shape") else 0 if x is None else x.data_ptr() for x in tensors]
