"""The ``batchinv`` operators: the table's entries as opaque operators for compiled code, and those that aten lacks."""

from collections.abc import Callable
from functools import cache
from operator import methodcaller
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd import forward_ad

from pytest_batchinv.kernels import sampling, table
from pytest_batchinv.kernels.aten import attention, norms, reductions, row_parallel, scaled, vectors
from pytest_batchinv.kernels.aten.common import Refused
from pytest_batchinv.kernels.counters import count
from pytest_batchinv.kernels.overloads import Implementation, overload_of
from pytest_batchinv.kernels.tracing import not_traced

__tracebackhide__ = methodcaller("errisinstance", Refused)

_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_KEYS, _KEY_SET = torch._C.DispatchKey, torch._C.DispatchKeySet
_DEVICE_ALONE = frozenset(
    keyset.raw_repr()
    for device, autograd in ((_KEYS.CPU, _KEYS.AutogradCPU), (_KEYS.CUDA, _KEYS.AutogradCUDA))
    for keyset in (_KEY_SET(device), _KEY_SET(device) | _KEY_SET(autograd))
)


@cache
def operators() -> dict[OpOverload, OpOverload]:
    """aten overload -> the ``batchinv`` operator of the same schema: opaque to Inductor, run by the same implementation.

    They are defined once a process and do nothing until a graph calls them.
    """
    library = torch.library.Library("batchinv", "FRAGMENT")
    try:
        made = _define_all(library)
    except BaseException:  # an interrupt too: the next call defines them again
        library._destroy()
        raise
    _keep_alive.append(library)
    return made


_keep_alive: list[torch.library.Library] = []


def _define_all(library: torch.library.Library) -> dict[OpOverload, OpOverload]:
    attend = _define_own(library, attention.ATTENTION_SCHEMA, attention.attention, attention.attention_fake)
    _differentiate(library, "attention", attend, attention.attention_setup_context, attention.attention_backward)
    _define_own(library, attention.BACKWARD_SCHEMA, attention.backward_kernel, attention.backward_fake)
    _define_own(library, reductions.MEAN_OF_SQUARES_SCHEMA, reductions.mean_of_squares, reductions.mean_of_squares_fake)
    _define_own(library, reductions.CHOSEN_LOGPROBS_SCHEMA, reductions.chosen_logprobs, reductions.chosen_logprobs_fake)
    _define_own(library, norms.NORM_BACKWARD_SCHEMA, norms.norm_backward, norms.norm_backward_fake)
    _define_own(library, sampling.MULTINOMIAL_SCHEMA, sampling.multinomial, sampling.rows_fake)
    _define_own(library, sampling.SAMPLE_SCHEMA, sampling.sample, sampling.rows_fake)
    product = _define_own(library, row_parallel.ROW_PARALLEL_SCHEMA, row_parallel.row_parallel, row_parallel.row_parallel_fake)
    _differentiate(
        library, "row_parallel", product, row_parallel.row_parallel_setup_context, row_parallel.row_parallel_backward
    )
    grouped = row_parallel.grouped_product, row_parallel.grouped_product_fake
    _define_own(library, row_parallel.GROUPED_PRODUCT_SCHEMA, *grouped)
    _define_own(library, row_parallel.TREE_SUM_SCHEMA, row_parallel.tree_sum, row_parallel.tree_sum_fake)
    made = {}
    for name, implementation in table.BACKEND_KERNELS.items():
        overload = overload_of(name)
        if overload is not None:
            made[overload] = _define(library, overload, implementation, scaled.FAKES.get(name) or _contiguous_fake(overload))
    for name, implementation in table.POINTWISE.items():
        overload = overload_of(name)
        if overload is not None:
            made[overload] = _define(library, overload, implementation, _like_the_input)
    for name, implementation in table.WHOLE_VECTORS.items():
        overload = overload_of(name)
        if overload is not None:
            made[overload] = _define(library, overload, implementation, vectors.fake(overload))
    for name in table.AS_IN_EAGER_CODE:
        overload = overload_of(name)
        if overload is not None:
            made[overload] = _define(library, overload, overload, overload)
    _differentiate(
        library,
        "_fused_rms_norm",
        _counted("batchinv::_fused_rms_norm", norms.fused_rms_norm),
        norms.rms_norm_setup_context,
        norms.rms_norm_backward,
        norms.rms_norm_jvp,
    )
    return made


