"""Products whose K may be divided over ranks: K is cut into a fixed number of leaves, and these are added in one tree.

A leaf is K / leaves terms. Each is a product of its own, by ``gemm`` in its order, kept in the accumulator's dtype; the tree
is that of ``tree_sum``. A rank of n has leaves / n of them that lie side by side, so where n and leaves are powers of two it
computes a whole branch, and the tree over the ranks (``collectives.py``) is the rest: 1, 2, 4 and 8 ranks add the same
numbers in the same order. Nothing is rounded before the root.
"""

from typing import Any

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten.common import FLOATS, Refused, kernel_set, shape_of
from pytest_batchinv.kernels.reference import accumulator_dtype

ROW_PARALLEL_SCHEMA = "row_parallel(Tensor x, Tensor weight, int leaves) -> Tensor"
GROUPED_PRODUCT_SCHEMA = "grouped_product(Tensor x, Tensor weight, Tensor offs, bool wide) -> Tensor"
TREE_SUM_SCHEMA = "tree_sum(Tensor parts) -> Tensor"


def row_parallel(x: Tensor, weight: Tensor, leaves: int) -> Tensor:
    """``x @ weight.T``, unrounded: [..., K] by [N, K] -> [..., N] in the accumulator's dtype.

    Raises Refused where leaves do not divide K.
    """
    _check("row_parallel", x, weight, leaves)
    wide = accumulator_dtype(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    a, b = rows.unflatten(-1, (leaves, -1)).transpose(0, 1), weight.unflatten(-1, (leaves, -1)).permute(1, 2, 0)
    parts = kernel_set(x).gemm(a, b, out_dtype=wide)
    return tree_sum(parts).view(*x.shape[:-1], weight.shape[0])


def row_parallel_fake(x: Tensor, weight: Tensor, leaves: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=accumulator_dtype(x.dtype))


def row_parallel_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def row_parallel_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """By the mode's own products, which no rank has a part of: N is whole on each."""
    x, weight = ctx.saved_tensors
    rows = grad.to(x.dtype).reshape(-1, grad.shape[-1])
    of_x = rows.mm(weight).view(x.shape) if ctx.needs_input_grad[0] else None
    of_weight = rows.t().mm(x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
    return of_x, of_weight, None


def grouped_product(x: Tensor, weight: Tensor, offs: Tensor, wide: bool) -> Tensor:
    """``x[t] @ weight[g].T`` for the rows of each group: [S, K] by [G, N, K] -> [S, N]. wide: unrounded."""
    _check("grouped_product", x, weight, 1)
    return kernel_set(x).grouped_gemm(x, weight.transpose(1, 2), offs, accumulator_dtype(x.dtype) if wide else x.dtype)


def grouped_product_fake(x: Tensor, weight: Tensor, offs: Tensor, wide: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=accumulator_dtype(x.dtype) if wide else x.dtype)


def tree_sum(parts: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """The sum over dim 0 of parts [n, ...], in the order of ``reference.tree_sum``. out_dtype: None is the accumulator's."""
    out_dtype = accumulator_dtype(parts.dtype) if out_dtype is None else out_dtype
    if len(parts) == 1:
        return parts[0].to(out_dtype, copy=True)
    return kernel_set(parts).tree_sum(parts.flatten(1), out_dtype).view(parts.shape[1:])


def tree_sum_fake(parts: Tensor) -> Tensor:
    return parts.new_empty(parts.shape[1:], dtype=accumulator_dtype(parts.dtype))


def _check(name: str, x: Tensor, weight: Tensor, leaves: int) -> None:
    if x.dtype not in FLOATS or x.dtype != weight.dtype or x.device != weight.device or x.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"{name}: expected rows and a weight of one float dtype, one device and one K, but got {shape_of(x)} in {x.dtype} "
            f"on {x.device} and {shape_of(weight)} in {weight.dtype} on {weight.device}"
        )
    if leaves < 1 or x.shape[-1] % leaves:
        raise Refused(f"{name}: K of {x.shape[-1]} cannot be cut into {leaves} equal leaves; take a number that divides it.")
