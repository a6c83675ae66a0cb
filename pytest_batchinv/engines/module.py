"""The engine for any function or module: its rows are indices into a pool, along one dimension of every input."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]


class ModuleEngine:
    """A function of rows over a pool of them.

    inputs: tensors whose ``batch_dim`` indexes the pool, given to fn side by side. fn returns a tensor, or a tuple,
    list or mapping of tensors (a ModelOutput of transformers is one), row i of each belonging to row i of the inputs.
    """

    def __init__(self, fn: Callable[..., Any], inputs: Sequence[Tensor], batch_dim: int = 0) -> None:
        self.fn, self.inputs, self.batch_dim = fn, tuple(inputs), batch_dim
        self.pool = self._pool_size()
        self.device = self.inputs[0].device.type
        self.subject = getattr(fn, "__qualname__", None) or type(fn).__name__

    def outputs(self, row_ids: Sequence[int]) -> list[Outputs]:
        """fn on these rows of the pool, in this order (repeats allowed): what belongs to each row, copied."""
        ids = torch.tensor(row_ids, dtype=torch.long)
        batch = [x.index_select(self.batch_dim, ids.to(x.device)) for x in self.inputs]
        named = _tensors(self.fn(*batch))
        for name, tensor in named:
            self._check_output(name, tensor, len(row_ids))
        # Copies: a CUDA graph, or a function with a buffer of its own, writes the next result to the same memory.
        return [tuple(t.detach().select(self.batch_dim, i).clone() for _, t in named) for i in range(len(row_ids))]

    def _pool_size(self) -> int:
        if not self.inputs or not all(isinstance(x, Tensor) for x in self.inputs):
            kinds = ", ".join(type(x).__name__ for x in self.inputs) or "none"
            raise ValueError(
                f"the inputs are one or more tensors whose dimension {self.batch_dim} indexes the rows, not {kinds}; "
                f"bind other arguments with functools.partial"
            )
        sizes = [_size(x, self.batch_dim) for x in self.inputs]
        if len(set(sizes)) > 1 or not sizes[0]:
            shapes = ", ".join(str(list(x.shape)) for x in self.inputs)
            raise ValueError(
                f"all inputs need the same number of rows, at least 1, in dimension {self.batch_dim}; their shapes are {shapes}"
            )
        return sizes[0]

    def _check_output(self, name: str, tensor: Tensor, n_rows: int) -> None:
        if _size(tensor, self.batch_dim) != n_rows:
            raise ValueError(
                f"{name} of {self.subject} has the shape {list(tensor.shape)} for a batch of {n_rows} rows: its "
                f"dimension {self.batch_dim} must hold a row for each row of the input; return per-row results only, "
                f"or set batch_dim"
            )


def _size(x: Tensor, dim: int) -> int | None:
    return x.shape[dim] if -x.ndim <= dim < x.ndim else None


def _tensors(result: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a result, with words that name them. None is left out."""
    if isinstance(result, Tensor):
        return [("the output", result)]
    if isinstance(result, Mapping):
        items = [(f"output {key!r}", value) for key, value in result.items()]
    elif isinstance(result, (tuple, list)):
        items = [(f"output {number}", value) for number, value in enumerate(result)]
    else:
        raise ValueError(f"the function returns a tensor, or a tuple, list or mapping of tensors, not {_kind(result)}")
    named = [(name, value) for name, value in items if value is not None]
    for name, value in named:
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is {_kind(value)}, not a tensor; return the tensors alone")
    if not named:
        raise ValueError("the function returns no tensor, so there is nothing to compare")
    return named


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
