"""The eager installer: the table on torch's dispatcher, every overload, ``.out`` and in place too."""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import Any

import torch
from torch._ops import OpOverload

from pytest_batchinv.kernels import collectives, stock, table, vllm
from pytest_batchinv.kernels.aten.common import Refused
from pytest_batchinv.kernels.counters import count
from pytest_batchinv.kernels.operators import may_skip_dispatcher
from pytest_batchinv.kernels.overloads import (
    Implementation,
    Sibling,
    is_exact,
    only_moves_values,
    overload_of,
    refusal,
    siblings,
)
from pytest_batchinv.kernels.tracing import not_traced
from pytest_batchinv.patches.dispatcher import COMPOSITE, Holding, Registration, foreign

__tracebackhide__ = methodcaller("errisinstance", Refused)  # of a refusal pytest shows the user's frames alone

Kernel = Callable[..., Any]
Entry = tuple[OpOverload, str, Kernel]  # the overload, the dispatch key, and what is called there

_ALLOW_OVERRIDE = (
    {"allow_override": True} if "allow_override" in inspect.signature(torch.library.Library.impl).parameters else {}
)


_ONEDNN = "MkldnnCPU"  # tensors in oneDNN's own layout


@contextlib.contextmanager
def installed() -> Iterator[Holding]:
    """The table's entries hold aten's dispatcher entries inside, and whoever held them before holds them again after."""
    libraries: dict[str, torch.library.Library] = {}
    held = []
    try:
        with warnings.catch_warnings():
            # torch warns once a process that an entry is overridden, which is what we are here for.
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for overload, key, function in _entries():
                namespace = overload.namespace
                library = libraries[namespace] = libraries.get(namespace) or torch.library.Library(namespace, "IMPL")
                library.impl(overload, not_traced(function), key, with_keyset=True, **_ALLOW_OVERRIDE)
                held.append((overload.name(), key))
        yield Holding(held)
    finally:
        for library in libraries.values():
            library._destroy()


def entries_of_others() -> list[Registration]:
    """What other libraries, and torch's own Python kernels, hold of the table's entries, or in front of them."""
    return foreign((overload.name(), key) for overload, key, _ in _entries())


def _entries() -> Iterator[Entry]:
    for name, implementation in table.BACKEND_KERNELS.items():
        yield from _backend_entries(name, implementation, _devices())
    for name, implementation in (*table.POINTWISE.items(), *table.WHOLE_VECTORS.items()):
        yield from _backend_entries(name, implementation, ("CPU",))
    for name, implementation in table.OF_VLLM.items():
        overload = overload_of(name)
        if overload is not None:
            yield overload, "CPU", _of_vllm(overload, implementation)
    for name, reason in table.REFUSED.items():
        overload = overload_of(name)
        if overload is not None:
            yield from _backend_entries(name, refusal(overload, reason), (*_devices(), _ONEDNN))
    for name, implementation in table.COMPOSITES.items():
        overload = overload_of(name)
        if overload is not None:
            yield overload, COMPOSITE, _composite(overload, implementation)
    yield from collectives.entries()


def _devices() -> tuple[str, ...]:
    return ("CPU", "CUDA") if torch.backends.cuda.is_built() else ("CPU",)


def _backend_entries(name: str, implementation: Implementation, keys: tuple[str, ...]) -> Iterator[Entry]:
    overload = overload_of(name)
    if overload is None:
        return
    for key in keys:
        if not _has_backend_kernel(overload, key):
            continue
        yield overload, key, _functional(overload, key, implementation)
        for sibling in siblings(overload):
            if _has_backend_kernel(sibling.overload, key):
                yield sibling.overload, key, _writing(sibling, key, implementation, is_own=name in table.WHOLE_VECTORS)


def _has_backend_kernel(overload: OpOverload, key: str) -> bool:
    """Whether torch runs this overload below autograd on this device. A composite has no gradient of its own there."""
    name, has = overload.name(), torch._C._dispatch_has_kernel_for_dispatch_key
    if key == _ONEDNN:
        return has(name, key)
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key):
        return False  # what torch cannot do on this device, the mode does not offer
    return has(name, key) or not has(name, COMPOSITE)


