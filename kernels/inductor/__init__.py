"""The compile installer: the table in every graph that Inductor compiles, and the rules that keep its pointwise code exact.

The rules (``patches/inductor_config.py`` gives the reasons) and the cache key are held for the length of one compilation, in
whichever thread that happens. The table goes in where Inductor looks its decompositions up.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._ops import OpOverload

from pytest_batchinv.kernels import table
from pytest_batchinv.kernels.aten.common import as_floats
from pytest_batchinv.kernels.inductor.guard import LeftoverError
from pytest_batchinv.kernels.inductor.passes import passes
from pytest_batchinv.kernels.operators import operators
from pytest_batchinv.kernels.overloads import is_exact, overload_of, refusal
from pytest_batchinv.patches import inductor_config
from pytest_batchinv.patches.compilation import around_compilation
from pytest_batchinv.patches.registry import torch_version

__all__ = ["LeftoverError", "decompositions", "installed"]

Decomposition = Callable[..., Any]


@contextlib.contextmanager
def installed(fingerprint: Callable[[], str]) -> Iterator[None]:
    """Every compilation inside, by any thread, gets the table, the rules and a cache key of its own.

    fingerprint: asked for at each compilation, since patches may have come or gone. Raises SettingError.
    """
    from torch._inductor import compile_fx as module

    inductor_config.check(torch_version())
    stock_table = module.select_decomp_table
    with around_compilation(lambda: _in_the_mode(fingerprint())), _without_early_decompositions():
        module.select_decomp_table = decompositions
        torch._dynamo.reset()
        try:
            yield
        finally:
            if module.select_decomp_table is decompositions:
                module.select_decomp_table = stock_table
            torch._dynamo.reset()


def decompositions() -> dict[OpOverload, Decomposition]:
    """Inductor's decompositions with the table's entries in front. A plain function, as it becomes part of a cache key."""
    from torch._inductor.decomposition import select_decomp_table

    return {**select_decomp_table(), **_table()}


@contextlib.contextmanager
def _without_early_decompositions() -> Iterator[None]:
    """``AS_IN_EAGER_CODE`` without what torch registers in Python for autograd's keys, which runs before a table is asked."""
    taken = []
    for overload in filter(None, map(overload_of, table.AS_IN_EAGER_CODE)):
        for key in (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd):
            if key in overload.py_kernels:
                taken.append((overload, key, overload.py_kernels.pop(key)))
        overload._dispatch_cache.clear()
    try:
        yield
    finally:
        for overload, key, kernel in taken:
            overload.py_kernels[key] = kernel
            overload._dispatch_cache.clear()


@functools.cache
def _table() -> dict[OpOverload, Decomposition]:
    from torch._inductor.decomposition import select_decomp_table

    stock = dict(select_decomp_table())
    devices = {
        **dict.fromkeys((*table.POINTWISE, *table.WHOLE_VECTORS), ("cpu",)),
        **table.AS_IN_EAGER_CODE,
    }
    pointwise = {overload_of(name): where for name, where in devices.items()}
    entries = {
        overload: _on_some(pointwise[overload], overload, operator, stock.get(overload))
        if overload in pointwise
        else _replacement(overload, operator)
        for overload, operator in operators().items()
    }
    for name, reason in table.REFUSED.items():
        overload = overload_of(name)
        if overload is not None:
            entries[overload] = _refusal_of_floats(overload, reason)
    return entries


def _replacement(overload: OpOverload, operator: OpOverload) -> Decomposition:
    def decompose(*args: Any, **kwargs: Any) -> Any:
        return NotImplemented if is_exact(overload, args, kwargs) else operator(*args, **kwargs)

    return decompose


def _on_some(
    devices: tuple[str, ...], overload: OpOverload, operator: OpOverload, stock: Decomposition | None
) -> Decomposition:
    """The operator on these devices. Pointwise entries are the CPU's: on a GPU Inductor's code gives the bits of eager code."""
    if overload is torch.ops.aten.pow.Tensor_Scalar:
        stock = _pow

    name = overload.name().removeprefix("aten::")
    has_dtype_of_input = name in table.POINTWISE

    def is_ours(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if name in table.ONLY_WITH_A_FACTOR and kwargs.get("alpha", 1) == 1:
            return False
        if name in table.ONLY_OF_FLOATS and not any(x.is_floating_point() or x.is_complex() for x in tensors):
            return False
        device = tensors[0].device if tensors else torch.device(kwargs.get("device") or "cpu")
        return device.type in devices and not is_exact(overload, args, kwargs)

    def decompose(*args: Any, **kwargs: Any) -> Any:
        if not is_ours(args, kwargs):
            return NotImplemented if stock is None else stock(*args, **kwargs)
        if has_dtype_of_input:
            args = (as_floats(args[0]), *args[1:])
        return operator(*args, **kwargs)

    return decompose


def _refusal_of_floats(overload: OpOverload, reason: str) -> Decomposition:
    refuse = refusal(overload, reason)

    def decompose(*args: Any, **kwargs: Any) -> Any:
        return NotImplemented if is_exact(overload, args, kwargs) else refuse()

    return decompose


def _pow(self: torch.Tensor, exponent: float) -> Any:
    """Squares and cubes as eager CUDA computes them: by products, each rounded to the tensor's dtype.

    Inductor multiplies in float32 and rounds once, which is another value in bf16.
    """
    if self.is_floating_point() and exponent in (2, 3):
        square = self * self
        return square if exponent == 2 else square * self
    return NotImplemented


@contextlib.contextmanager
def _in_the_mode(fingerprint: str) -> Iterator[None]:
    """What holds for the length of one compilation: the rules, the last passes, and the cache key."""
    config, compiler_config = torch._inductor.config, torch.compiler.config
    last = passes(config.post_grad_custom_post_pass, fingerprint)
    # Without the tag a warm cache silently gives the graph of the other mode: decompositions are not in its key.
    tag = compiler_config.cache_key_tag
    tag = tag if fingerprint in tag else f"{tag};batchinv-{fingerprint}"
    with (
        inductor_config.in_force(torch_version()),
        config.patch(post_grad_custom_post_pass=last),
        compiler_config.patch(cache_key_tag=tag),
    ):
        yield
