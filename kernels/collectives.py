"""Collectives that add: every sum over the ranks of a group is one fixed tree over their indices.

They are entries of torch's dispatcher, as the table is: ``torch.distributed``'s calls, ``_c10d_functional``'s operators and
their autograd variants, DTensor, DDP, FSDP and what Inductor makes of them all come to these operators, on gloo and NCCL.

The order: the tree of :func:`tree_sum` over rank 0, 1, 2, ... in the accumulator's dtype, rounded once. It follows no message
size, algorithm or channel. What travels is never added on its way:

=========  ===================================================================================================================
one shot   every rank gathers every part, and sums them all. (n - 1) * S bytes to each rank, one step.
two shots  an all-to-all gives each rank its chunk of every part; it sums that chunk; the sums are gathered. 2 * (n - 1) / n * S
           bytes to each rank, as in a ring, two steps.
=========  ===================================================================================================================

Both add the same numbers in the same order for every element, so which one serves a call changes no bit. Each rank of a group
has to be in the mode: a rank outside would wait in another collective.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from pytest_batchinv.kernels import stock
from pytest_batchinv.kernels.aten.common import FLOATS, Refused
from pytest_batchinv.kernels.aten.row_parallel import tree_sum
from pytest_batchinv.kernels.counters import count

Kernel = Callable[..., Any]

_SUM, _AVG, _PRODUCT, _MIN, _MAX, _PREMUL_SUM = 0, 1, 2, 3, 4, 8  # ReduceOp.RedOpType, as ``op()`` of the boxed object gives it
_WORDS = {_PRODUCT: "PRODUCT", _PREMUL_SUM: "PREMUL_SUM"}

EXTRA_BYTES_FOR_TWO_SHOTS = 2 << 20
"""Bytes more that one shot may bring to a rank before a second step costs less: what NVLink carries in the time of a step."""

Group = Any
"""A boxed ``ProcessGroup``."""


def entries() -> Iterator[tuple[OpOverload, str, Kernel]]:
    """The overload, the dispatch key, and what is called there; none where torch is built without ``torch.distributed``."""
    if not torch.distributed.is_available():
        return
    keys = ("CPU", "CUDA") if torch.backends.cuda.is_built() else ("CPU",)
    for name, implementation in COLLECTIVES.items():
        overload = getattr(torch.ops.c10d, name).default
        for key in keys:
            yield overload, key, _entry(overload, key, implementation)
        for key in ("SparseCPU", "SparseCUDA"):
            if torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key):
                yield overload, key, _refuse_sparse(overload)


def _entry(overload: OpOverload, key: str, implementation: Kernel) -> Kernel:
    name, stock_kernel = overload.name(), stock.remember(overload, key)

    def run(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        call = _Call(overload, args, kwargs)
        try:
            if call.is_exact():
                return stock_kernel(keyset, *args, **kwargs)
            count(name)
            return implementation(call)
        except Refused as refused:
            raise refused.with_traceback(None) from None

    return run


def _refuse_sparse(overload: OpOverload) -> Kernel:
    def refuse(*_: Any, **__: Any) -> Any:
        raise Refused(f"batch-invariant mode has no {overload.name()} of sparse tensors; make them dense before.")

    return refuse


class _Call:
    """A call of a collective, with its arguments by name."""

    def __init__(self, overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [argument.name for argument in overload._schema.arguments]
        given = {argument.name: argument.default_value for argument in overload._schema.arguments}
        given |= dict(zip(names, args, strict=False)) | kwargs
        self.name = overload.name()
        self.given = given
        self.group: Group = given["process_group"]
        self.timeout: int = given["timeout"]
        unboxed = torch.distributed.ProcessGroup.unbox(self.group)
        self.rank, self.world_size = unboxed.rank(), unboxed.size()
        self.op: int = given["reduce_op"].op()

    def tensors(self) -> list[Tensor]:
        found = (self.given.get(name) for name in ("tensors", "input_tensor", "input_tensors", "inputs"))
        return torch.utils._pytree.tree_leaves([x for x in found if x is not None])

    def is_exact(self) -> bool:
        """Whether no order of the ranks can change a bit: torch's own kernel is called then."""
        is_of_floats = any(x.is_floating_point() or x.is_complex() for x in self.tensors())
        return self.world_size == 1 or not is_of_floats or self.op in (_MIN, _MAX)

    def check(self) -> None:
        """Raises Refused for what is no sum."""
        if self.op not in (_SUM, _AVG):
            raise Refused(
                f"batch-invariant mode adds over ranks (SUM, AVG) and takes MIN and MAX; {self.name} with "
                f"{_WORDS.get(self.op, f'the operation {self.op}')} of floats has no order of its own there."
            )
        for x in self.tensors():
            if x.dtype not in FLOATS and x.dtype not in (torch.complex64, torch.complex128):
                raise Refused(
                    f"batch-invariant mode sums {', '.join(map(str, FLOATS))} over ranks, not {x.dtype} ({self.name})."
                )

    def gather(self, part: Tensor) -> Tensor:
        """[n] of each rank -> [world_size, n]."""
        out = part.new_empty((self.world_size, part.numel()))
        _, work = torch.ops.c10d._allgather_base_.default(out.view(-1), part, self.group, False, self.timeout)
        _wait(work)
        return out

    def exchange(self, chunks: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """[world_size * n], n for each rank -> [world_size, n], that of each rank for this one. sizes: where they differ."""
        mine = chunks.numel() // self.world_size if sizes is None else sizes[self.rank]
        out = chunks.new_empty((self.world_size, mine))
        there, here = ([], []) if sizes is None else (list(sizes), [mine] * self.world_size)
        _wait(torch.ops.c10d.alltoall_base_.default(out.view(-1), chunks, self.group, here, there, False, self.timeout))
        return out

    def added(self, parts: Tensor) -> Tensor:
        """[world_size, n] -> [n], rounded once; an average is the sum divided by the number of ranks before that."""
        if self.op == _SUM:
            return tree_sum(parts, parts.dtype)
        return (tree_sum(parts) / self.world_size).to(parts.dtype)


def _wait(work: Any) -> None:
    """NCCL (torch 2.11) gives none for a call that is not asynchronous: it ran on the caller's stream."""
    unboxed = torch.distributed.Work.unbox(work)
    if unboxed is not None:
        unboxed.wait()


def _finished(result: Any) -> Any:
    """A boxed ``Work`` for what this stream computes: whoever waits for it on another one waits for that."""
    tensors = torch.utils._pytree.tree_leaves(result)
    devices = list(dict.fromkeys(x.device for x in tensors if x.is_cuda))
    future: torch.futures.Future[Any] = torch.futures.Future(devices=devices) if devices else torch.futures.Future()
    future.set_result(tensors)
    return torch.distributed.Work.boxed(torch._C._distributed_c10d._create_work_from_future(future))


def _real(x: Tensor) -> Tensor:
    """Flat and contiguous; complex numbers as pairs."""
    return (torch.view_as_real(x) if x.is_complex() else x).reshape(-1)


def _write(out: Tensor, result: Tensor) -> None:
    numbers = torch.view_as_real(out) if out.is_complex() else out
    numbers.copy_(result.view_as(numbers))


def takes_two_shots(world_size: int, nbytes: int) -> bool:
    """Whether an all-reduce of so many bytes takes less time in two steps. It changes no bit."""
    extra = nbytes * (world_size - 1) * (world_size - 2) // world_size
    return extra > EXTRA_BYTES_FOR_TWO_SHOTS


def _sum_everywhere(call: _Call, x: Tensor) -> Tensor:
    """The sum over the ranks of x, flat."""
    flat = _real(x)
    if not takes_two_shots(call.world_size, flat.nbytes):
        return call.added(call.gather(flat.contiguous()))
    behind = -flat.numel() % call.world_size
    chunk = call.added(call.exchange(torch.nn.functional.pad(flat, (0, behind))))
    return call.gather(chunk).view(-1)[: flat.numel()]


def all_reduce(call: _Call) -> Any:
    call.check()
    tensors = call.given["tensors"]
    for x in tensors:
        _write(x, _sum_everywhere(call, x))
    return tensors, _finished(tensors)


def all_reduce_coalesced(call: _Call) -> Any:
    return all_reduce(call)[1]


def reduce(call: _Call) -> Any:
    """As an all-reduce, of which the root alone keeps the sum."""
    call.check()
    for x in call.given["tensors"]:
        total = _sum_everywhere(call, x)
        if call.rank == call.given["root_rank"]:
            _write(x, total)
    return _finished(call.given["tensors"])


def _scattered(call: _Call, out: Tensor, source: Tensor) -> None:
    """source: the chunks of all ranks, one after another."""
    _write(out, call.added(call.exchange(_real(source).contiguous())))


def reduce_scatter_base(call: _Call) -> Any:
    call.check()
    out, source = call.given["output_tensor"], call.given["input_tensor"]
    if source.numel() != out.numel() * call.world_size:
        raise ValueError(f"reduce_scatter: {source.numel()} numbers are not {call.world_size} times {out.numel()}")
    _scattered(call, out, source)
    return out, _finished([out])


def reduce_scatter_coalesced(call: _Call) -> Any:
    call.check()
    for out, source in zip(call.given["outputs"], call.given["inputs"], strict=True):
        _scattered(call, out, source)
    return _finished(call.given["outputs"])


def reduce_scatter(call: _Call) -> Any:
    """Of lists: a tensor for each rank, whose sizes may differ."""
    call.check()
    outs = call.given["output_tensors"]
    for out, parts in zip(outs, call.given["input_tensors"], strict=True):
        flat = [_real(part) for part in parts]
        _write(out, call.added(call.exchange(torch.cat(flat), [part.numel() for part in flat])))
    return outs, _finished(outs)


COLLECTIVES: dict[str, Kernel] = {
    "allreduce_": all_reduce,
    "allreduce_coalesced_": all_reduce_coalesced,
    "reduce_": reduce,
    "_reduce_scatter_base_": reduce_scatter_base,
    "reduce_scatter_tensor_coalesced_": reduce_scatter_coalesced,
    "reduce_scatter_": reduce_scatter,
}
"""Operators of ``c10d`` that add over ranks. The others move values, and no order can change those."""
