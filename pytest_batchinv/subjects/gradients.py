"""What relation G asks for: a subject whose outputs are the gradients of its rows.

The loss of a batch is a sum over its rows, and each row's part of it a function of that row's outputs alone. So the gradient of
a row's input belongs to the row, in any batch; the gradients of weights belong to the batch as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import NotRun, Observer, RowOutputs, Space, Span, Subject, SubjectInfo, observed
from pytest_batchinv.subjects.compiled import compiling

if TYPE_CHECKING:
    from pytest_batchinv.subjects.rows import RowsSubject
    from pytest_batchinv.subjects.transformers import TransformersSubject


class GradientsOfRows(Subject):
    """The gradients of a function of rows: of each float input, row by row, and of a module's parameters."""

    def __init__(self, subject: RowsSubject) -> None:
        self.subject = subject
        self.info: SubjectInfo = subject.info
        self.space: Space = subject.space

    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """Raises NotRun where no output has a gradient."""
        subject = self.subject
        with torch.enable_grad():
            with _disable_current_modes():
                batch, leaves = subject.batch_with_leaves([row.id for row in case.rows])
                weights = trained(subject.fn)
            with compiling(self.info.compile_mode, subject.origin), observed(observer):
                outputs = [(t, dim) for t, dim in subject.outputs(batch, len(case)) if t.requires_grad]
                if not outputs:
                    raise NotRun(f"no output of {self.info.name} has a gradient")
                with _disable_current_modes():
                    cotangents = [cotangent(t, dim) for t, dim in outputs]
                inputs = [leaf for rows in leaves.values() for leaf in rows]
                grads = torch.autograd.grad(
                    [t for t, _ in outputs], [*inputs, *weights.values()], cotangents, allow_unused=True
                )
        whole = [torch.zeros_like(x) if g is None else g for x, g in zip([*inputs, *weights.values()], grads, strict=True)]
        shared = dict(zip(weights, whole[len(inputs) :], strict=True))
        return subject.rows_of_gradients(leaves, iter(whole), shared)

    def spans(self, case: BatchShape) -> list[Span]:
        return self.subject.spans(case)

    def in_eager_mode(self) -> GradientsOfRows:
        eager = self.subject.in_eager_mode()
        return self if eager is self.subject else GradientsOfRows(eager)

    def with_gradients(self) -> GradientsOfRows:
        return self

    def digest(self) -> str:
        return self.subject.digest()


class GradientsOfModel(Subject):
    """The gradients of a model: of the embeddings of each row's tokens, and of the weights."""

    def __init__(self, subject: TransformersSubject) -> None:
        self.subject = subject
        self.info: SubjectInfo = subject.info
        self.space: Space = subject.space

    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        return self.subject.run_with_gradients(case, observer)

    def spans(self, case: BatchShape) -> list[Span]:
        return self.subject.spans(case)

    def in_eager_mode(self) -> GradientsOfModel:
        eager = self.subject.in_eager_mode()
        return self if eager is self.subject else GradientsOfModel(eager)

    def with_gradients(self) -> GradientsOfModel:
        return self

    def digest(self) -> str:
        return self.subject.digest()


def trained(fn: Any) -> dict[str, Tensor]:
    """The parameters of a module that need a gradient, by words that name their gradients."""
    if not isinstance(fn, nn.Module):
        return {}
    return {f"the gradient of {name}": x for name, x in fn.named_parameters() if x.requires_grad}


def cotangent(output: Tensor, batch_dim: int | None) -> Tensor:
    """The gradient of the loss with respect to an output: the same numbers between -1 and 1 for each row.

    batch_dim: along which the rows lie; None for the output of one row.
    """
    row = [size for dim, size in enumerate(output.shape) if batch_dim is None or dim != batch_dim % output.dim()]
    index = torch.arange(torch.Size(row).numel(), dtype=torch.float64)
    values = (index * 0.6180339887498949).frac().mul(2).sub(1).view(row).to(output.device, output.dtype)
    if batch_dim is None:
        return values
    return values.unsqueeze(batch_dim % output.dim()).expand(output.shape).contiguous()


def float_tensors(tensors: Iterable[Any]) -> list[Tensor]:
    return [x for x in tensors if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]


def no_gradient(inputs: Sequence[Any]) -> str:
    """Why a function of these inputs has no gradients, as a sentence; empty where it may have."""
    leaves = torch.utils._pytree.tree_leaves(list(inputs))
    return "" if float_tensors(leaves) else "no input is a tensor of floats, so there is no gradient of a row"
