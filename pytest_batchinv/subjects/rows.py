"""The subject for functions and modules: its rows are indices into a pool, along one dimension of every input."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pytest_batchinv.compare import as_bits, refuse_uncomparable
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.base import NoGradients, NotRun, Observer, RowOutputs, Space, Span, Subject, SubjectInfo, observed
from pytest_batchinv.subjects.compiled import compiled, compiling, eager_of, origin_of, short_dtype
from pytest_batchinv.subjects.gradients import GradientsOfRows, float_tensors, no_gradient

POOL_DIGITS = 12
_PLAIN = (str, bytes, int, float, complex, bool, type(None))

Arguments = list[Any] | dict[str, Any]
"""Of a call: by position, or by name."""


class RowsSubject(Subject):
    """A function of rows over a pool of them.

    inputs: tensors whose ``batch_dim`` indexes the pool, given to fn side by side; with ``collate`` lists of the pool's
    rows, which may be of any kind and of unequal lengths: tensors, arrays of numpy, strings, lists, dicts.
    ``collate(chosen_list, ...)`` makes the arguments of fn of them: a mapping (what a tokenizer gives) goes to fn by name, a
    tuple by position, anything else is the one argument. It is called once for each row alone, too: rows are alike where that
    gives tensors of the same shapes. fn returns a tensor, or a tuple, list or mapping
    of tensors (a ModelOutput of transformers is one), row i of each along ``batch_dim`` belonging to row i of the batch; a
    nested tensor, or with ``collate`` a list, has an entry for each row. Raises ValueError for inputs that are no pool.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Any],
        batch_dim: int = 0,
        *,
        name: str = "",
        compile_mode: str | None = None,
        collate: Callable[..., Any] | None = None,
    ) -> None:
        if not callable(fn):
            raise ValueError(f"what is tested is a function or a module, which is called with the rows; it is {_kind(fn)}")
        self.fn, self.inputs, self.batch_dim, self.collate = fn, tuple(inputs), batch_dim, collate
        plain = eager_of(fn)
        self._eager = plain
        self.origin = origin_of(plain)
        mode = compile_mode or ("compiled" if plain is not fn else "eager")
        self._run = fn if compile_mode is None else compiled(plain, compile_mode)
        alone: list[Arguments] = []
        if collate is None:
            lengths: tuple[int, ...] = _pool_of_tensors(self.inputs, batch_dim)
        else:
            alone = [_arguments(collate(*([pool[i]] for pool in self.inputs))) for i in range(_pool_of_lists(self.inputs))]
            lengths = tuple(_length(row, batch) for row, batch in zip(self.inputs[0], alone, strict=True))
        sample = _first_tensor([self.inputs, alone[:1]])
        self.info = SubjectInfo(
            name=name or _name(plain),
            kind="module" if isinstance(plain, nn.Module) else "function",
            device=sample.device.type if sample is not None else "cpu",
            dtype=short_dtype(sample.dtype) if sample is not None else "",
            compile_mode=mode,
        )
        self.space = Space(
            palette=tuple(Row(i) for i in range(len(lengths))), pool=lengths, alike=tuple(_shapes(batch) for batch in alone)
        )

    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """fn on these rows of the pool, in this order (repeats allowed): what belongs to each row, copied."""
        batch = self._batch([row.id for row in case.rows])
        with compiling(self.info.compile_mode, self.origin), observed(observer):
            result = self._called(batch)
        return self._rows(result, len(case))

    def spans(self, case: BatchShape) -> list[Span]:
        """Each row is a sequence of its own, as long as its entry in the pool."""
        assert self.space.pool is not None
        return [Span(position, 0, self.space.pool[row.id]) for position, row in enumerate(case.rows)]

    def in_eager_mode(self) -> RowsSubject:
        """The function that was compiled, where it is known; itself otherwise."""
        if self._run is self._eager:
            return self
        return RowsSubject(self._eager, self.inputs, self.batch_dim, name=self.info.name, collate=self.collate)

    def in_compile_mode(self, compile_mode: str) -> RowsSubject:
        """The function compiled anew in this mode. Raises ValueError."""
        return RowsSubject(
            self._eager, self.inputs, self.batch_dim, name=self.info.name, compile_mode=compile_mode, collate=self.collate
        )

    def with_gradients(self) -> GradientsOfRows:
        if why := no_gradient(self.inputs):
            raise NoGradients(why)
        if self.collate is not None and not any(float_tensors(pool) for pool in self.inputs):
            raise NoGradients("no row is itself a tensor of floats, so there is no gradient of a row")
        return GradientsOfRows(self)

    def _called(self, batch: Arguments) -> Any:
        return self._run(**batch) if isinstance(batch, dict) else self._run(*batch)

    def batch_with_leaves(self, row_ids: list[int]) -> tuple[Arguments, dict[str, list[Tensor]]]:
        """The arguments of fn, and by input the leaves they are made of: one for all rows, or with ``collate`` one a row."""
        leaves: dict[str, list[Tensor]] = {}

        def with_leaf(name: str, x: Any) -> Any:
            if not float_tensors([x]):
                return x
            leaf = x.detach().clone().requires_grad_()
            leaves.setdefault(name, []).append(leaf)
            # Eager code may write to a copy. Dynamo warns of an input that is no leaf.
            return leaf.clone() if self._run is self._eager else leaf

        names = ["the gradient" if len(self.inputs) == 1 else f"the gradient of input {i}" for i in range(len(self.inputs))]
        if self.collate is None:
            batch = self._chosen(row_ids)
            return [with_leaf(name, x) for name, x in zip(names, batch, strict=True)], leaves
        chosen = [[with_leaf(name, pool[i]) for i in row_ids] for name, pool in zip(names, self.inputs, strict=True)]
        return _arguments(self.collate(*chosen)), leaves

    def outputs(self, batch: Arguments, n_rows: int) -> list[tuple[Tensor, int | None]]:
        """What fn returns for these arguments: tensors, and along which dim their rows lie; None for one of a single row."""
        result = self._called(batch)
        if self.collate is not None and isinstance(result, list):
            return [(tensor, None) for entry in result for _, tensor in _named_tensors(entry)]
        named = _named_tensors(result)
        for name, tensor in named:
            if tensor.is_nested:
                raise NotRun(f"{name} of {self.info.name} is a nested tensor, whose gradients are not asked for")
            self._check_output(name, tensor, n_rows)
        return [(tensor, self.batch_dim) for _, tensor in named]

    def rows_of_gradients(
        self, leaves: dict[str, list[Tensor]], grads: Iterator[Tensor], shared: dict[str, Tensor]
    ) -> RowOutputs:
        """The gradients of these leaves, which come in the order of the leaves, by row."""
        by_input = {name: [next(grads) for _ in rows] for name, rows in leaves.items()}
        if self.collate is None:
            stacked = {name: g.movedim(self.batch_dim, 0).contiguous() for name, (g,) in by_input.items()}
            return RowOutputs(stacked, shared=shared)
        n_rows = len(next(iter(by_input.values())))
        return RowOutputs(rows=[{name: g[i] for name, g in by_input.items()} for i in range(n_rows)], shared=shared)

    def digest(self) -> str:
        """Of all that the pool holds: the bytes of tensors and arrays, and the text of what else there is."""
        digest = hashlib.sha256()
        for x in torch.utils._pytree.tree_leaves(self.inputs):
            if isinstance(x, Tensor):
                digest.update(f"{x.dtype}{list(x.shape)}".encode())
                digest.update(as_bits(x.detach().cpu()).numpy().tobytes())
            elif _is_array(x):
                digest.update(f"{x.dtype}{list(x.shape)}".encode() + x.tobytes())
            else:
                digest.update(f"{type(x).__name__}{x!r}".encode() if isinstance(x, _PLAIN) else type(x).__name__.encode())
        return digest.hexdigest()[:POOL_DIGITS]

    def _batch(self, row_ids: list[int]) -> Arguments:
        if self.collate is not None:
            return _arguments(self.collate(*([pool[i] for i in row_ids] for pool in self.inputs)))
        return self._chosen(row_ids)

    def _chosen(self, row_ids: list[int]) -> list[Tensor]:
        ids = torch.tensor(row_ids)
        return [x.index_select(self.batch_dim, ids.to(x.device)) for x in self.inputs]

    def _rows(self, result: Any, n_rows: int) -> RowOutputs:
        if self.collate is not None and isinstance(result, list):
            return self._listed(result, n_rows)
        stacked, by_row = {}, {}
        for name, tensor in _named_tensors(result):
            refuse_uncomparable(name, tensor)
            if tensor.is_nested:
                by_row[name] = self._of_nested(name, tensor, n_rows)
                continue
            self._check_output(name, tensor, n_rows)
            # A copy: a CUDA graph, or a function with a buffer of its own, writes the next result to the same memory.
            stacked[name] = tensor.detach().movedim(self.batch_dim, 0).clone(memory_format=torch.contiguous_format)
        if not by_row:
            return RowOutputs(stacked)
        every = by_row | {name: list(tensor) for name, tensor in stacked.items()}
        return RowOutputs(rows=[{name: rows[i] for name, rows in every.items()} for i in range(n_rows)])

    def _listed(self, result: list[Any], n_rows: int) -> RowOutputs:
        if len(result) != n_rows:
            raise ValueError(
                f"{self.info.name} returned a list of {len(result)} for a batch of {n_rows} rows: with collate= a list has "
                f"an entry for each row"
            )
        rows = [{name: t.detach().clone() for name, t in _named_tensors(entry)} for entry in result]
        for name, tensor in rows[0].items():
            refuse_uncomparable(name, tensor)
        return RowOutputs(rows=rows)

    def _of_nested(self, name: str, tensor: Tensor, n_rows: int) -> list[Tensor]:
        rows = [row.detach().clone() for row in tensor.unbind()]
        if len(rows) != n_rows:
            raise ValueError(f"{name} of {self.info.name} holds {len(rows)} tensors for a batch of {n_rows} rows")
        return rows

    def _check_output(self, name: str, tensor: Tensor, n_rows: int) -> None:
        if _size(tensor, self.batch_dim) != n_rows:
            raise ValueError(
                f"{name} of {self.info.name} has the shape {list(tensor.shape)} for a batch of {n_rows} rows: its "
                f"dimension {self.batch_dim} must hold a row for each row of the input; return per-row results only, "
                f"or set batch_dim"
            )