def _define(
    library: torch.library.Library, overload: OpOverload, implementation: Implementation, fake: Implementation
) -> OpOverload:
    schema = str(overload._schema).split("::", 1)[1]
    name = overload.name().split("::", 1)[1]
    library.define(schema, tags=_TAGS)
    library.impl(name, _counted(f"batchinv::{name}", implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"batchinv::{name}", fake, lib=library)
    packet_name, _, overload_name = name.partition(".")
    return getattr(getattr(torch.ops.batchinv, packet_name), overload_name or "default")


def _define_own(
    library: torch.library.Library, schema: str, implementation: Implementation, fake: Implementation
) -> Implementation:
    """An operator that aten does not have. Returns its kernel."""
    name = schema.partition("(")[0]
    library.define(schema, tags=_TAGS)
    kernel = _counted(f"batchinv::{name}", implementation)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"batchinv::{name}", fake, lib=library)
    return kernel


def _differentiate(
    library: torch.library.Library,
    name: str,
    kernel: Implementation,
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
    jvp: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Gives ``batchinv::name`` a gradient as torch's own kernels have it: one node, of the level that autograd is at.

    So ``torch.func.grad`` works, and forward mode works or raises an error that says there is none. What
    ``torch.library.register_autograd`` makes refuses ``torch.func.grad``, drops tangents in forward mode, and costs more
    a call.
    """
    operator = getattr(torch.ops.batchinv, name).default
    defaults = tuple(argument.default_value for argument in operator._schema.arguments)

    class BatchInvariant(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        @not_traced
        def forward(ctx: Any, *args: Any) -> Any:
            setup_context(ctx, args[:-1], args[-1])
            return args[-1]

        @staticmethod
        @not_traced
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return *backward(ctx, *grads), None

    if jvp is not None:
        BatchInvariant.jvp = staticmethod(not_traced(lambda ctx, *tangents: jvp(ctx, *tangents[:-1])))

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        # Not in the node's forward, where gradients are off for the levels below, too.
        with torch._C._AutoDispatchBelowAutograd():
            if keyset.raw_repr() in _DEVICE_ALONE:  # the kernel is next
                out = kernel(*args)
            else:
                out = operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        if not _needs_gradient(args):
            return out
        with enable_single_level_autograd_function():
            return BatchInvariant.apply(*args, *defaults[len(args) :], out)  # the dispatcher leaves defaults out

    library.impl(name, not_traced(run), "Autograd", with_keyset=True)


def may_skip_dispatcher(keyset: torch._C.DispatchKeySet, args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher has nothing to do between this call and the kernel of its device.

    That is: no gradient is needed, and no mode, transform, wrapper or lazy bit takes part.
    """
    return keyset.raw_repr() in _DEVICE_ALONE and not _needs_gradient(args)


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    """Whether an argument needs a gradient, or forward mode is on, whose tangents are not looked for."""
    return forward_ad._current_level >= 0 or torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def _counted(name: str, implementation: Implementation) -> Implementation:
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            count(name)
            return implementation(*args, **kwargs)
        except Refused as refused:
            raise refused.with_traceback(None) from None

    return not_traced(run)


def _contiguous_fake(overload: OpOverload) -> Implementation:
    """aten's own fake, made contiguous: that is what every implementation returns."""

    def fake(*args: Any, **kwargs: Any) -> Any:
        out = overload(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return torch.empty(out.shape, dtype=out.dtype, device=out.device)
        return tuple(None if o is None else torch.empty(o.shape, dtype=o.dtype, device=o.device) for o in out)

    return fake


def _like_the_input(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty_like(self)
