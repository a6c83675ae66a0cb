"""Where compiled code leaves eager code: each pointwise operator alone, fed the inputs that the eager run gave it."""

import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_batchinv import check, records
from pytest_batchinv.check import BatchVarianceError
from pytest_batchinv.compare import first_difference
from pytest_batchinv.engines import Engine
from pytest_batchinv.records import Record
from pytest_batchinv.shapes import BatchShape, Row


def report_eager_against_compiled(engine: Engine) -> Record:
    """Relation X as a report: "equal", or "differs" with the operators whose compiled bits are not the eager ones.

    Emits the record and returns it; a difference raises nothing. For devices on which relation X is not promised.
    """
    started = time.perf_counter()
    try:
        with records.collecting(lambda record: None):
            record = check.check_engine(engine, relations=["X"])[0]
    except BatchVarianceError as error:
        record = Record(
            subject=engine.subject, relation="X", verdict="differs", engine=engine.name, device=engine.device,
            dtype=engine.dtype, attn=engine.attn, compile_mode=engine.compile_mode, machine=records.machine(),
        )  # fmt: skip
        record.difference = asdict(error.difference) | {"shape": error.shape.to_json(), "sizes": []}
        eager = engine.in_eager_mode()
        stopping = ops_that_stop(lambda: eager.logprobs(BatchShape((Row(0, 13), Row(1, 7)))))
        record.notes = [f"not promised on the {engine.device}; compiled alone, other bits than eager: {_list(stopping)}"]
        record.examples = 1
    record.seconds = time.perf_counter() - started
    records.emit(record)
    return record


def ops_that_stop(run: Callable[[], object]) -> list[str]:
    """Names of the pointwise overloads that ``run()`` calls whose compiled bits differ from their eager ones.

    All are compiled in one graph, each with inputs of its own, so that no difference is handed on to the next.
    """
    with _Recorder() as recorder:
        run()
    calls = list(recorder.calls.items())

    def replay(inputs: list[tuple[tuple, dict]]) -> list:
        return [overload(*args, **kwargs) for (overload, _), (args, kwargs) in zip(calls, inputs, strict=True)]

    inputs = [given for _, given in calls]
    eager = replay(inputs)
    torch._dynamo.reset()
    compiled = torch.compile(replay)(inputs)
    return sorted(
        overload.name()
        for (overload, _), expected, actual in zip(calls, eager, compiled, strict=True)
        if first_difference(expected, actual) is not None
    )


class _Recorder(TorchDispatchMode):
    """Keeps the first call of every pointwise overload on floats, with copies of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[OpOverload, tuple[tuple, dict]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.calls and _is_pointwise_on_floats(func, args):
            self.calls[func] = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        return func(*args, **kwargs)


def _is_pointwise_on_floats(overload: OpOverload, args: tuple) -> bool:
    floats = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return torch.Tag.pointwise in overload.tags and bool(floats) and not overload._schema.is_mutable


def _list(names: list[str]) -> str:
    return ", ".join(names) if names else "none alone (the difference comes with their fusion)"