def _arguments(collated: Any) -> Arguments:
    if isinstance(collated, Mapping):
        return dict(collated)
    return list(collated) if isinstance(collated, tuple) else [collated]


def _shapes(batch: Arguments) -> str:
    """Shapes and dtypes of the tensors that are made of one row."""
    return " ".join(f"{list(x.shape)} {x.dtype}" for x in _tensors_of(batch))


def _length(row: Any, batch: Arguments) -> int:
    """Of a tensor or array its own; of what else its tokens, which are the columns of the first matrix made of it."""
    if isinstance(row, Tensor) or _is_array(row):
        return len(row) if row.ndim else 1
    return next((x.shape[1] for x in _tensors_of(batch) if x.dim() > 1 and x.shape[1]), 1)


def _is_array(x: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, numpy.ndarray)


def _pool_of_tensors(inputs: Sequence[Any], batch_dim: int) -> tuple[int, ...]:
    """The length of each row: 1, for rows of one shape."""
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        kinds = ", ".join(type(x).__name__ for x in inputs) or "none"
        raise ValueError(
            f"the inputs are one or more tensors whose dimension {batch_dim} indexes the rows, not {kinds}; bind other "
            f"arguments with functools.partial, and give ragged rows as lists with collate="
        )
    sizes = [_size(x, batch_dim) for x in inputs]
    if len(set(sizes)) > 1 or not sizes[0]:
        shapes = ", ".join(str(list(x.shape)) for x in inputs)
        raise ValueError(
            f"all inputs need the same number of rows, at least 1, in dimension {batch_dim}; their shapes are {shapes}"
        )
    return (1,) * sizes[0]


def _pool_of_lists(inputs: Sequence[Any]) -> int:
    """How many rows there are."""
    sizes = {len(x) for x in inputs if isinstance(x, (list, tuple))}
    if not inputs or not all(isinstance(x, (list, tuple)) for x in inputs) or len(sizes) != 1 or 0 in sizes:
        raise ValueError("with collate= the inputs are one or more lists of rows, all of the same length, at least 1")
    return sizes.pop()


def _tensors_of(inputs: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(inputs) if isinstance(x, Tensor)]


def _first_tensor(inputs: Any) -> Tensor | None:
    tensors = _tensors_of(inputs)
    floats = [x for x in tensors if x.is_floating_point() or x.is_complex()]
    return (floats or tensors or [None])[0]


def _size(x: Tensor, dim: int) -> int | None:
    return x.shape[dim] if -x.ndim <= dim < x.ndim else None


def _name(fn: Callable[..., Any]) -> str:
    """torch's own functions are methods of a class that nobody imports them from."""
    name = getattr(fn, "__qualname__", None) or type(fn).__name__
    return name.replace("_VariableFunctionsClass.", "torch.")


def _named_tensors(result: Any) -> list[tuple[str, Tensor]]:
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
