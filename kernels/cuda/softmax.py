"""``row_softmax``: softmax and log_softmax of rows, and their gradient. ``row_logprobs``: log_softmax of chosen columns."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plans import Description, describe, on_device, plan
from ..tiles import accumulator, ceil_div
from .rows import (
    RowKernel,
    chunk_columns,
    chunk_statistics,
    chunk_sum,
    count_chunks,
    divide,
    finite,
    load_block,
    padding,
    program_rows,
    program_rows_and_chunks,
    row_statistics,
    store_block,
    two_inputs_tile,
    unfused,
)


@triton.jit
def _softmax(x, largest, total, LOG: tl.constexpr, ACC: tl.constexpr):
    """exp(x - max) * (1 / sum), or x - max - log(sum), for x [ROWS, BLOCK]. NaN where max is infinite, as in torch."""
    total = tl.where(tl.abs(largest) == float("inf"), float("nan"), total)
    x = x - finite(largest)[:, None]
    if LOG:
        return x - tl.log(total)[:, None]
    else:
        return tl.exp(x) * divide(1.0, total, ACC)[:, None]


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["partials_ptr"])
def _row_softmax_kernel(
    x_ptr,
    partials_ptr,
    out_ptr,
    n_rows,
    n_cols,
    x_row_stride,
    x_col_stride,
    LOG: tl.constexpr,
    STATISTICS: tl.constexpr,
    STRATEGY: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = exp(x - max) * (1 / sum(exp(x - max))), or x - max - log(sum(exp(x - max))), of each row.

    A chunk's sum is about its own maximum, in the order of ``rows.py``; chunks are merged ascending:
    sum = sum * exp(max - new max) + chunk's sum * exp(chunk's max - new max). Columns of -inf after the row's last
    value, and chunks of nothing else, add exact zeros and scale by exact ones. A row of nothing but -inf gives NaN.
    """
    rows, is_row, first, last = program_rows_and_chunks(n_rows, n_cols, STRATEGY, ROWS, BLOCK)
    row_ptrs = x_ptr + rows * x_row_stride
    if STRATEGY == "persistent":
        x = load_block(row_ptrs, is_row, chunk_columns(0, BLOCK), n_cols, x_col_stride, padding(STATISTICS), "").to(ACC)
        largest, total = chunk_statistics(x, 0, n_cols, STATISTICS, ACC)
    else:
        largest, total = row_statistics(
            row_ptrs, rows, is_row, partials_ptr, n_cols, x_col_stride, STATISTICS, STRATEGY, ACC, BLOCK
        )
    for done in range(0, last - first):
        cols = chunk_columns(last - 1 - done, BLOCK)  # descending: what was read last is still in the L2 cache
        if STRATEGY != "persistent":
            x = load_block(row_ptrs, is_row, cols, n_cols, x_col_stride, padding(STATISTICS), "evict_first").to(ACC)
        store_block(out_ptr, rows, is_row, cols, n_cols, _softmax(x, largest, total, LOG, ACC), STRATEGY)


_softmax_rows = RowKernel(_row_softmax_kernel, writes_rows=True)


