"""Other GPUs than the one at hand: compile for one that is not there, or run here what was compiled for another.

Nothing of the mode uses this: it is for tests and benchmarks.
"""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pytest_batchinv.kernels import plans, tiles

DEVICES = {
    80: tiles.Device(multiprocessors=108, shared_memory=tiles.SHARED_MEMORY_SM80, capability=80),  # A100
    89: tiles.Device(multiprocessors=142, shared_memory=101_376, capability=89),  # L40S
    90: tiles.Device(multiprocessors=132, shared_memory=232_448, capability=90),  # H100, H200
    100: tiles.Device(multiprocessors=148, shared_memory=232_448, capability=100),  # B200
}
"""What the kernels' launchers would read off these GPUs, by compute capability."""

_MODULES = (
    *("attention.backward", "attention.kernel", "attention.merge", "attention.plan", "attention.ranges"),
    *("implicit_gemm", "matmul", "norm", "ranks", "reduce", "rows", "scaled", "scatter", "softmax"),
)


@contextlib.contextmanager
def compiling_for(capability: int) -> Iterator[list[CompiledKernel]]:
    """Launches inside compile their kernels for that GPU and stop; the list grows by the binary of each launch.

    No GPU is needed, and tensors may be on the CPU. A pointer counts as aligned as the tensor's memory is.
    """
    binaries: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binaries.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with (
        _fresh_caches(),
        mock.patch.object(driver, "_active", _AbsentGPU(capability)),
        mock.patch.object(JITFunction, "run", compile_only),
        _device(DEVICES[capability]),
    ):
        yield binaries


@contextlib.contextmanager
def running_ptx_of(capability: int) -> Iterator[None]:
    """Launches inside run the PTX that Triton generates for an older architecture than this GPU's own.

    PTX is forward compatible, so the instructions, their order and the tiles are those of that architecture. How its
    tensor cores round within one instruction cannot be seen here.
    """
    load = CompiledKernel._init_handles
    multiprocessors = torch.cuda.get_device_properties().multi_processor_count
    device = DEVICES[capability]._replace(multiprocessors=multiprocessors)

    def load_ptx(self: CompiledKernel) -> None:
        self.kernel = self.asm["ptx"].encode()
        load(self)

    with (
        _fresh_caches(),
        mock.patch.object(driver.active, "get_current_target", lambda: GPUTarget("cuda", capability, 32)),
        mock.patch.object(CompiledKernel, "_init_handles", load_ptx),
        _device(device),
    ):
        yield


class _AbsentGPU:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _fresh_caches() -> Iterator[None]:
    """Triton keeps binaries by device and not by target: none may outlive the change of targets, in either direction."""
    _forget_binaries()
    try:
        yield
    finally:
        _forget_binaries()


def _forget_binaries() -> None:
    plans.forget_plans()
    for kernel in kernels():
        kernel.device_caches.clear()


@contextlib.contextmanager
def _device(device: tiles.Device) -> Iterator[None]:
    """What the launchers read off their GPU."""
    modules = [module for module in _modules() if hasattr(module, "device_of")]
    with contextlib.ExitStack() as stack:
        for module in (tiles, *modules):
            stack.enter_context(mock.patch.object(module, "device_of", lambda _: device))
        yield


def _modules() -> list[ModuleType]:
    return [importlib.import_module(f"pytest_batchinv.kernels.cuda.{name}") for name in _MODULES]


def kernels() -> list[JITFunction]:
    """Every kernel that a launcher launches."""
    return [
        value
        for module in _modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.__module__ == module.__name__
    ]