def _functional(overload: OpOverload, key: str, implementation: Implementation) -> Kernel:
    name, stock_kernel = overload.name(), _stock(overload, key)

    def run(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        try:
            if is_exact(overload, args, kwargs):
                if only_moves_values(overload, args, kwargs):
                    count(name)
                return stock_kernel(keyset, *args, **kwargs)
            count(name)
            return implementation(*args, **kwargs)
        except Refused as refused:
            raise refused.with_traceback(None) from None

    return run


def _writing(sibling: Sibling, key: str, implementation: Implementation, is_own: bool) -> Kernel:
    """Computes the functional result, then writes it where the caller wants it, with torch's checks of dtype and size.

    is_own: the implementation calls torch's own kernel, and takes and gives whatever that does.
    """
    overload, out_names = sibling.overload, sibling.out_names
    name, stock_kernel = overload.name(), _stock(overload, key)
    short_name = name.removeprefix("aten::")
    names = [argument.name for argument in overload._schema.arguments if not argument.is_out]
    asked_by = "out_dtype" if "out_dtype" in names else "dtype"
    place = names.index(asked_by) if asked_by in names else len(names)
    gives_dtype, may_cast = short_name in table.OUT_GIVES_DTYPE, is_own or short_name in table.OUT_MAY_CAST

    def run(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        outs = [kwargs[out_name] for out_name in out_names] or [args[0]]
        arguments = {k: v for k, v in kwargs.items() if k not in out_names}
        if gives_dtype and len(args) <= place and arguments.get(asked_by) is None:
            arguments[asked_by] = outs[0].dtype
        elif gives_dtype and len(args) > place and args[place] is None:
            args = (*args[:place], outs[0].dtype, *args[place + 1 :])
        try:
            # An out of integers: torch's own kernel sums integers into it, or refuses it.
            is_of_floats = is_own or outs[0].is_floating_point() or outs[0].is_complex()
            if not is_of_floats or is_exact(overload, args, arguments):
                if only_moves_values(overload, args, kwargs):
                    count(name)
                return stock_kernel(keyset, *args, **kwargs)
            count(name)
            results = implementation(*args, **arguments)
        except Refused as refused:
            raise refused.with_traceback(None) from None
        for out, result in zip(outs, results if isinstance(results, tuple) else (results,), strict=True):
            _write(name, out, result, may_cast, may_resize=bool(out_names))
        return outs[0] if len(outs) == 1 else tuple(outs)

    return run


def _write(name: str, out: torch.Tensor, result: torch.Tensor, may_cast: bool, may_resize: bool) -> None:
    if out.dtype != result.dtype and not (may_cast and torch.can_cast(result.dtype, out.dtype)):
        raise RuntimeError(f"{name}: result type {result.dtype} can't be cast to the desired output type {out.dtype}")
    if out.device != result.device:
        raise RuntimeError(f"{name}: the result is on {result.device}, and cannot be written to {out.device}")
    if out.shape != result.shape:
        if not may_resize:
            raise RuntimeError(f"{name}: a result of shape {list(result.shape)} does not fit {list(out.shape)} in place")
        out.resize_(result.shape)
    out.copy_(result)


def _composite(overload: OpOverload, implementation: Implementation) -> Kernel:
    """The composite, or its plan where the dispatcher has nothing to do."""
    name = overload.name()
    planned = table.PLANNED.get(name.removeprefix("aten::"), implementation)

    def run(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        count(name)
        try:
            if may_skip_dispatcher(keyset, (*args, *kwargs.values())):
                return planned(*args, **kwargs)
            return implementation(*args, **kwargs)
        except Refused as refused:
            raise refused.with_traceback(None) from None

    return run


def _of_vllm(overload: OpOverload, implementation: Implementation) -> Kernel:
    """The implementation, which writes to what it is given; a refusal where vLLM's operator has other arguments by now."""
    name = overload.name()
    if not vllm.has_known_arguments(overload):
        known = f"{name}({vllm.SCHEMAS[name]}"
        implementation = refusal(overload, f"it is {overload._schema} here, and the kernel was written for {known}")

    def run(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        count(name)
        try:
            return implementation(*args, **kwargs)
        except Refused as refused:
            raise refused.with_traceback(None) from None

    return run


def _stock(overload: OpOverload, key: str) -> Kernel:
    """torch's own kernel, looked up before ours takes its place."""
    kernel = stock.remember(overload, key)
    if kernel is not None:
        return kernel

    def refuse(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        raise Refused(f"torch has no kernel of its own for {overload.name()} on {key}, so integers have none here.")

    return refuse