def row_softmax(x: Tensor, log: bool, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_softmax`` on the GPU."""
    return plan_row_softmax(describe(x), log, out_dtype)(x)


@plan
def plan_row_softmax(
    x: Description, log: bool, out_dtype: torch.dtype, shape: tuple[int, ...] | None = None
) -> Callable[[Tensor], Tensor]:
    """``row_softmax`` of tensors at the address of rows like x. shape: of the result, if it is not x's."""
    shape = x.shape if shape is None else shape
    if 0 in x.shape:
        return lambda x: x.new_empty(shape, dtype=out_dtype)
    launch = _softmax_rows.launch(x, (), (bool(log),), "exp", out_dtype)

    def call(x: Tensor) -> Tensor:
        out = x.new_empty(shape, dtype=out_dtype)
        with on_device(x):
            launch(x, out)
        return out

    return call


@triton.jit
def _load_gradient(y_ptrs, grad_ptrs, is_row, cols, n_cols, y_stride, grad_stride, EVICT: tl.constexpr, ACC: tl.constexpr):
    y = load_block(y_ptrs, is_row, cols, n_cols, y_stride, 0.0, EVICT).to(ACC)
    return y, load_block(grad_ptrs, is_row, cols, n_cols, grad_stride, 0.0, EVICT).to(ACC)


@triton.jit(do_not_specialize=["n_rows"])
def _softmax_backward_kernel(
    y_ptr,
    grad_ptr,
    out_ptr,
    n_rows,
    n_cols,
    y_row_stride,
    y_col_stride,
    grad_row_stride,
    grad_col_stride,
    LOG: tl.constexpr,
    STRATEGY: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = (grad - sum(grad * y)) * y, or grad - exp(y) * sum(grad), of each row, for y = softmax(x) or log_softmax(x).

    The sum is that of ``rows.py``; every step is rounded on its own in ACC, and the result cast once. A row that fits into one
    chunk is read once; of a longer one, first what is summed, then all of it, the chunks descending.
    """
    rows, is_row, first, last = program_rows_and_chunks(n_rows, n_cols, STRATEGY, ROWS, BLOCK)
    y_ptrs = y_ptr + rows * y_row_stride
    grad_ptrs = grad_ptr + rows * grad_row_stride
    if STRATEGY == "persistent":
        y, grad = _load_gradient(
            y_ptrs, grad_ptrs, is_row, chunk_columns(0, BLOCK), n_cols, y_col_stride, grad_col_stride, "", ACC
        )
        total = chunk_sum(grad if LOG else grad * y)
    else:
        total = tl.zeros([ROWS], ACC)
        for chunk in range(0, count_chunks(n_cols, BLOCK)):
            cols = chunk_columns(chunk, BLOCK)
            grad = load_block(grad_ptrs, is_row, cols, n_cols, grad_col_stride, 0.0, "evict_last").to(ACC)
            if not LOG:
                grad = grad * load_block(y_ptrs, is_row, cols, n_cols, y_col_stride, 0.0, "evict_last").to(ACC)
            total = total + chunk_sum(grad)
    for done in range(0, last - first):
        cols = chunk_columns(last - 1 - done, BLOCK)
        if STRATEGY != "persistent":
            y, grad = _load_gradient(y_ptrs, grad_ptrs, is_row, cols, n_cols, y_col_stride, grad_col_stride, "evict_first", ACC)
        if LOG:
            out = grad - tl.exp(y) * total[:, None]
        else:
            out = (grad - total[:, None]) * y
        store_block(out_ptr, rows, is_row, cols, n_cols, out, STRATEGY)


def row_softmax_backward(grad: Tensor, y: Tensor, log: bool, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_softmax_backward`` on the GPU."""
    return plan_row_softmax_backward(describe(grad), describe(y), log, out_dtype)(grad, y)


@plan
def plan_row_softmax_backward(
    grad: Description, y: Description, log: bool, out_dtype: torch.dtype, shape: tuple[int, ...] | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """``row_softmax_backward`` of tensors at the addresses of rows like these. shape: of the result, if it is not y's."""
    shape = y.shape if shape is None else shape
    if 0 in y.shape:
        return lambda grad, y: y.new_empty(shape, dtype=out_dtype)
    acc = accumulator(torch.promote_types(y.dtype, out_dtype))
    tile, strategy = two_inputs_tile(*y.shape, acc)
    arguments = (*y.shape, *y.strides, *grad.strides, bool(log), strategy, acc, tile.rows, tile.block)
    launch = unfused(_softmax_backward_kernel, ceil_div(y.shape[0], tile.rows), arguments, tile.num_warps)

    def call(grad: Tensor, y: Tensor) -> Tensor:
        out = y.new_empty(shape, dtype=out_dtype)
        with on_device(y):
            launch(y, grad, out)
        return out

    return call


@triton.jit(
    do_not_specialize=["n_rows", "n_index", "index_row_stride", "index_col_stride"],
    do_not_specialize_on_alignment=["partials_ptr", "index_ptr", "out_ptr"],
)
def _row_logprobs_kernel(
    x_ptr,
    partials_ptr,
    index_ptr,
    out_ptr,
    n_rows,
    n_cols,
    x_row_stride,
    x_col_stride,
    n_index,
    index_row_stride,
    index_col_stride,
    INDEX_BLOCK: tl.constexpr,
    STATISTICS: tl.constexpr,
    STRATEGY: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[row, i] = log_softmax(x[row])[index[row, i]]: statistics and formula of ``_row_softmax_kernel``."""
    rows, is_row = program_rows(n_rows, ROWS)
    row_ptrs = x_ptr + rows * x_row_stride
    largest, total = row_statistics(
        row_ptrs, rows, is_row, partials_ptr, n_cols, x_col_stride, STATISTICS, STRATEGY, ACC, BLOCK
    )
    for block in range(0, tl.cdiv(n_index, INDEX_BLOCK)):
        places = block * INDEX_BLOCK + tl.arange(0, INDEX_BLOCK).to(tl.int64)
        wanted = is_row[:, None] & (places < n_index)[None, :]
        index_ptrs = (index_ptr + rows * index_row_stride)[:, None] + places[None, :] * index_col_stride
        cols = tl.load(index_ptrs, mask=wanted, other=0)
        exists = (cols >= 0) & (cols < n_cols)
        tl.device_assert(exists | (wanted == 0), "row_logprobs: an index is not a column of its row")
        x = tl.load(row_ptrs[:, None] + cols * x_col_stride, mask=wanted & exists, other=0.0).to(ACC)
        y = _softmax(x, largest, total, True, ACC).to(out_ptr.dtype.element_ty)
        tl.store((out_ptr + rows * n_index)[:, None] + places[None, :], y, mask=wanted)


_logprobs_of_rows = RowKernel(_row_logprobs_kernel, asserts=True)


def row_logprobs(x: Tensor, index: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``row_softmax(x, True, out_dtype).gather(1, index)``, bit for bit, without the [n_rows, n_cols] in between.

    x: [n_rows, n_cols]; index: int64 [n_rows, k], each in [0, n_cols) -> [n_rows, k]. An index out of range fails a
    device-side assertion, as in ``torch.gather``: the next synchronisation raises. Raises ValueError for another shape
    or dtype of index.
    """
    return plan_row_logprobs(describe(x), describe(index), out_dtype)(x, index)


@plan
def plan_row_logprobs(
    x: Description, index: Description, out_dtype: torch.dtype, shape: tuple[int, ...] | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """``row_logprobs`` of tensors at the addresses of rows like x and of such an index. shape: of the result."""
    if index.dtype != torch.int64 or len(index.shape) != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(
            f"index is {index.dtype} {list(index.shape)}; row_logprobs takes int64 [{x.shape[0]}, k]: "
            "the columns wanted of each row."
        )
    shape = index.shape if shape is None else shape
    if 0 in index.shape:
        return lambda x, index: x.new_empty(shape, dtype=out_dtype)
    launch = _logprobs_of_rows.launch(x, (index.shape[1], *index.strides), (16,), "exp", out_dtype)

    def call(x: Tensor, index: Tensor) -> Tensor:
        out = x.new_empty(shape, dtype=out_dtype)
        with on_device(x):
            launch(x, index, out)
        return out

    return call
