"""What the row kernels share: one order for every sum over a row, how a row is read, and the launch.

The order. A row is cut into chunks of 16384 columns (4096 where sums are float64). In a chunk of 16384, the upper half
is added to the lower half: column c + 8192 to column c. Then neighbours are added, column 2i + 1 to column 2i, until one
is left. The sums of the chunks are added ascending. All of it is a function of the column's index alone. Zeros after
the row's end change nothing, so a row that is shorter than a chunk takes the next power of two, and gets the same bits.

Two numbers have two orders of addition, and both give the same bits. So each level of the tree is a sum over an axis of
size 2, and no layout that Triton picks can change it. All else is elementwise, or a maximum. Therefore what widens a
load may be specialised here: strides, the number of columns, the alignment of pointers; and programs, warps and rows
may follow the number of rows. There are three strategies to read a row, all with the same bits:

* persistent: it fits into one chunk, and is read once, into the registers of one program.
* looped: one program reads its chunks one after the other, then, if the result is a row, once more from the L2 cache.
* split: few long rows would leave most of the GPU idle, so each chunk is a program: one kernel writes each chunk's
  statistics, the next merges them ascending.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from .. import tiles
from ..launch import Launch
from ..plans import Description
from ..tiles import accumulator, ceil_div


class RowTile(NamedTuple):
    """The columns that one program holds at a time, the rows where there are many, and its warps."""

    block: int
    rows: int
    num_warps: int


FOLDED_TO = tl.constexpr(8192)
"""Columns of a chunk after its upper half has been added to the lower one, if it is longer. Part of the order, too."""

CHUNK = {tl.float32: 16384, tl.float64: 4096}
"""Columns of a chunk, by the dtype of sums. It is part of the order of sums: other chunks, other bits."""

ROW_TILES = (
    RowTile(128, 16, 4),
    RowTile(256, 8, 4),
    RowTile(512, 8, 4),
    RowTile(1024, 4, 4),
    RowTile(2048, 2, 4),
    RowTile(4096, 1, 4),
    RowTile(8192, 1, 8),
    RowTile(16384, 1, 16),
)
"""For persistent rows: the first that covers the row. Only speed depends on this table, and on the four numbers below."""

LOOPED_WARPS = 32
SPLIT_WARPS = 16

MANY_ROWS = 1024
"""From this many rows on, a program takes several short ones."""

SPLIT_BELOW = 1.0
"""Long rows are split while there are fewer than this many for each multiprocessor."""

SPLIT_CHUNKS = 64
"""Rows of more chunks are not split where each chunk's program would merge the statistics of all of them again."""


# --- arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def divide(a, b, ACC: tl.constexpr):
    """a / b, rounded to nearest. Triton's ``/`` is an approximation in fp32, and its ``div_rn`` takes fp32 alone."""
    if ACC == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def square_root(a, ACC: tl.constexpr):
    """The square root, rounded to nearest, for the same reason as ``divide``."""
    if ACC == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def finite(largest):
    """The maximum to subtract before exp: 0 in place of an infinite one, as inf - inf is NaN."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit
def chunk_sum(x):
    """Sum of each row of x [ROWS, BLOCK], in the order of this file. Never -0: its sign would tell padded rows apart."""
    ROWS: tl.constexpr = x.shape[0]
    BLOCK: tl.constexpr = x.shape[1]
    FEW: tl.constexpr = 32 if BLOCK >= 8192 else 16
    for level in tl.static_range(16):
        if (BLOCK >> level) > FOLDED_TO:
            x = tl.sum(tl.reshape(x, [ROWS, 2, BLOCK >> (level + 1)]), 1)
        elif (BLOCK >> level) == FEW:
            # The same sum of two numbers. But ``split`` brings what is left of a row into one warp: one barrier, where
            # each of the last levels would have its own.
            even, odd = tl.split(tl.reshape(x, [ROWS, BLOCK >> (level + 1), 2]))
            x = even + odd
        elif (BLOCK >> level) > 1:
            x = tl.sum(tl.reshape(x, [ROWS, BLOCK >> (level + 1), 2]), 2)
    return tl.reshape(x, [ROWS]) + 0.0


# --- reading and writing rows ----------------------------------------------------------------------------------------


@triton.jit
def count_chunks(n_cols, BLOCK: tl.constexpr):
    """In 64 bits, as are all columns: a 32-bit column could pass 2^31 after the row's end."""
    return tl.cdiv(tl.full([], n_cols, tl.int64), BLOCK)


@triton.jit
def chunk_columns(chunk, BLOCK: tl.constexpr):
    return tl.full([], chunk, tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def load_block(row_ptrs, is_row, cols, n_cols, col_stride, other, EVICT: tl.constexpr):
    """[ROWS, BLOCK] columns of the rows at row_ptrs, ``other`` after the edges."""
    inside = is_row[:, None] & (cols < n_cols)[None, :]
    return tl.load(row_ptrs[:, None] + cols[None, :] * col_stride, mask=inside, other=other, eviction_policy=EVICT)


@triton.jit
def store_block(out_ptr, rows, is_row, cols, n_cols, y, STRATEGY: tl.constexpr):
    """y [ROWS, BLOCK] into a contiguous [n_rows, n_cols]; looped, it must not drive out of L2 what is still to be read."""
    EVICT: tl.constexpr = "evict_first" if STRATEGY == "looped" else ""
    inside = is_row[:, None] & (cols < n_cols)[None, :]
    ptrs = (out_ptr + rows * n_cols)[:, None] + cols[None, :]
    tl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=inside, eviction_policy=EVICT)


@triton.jit
def program_rows(n_rows, ROWS: tl.constexpr):
    """The rows of a program that handles whole rows, and which of them exist."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return rows, rows < n_rows


@triton.jit
def program_rows_and_chunks(n_rows, n_cols, STRATEGY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a program that writes rows, which of them exist, and its chunks, the last not included."""
    if STRATEGY == "split":
        n_chunks = count_chunks(n_cols, BLOCK)
        program = tl.program_id(0).to(tl.int64)
        rows = program // n_chunks + tl.arange(0, ROWS)
        return rows, rows < n_rows, program % n_chunks, program % n_chunks + 1
    else:
        rows, is_row = program_rows(n_rows, ROWS)
        if STRATEGY == "persistent":
            return rows, is_row, 0, 1
        else:
            return rows, is_row, 0, count_chunks(n_cols, BLOCK)


# --- statistics of a row: two numbers, first of each chunk, then merged ----------------------------------------------


@triton.jit
def padding(STATISTICS: tl.constexpr):
    """What is read after a row's end, and changes nothing."""
    return -float("inf") if STATISTICS == "exp" else 0.0


@triton.jit
def chunk_statistics(x, chunk, n_cols, STATISTICS: tl.constexpr, ACC: tl.constexpr):
    """Two numbers for each row of a chunk x [ROWS, BLOCK].

    ``sum``, ``abs``, ``square``: sum(x), sum(abs(x)), sum(x ** 2), and nothing else (the same again).
    ``exp``: max(x), NaN aside, and sum(exp(x - max(x))).
    ``moments``: sum(x), and sum((x - mean) ** 2) about the chunk's own mean.
    """
    if STATISTICS == "exp":
        largest = tl.max(x, 1)
        return largest, chunk_sum(tl.exp(x - finite(largest)[:, None]))
    elif STATISTICS == "moments":
        BLOCK: tl.constexpr = x.shape[1]
        total = chunk_sum(x)
        mean = divide(total, _count(chunk, n_cols, ACC, BLOCK), ACC)
        inside = chunk_columns(chunk, BLOCK) < n_cols
        centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
        return total, chunk_sum(centred * centred)
    else:
        if STATISTICS == "abs":
            x = tl.abs(x)
        elif STATISTICS == "square":
            x = x * x
        total = chunk_sum(x)
        return total, total


@triton.jit
def _count(chunk, n_cols, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a chunk's columns are inside the row."""
    return tl.minimum(n_cols - tl.full([], chunk, tl.int64) * BLOCK, BLOCK).to(ACC)


@triton.jit
def _merge(a, b, chunk_a, chunk_b, chunk, n_cols, STATISTICS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The statistics (a, b) of the columns before a chunk, and the chunk's own, as those of both together."""
    if STATISTICS == "exp":
        largest = tl.maximum(a, chunk_a)
        centre = finite(largest)
        return largest, b * tl.exp(a - centre) + chunk_b * tl.exp(chunk_a - centre)
    elif STATISTICS == "moments":
        # Chan, Golub, LeVeque 1979: squares about two means become squares about the common one.
        before = (tl.full([], chunk, tl.int64) * BLOCK).to(ACC)
        count = _count(chunk, n_cols, ACC, BLOCK)
        step = tl.where(chunk == 0, 0.0, divide(chunk_a, count, ACC) - divide(a, before, ACC))
        weight = divide(before * count, before + count, ACC)
        return a + chunk_a, b + chunk_b + step * step * weight
    else:
        return a + chunk_a, b + chunk_b


@triton.jit
def row_statistics(
    row_ptrs,
    rows,
    is_row,
    partials_ptr,
    n_cols,
    col_stride,
    STATISTICS: tl.constexpr,
    STRATEGY: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of whole rows: those of their chunks, merged ascending. Split, they are read from ``partials``."""
    if STRATEGY == "persistent":
        x = load_block(row_ptrs, is_row, chunk_columns(0, BLOCK), n_cols, col_stride, padding(STATISTICS), "")
        a, b = chunk_statistics(x.to(ACC), 0, n_cols, STATISTICS, ACC)
    else:
        n_chunks = count_chunks(n_cols, BLOCK)
        a = tl.full([row_ptrs.shape[0]], padding(STATISTICS), ACC)
        b = tl.zeros([row_ptrs.shape[0]], ACC)
        if STRATEGY == "split":
            for chunk in tl.range(0, n_chunks, loop_unroll_factor=4):
                ptrs = partials_ptr + (rows * n_chunks + chunk) * 2
                chunk_a = tl.load(ptrs, mask=is_row, other=0.0)
                chunk_b = tl.load(ptrs + 1, mask=is_row, other=0.0)
                a, b = _merge(a, b, chunk_a, chunk_b, chunk, n_cols, STATISTICS, ACC, BLOCK)
        else:
            other = padding(STATISTICS)
            x = load_block(row_ptrs, is_row, chunk_columns(0, BLOCK), n_cols, col_stride, other, "evict_last")
            for chunk in range(0, n_chunks):
                # In flight while this chunk is summed; nothing is read after the last chunk.
                cols = chunk_columns(chunk + 1, BLOCK)
                following = load_block(row_ptrs, is_row, cols, n_cols, col_stride, other, "evict_last")
                chunk_a, chunk_b = chunk_statistics(x.to(ACC), chunk, n_cols, STATISTICS, ACC)
                a, b = _merge(a, b, chunk_a, chunk_b, chunk, n_cols, STATISTICS, ACC, BLOCK)
                x = following
    return a, b


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["partials_ptr"])
def _row_partials_kernel(
    x_ptr,
    partials_ptr,
    n_rows,
    n_cols,
    x_row_stride,
    x_col_stride,
    STATISTICS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[row, chunk] = the statistics of this chunk of this row."""
    rows, is_row, chunk, _ = program_rows_and_chunks(n_rows, n_cols, "split", 1, BLOCK)
    cols = chunk_columns(chunk, BLOCK)
    row_ptrs = x_ptr + rows * x_row_stride
    x = load_block(row_ptrs, is_row, cols, n_cols, x_col_stride, padding(STATISTICS), "evict_last")
    a, b = chunk_statistics(x.to(ACC), chunk, n_cols, STATISTICS, ACC)
    ptrs = partials_ptr + (rows * count_chunks(n_cols, BLOCK) + chunk) * 2
    tl.store(ptrs, a, mask=is_row)
    tl.store(ptrs + 1, b, mask=is_row)


# --- sums over the rows ----------------------------------------------------------------------------------------------


NEIGHBOURS = tl.constexpr(32)
"""Neighbours that one program of ``_column_sums_kernel`` adds: five levels of the tree."""


@triton.jit
def _load_terms(x_ptr, term, cols, n_cols, stride, end, FOLD: tl.constexpr, ACC: tl.constexpr):
    """One term of each column: of x [n_terms, n_cols], and added to it the term FOLD behind, if there is any."""
    terms = term + tl.zeros(cols.shape, tl.int64)
    x = tl.load(x_ptr + terms * stride + cols, mask=(cols < n_cols) & (terms < end), other=0.0).to(ACC)
    if FOLD:
        terms += FOLD
        x = x + tl.load(x_ptr + terms * stride + cols, mask=(cols < n_cols) & (terms < end), other=0.0).to(ACC)
    return x


@triton.jit(do_not_specialize=["n_terms", "terms_of_chunk", "chunks", "blocks"], do_not_specialize_on_alignment=["out_ptr"])
def _column_sums_kernel(
    x_ptr,
    out_ptr,
    n_cols,
    stride,
    n_terms,
    terms_of_chunk,
    chunks,
    blocks,
    divisor: tl.float64,
    FOLD: tl.constexpr,
    LAST: tl.constexpr,
    MEAN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the rows of x [n_terms, n_cols]: the order of ``chunk_sum``, for sums whose terms lie ``stride`` apart.

    terms_of_chunk terms are a chunk. FOLD: the upper half of a chunk is first added to the lower half. A program adds 32
    neighbours of a chunk, level by level: out[chunk * blocks + block]. LAST: a chunk has no more than 32, and the chunks'
    sums are added ascending; MEAN: and divided by their number. A sum is never -0.
    """
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], ACC)
    first, last = tl.program_id(1) // blocks, tl.program_id(1) // blocks + 1
    block = tl.program_id(1) % blocks
    if LAST:
        first, last, block = 0, chunks, 0
    for chunk in range(first, last):
        begin = tl.full([], chunk, tl.int64) * terms_of_chunk
        end = tl.minimum(begin + terms_of_chunk, n_terms)
        if FOLD:
            stop = tl.minimum(end, begin + FOLD)
        else:
            stop = end
        term = begin + block * NEIGHBOURS
        level0 = total
        level1 = total
        level2 = total
        level3 = total
        level4 = total
        for i in tl.static_range(NEIGHBOURS):
            # What is behind the lower half is there already, as the upper half of another term.
            x = _load_terms(x_ptr, term + i, cols, n_cols, stride, end, FOLD, ACC)
            x = tl.where(term + i < stop, x, 0.0)
            if i % 2 == 0:
                level0 = x
            else:
                x = level0 + x
                if i // 2 % 2 == 0:
                    level1 = x
                else:
                    x = level1 + x
                    if i // 4 % 2 == 0:
                        level2 = x
                    else:
                        x = level2 + x
                        if i // 8 % 2 == 0:
                            level3 = x
                        else:
                            x = level3 + x
                            if i // 16 % 2 == 0:
                                level4 = x
                            else:
                                x = level4 + x
        total = total + (x + 0.0)
    if MEAN:
        total = divide(total, tl.full([], divisor, ACC), ACC)
    place = tl.program_id(1).to(tl.int64)
    tl.store(out_ptr + place * n_cols + cols, total.to(out_ptr.dtype.element_ty), mask=cols < n_cols)


class ColumnSums:
    """``_column_sums_kernel`` for the sums over rows of one size, level by level until one row is left.

    The bits are those of a row kernel's sums of the transposed matrix.
    """

    def __init__(self, x: Description, out_dtype: torch.dtype, mean: bool = False) -> None:
        """x: [n_terms, n_cols], its columns side by side."""
        acc = accumulator(torch.promote_types(x.dtype, out_dtype))
        (n_terms, n_cols), stride = x.shape, x.strides[0]
        self._dtype = torch.float64 if acc == tl.float64 else torch.float32
        chunk, folded = CHUNK[acc], FOLDED_TO.value
        fold = folded if chunk > folded and n_terms > folded else 0
        chunks, terms = max(1, ceil_div(n_terms, chunk)), chunk
        of_chunk = min(n_terms, fold or chunk)  # what is left of a chunk where it has been folded
        block = 256
        self._levels: list[tuple[Launch, tuple[int, int]]] = []
        while True:
            blocks = max(1, ceil_div(of_chunk, NEIGHBOURS.value))
            is_last = blocks == 1
            grid = ceil_div(n_cols, block), 1 if is_last else chunks * blocks, 1
            numbers = (n_cols, stride, n_terms, terms, chunks, blocks, float(x.shape[0]))
            arguments = (*numbers, fold, is_last, is_last and mean, acc, block)
            launch = Launch(_column_sums_kernel, grid, arguments, num_warps=1, enable_fp_fusion=False)
            self._levels.append((launch, (grid[1], n_cols)))
            if is_last:
                return
            n_terms, stride, terms, of_chunk, fold = chunks * blocks, n_cols, blocks, blocks, 0

    def __call__(self, x: Tensor, out: Tensor) -> None:
        for launch, shape in self._levels:
            sums = out if launch is self._levels[-1][0] else torch.empty(shape, dtype=self._dtype, device=out.device)
            launch(x, sums)
            x = sums


def lie_in_columns(x: Description) -> bool:
    """Whether the rows of x are the columns of a contiguous matrix, which a program for each row would read far apart."""
    return x.shape[0] >= 32 and x.strides[0] == 1 and x.strides[1] >= x.shape[0]


# --- launching -------------------------------------------------------------------------------------------------------


class RowKernel:
    """A kernel on the rows of x [n_rows, n_cols], preceded by ``_row_partials_kernel`` where rows are split.

    The kernel's parameters: x_ptr, partials_ptr, its other tensors, then n_rows, n_cols, x_row_stride, x_col_stride, numbers
    and constants, and STATISTICS, STRATEGY, ACC, ROWS, BLOCK. writes_rows: its results are rows, so split, each chunk has a
    program; else each row has one. asserts: the kernel's device-side assertions are compiled; Triton leaves them out otherwise.
    """

    def __init__(self, kernel: JITFunction, writes_rows: bool = False, asserts: bool = False) -> None:
        self._kernel, self._writes_rows, self._asserts = kernel, writes_rows, asserts

    def launch(
        self, x: Description, numbers: tuple[float, ...], constants: tuple[Any, ...], statistics: str, out_dtype: torch.dtype
    ) -> Callable[..., None]:
        """A callable (x, *tensors) for rows like these, of which there is one at least. It reads of x the address alone.

        Sums have the accumulator of the wider of x's dtype and out_dtype. A tensor may be None: the kernel neither reads nor
        writes it then. Who asks must ask again for tensors of other dtypes and alignment: a ``Launch`` keeps its binary.
        """
        acc = accumulator(torch.promote_types(x.dtype, out_dtype))
        n_rows, n_cols = x.shape
        tile, strategy = _tile_and_strategy(n_rows, n_cols, acc, self._writes_rows, x.device)
        arguments = (*x.shape, *x.strides, *numbers, *constants, statistics, strategy, acc, tile.rows, tile.block)
        if strategy != "split":
            launch = self._launch(ceil_div(n_rows, tile.rows), arguments, tile)
            return lambda x, *tensors: launch(x, None, *tensors)
        chunks = ceil_div(n_cols, tile.block)
        of_chunks = (*x.shape, *x.strides, statistics, acc, tile.block)
        return _SplitRows(
            ((n_rows, chunks, 2), torch.float64 if acc == tl.float64 else torch.float32),
            unfused(_row_partials_kernel, n_rows * chunks, of_chunks, tile.num_warps),
            self._launch(n_rows * chunks if self._writes_rows else n_rows, arguments, tile),
        )

    def _launch(self, programs: int, arguments: tuple[Any, ...], tile: RowTile) -> Launch:
        return unfused(self._kernel, programs, arguments, tile.num_warps, self._asserts)


class _SplitRows:
    """A row kernel for split rows of one size, and before it the kernel of their chunks' statistics."""

    def __init__(self, partials: tuple[tuple[int, ...], torch.dtype], chunks: Launch, rows: Launch) -> None:
        self._partials, self._chunks, self._rows = partials, chunks, rows

    def __call__(self, x: Tensor, *tensors: Tensor | None) -> None:
        shape, dtype = self._partials
        partials = torch.empty(shape, dtype=dtype, device=x.device)
        self._chunks(x, partials)
        self._rows(x, partials, *tensors)


def unfused(kernel: JITFunction, programs: int, arguments: tuple[Any, ...], num_warps: int, asserts: bool = False) -> Launch:
    """A launch with each product and each sum rounded on its own."""
    # debug compiles assertions, and would add those of integer overflow.
    options = {"debug": True, "sanitize_overflow": False} if asserts else {}
    return Launch(kernel, (programs, 1, 1), arguments, num_warps=num_warps, enable_fp_fusion=False, **options)


def _tile_and_strategy(n_rows: int, n_cols: int, acc: tl.dtype, writes_rows: bool, device: torch.device) -> tuple[RowTile, str]:
    """Which tile, and which of the three strategies. Only the chunk has a say in the bits."""
    chunk = CHUNK[acc]
    if n_cols > chunk:
        mergeable = not writes_rows or n_cols <= SPLIT_CHUNKS * chunk
        if mergeable and n_rows < SPLIT_BELOW * tiles.device_of(device).multiprocessors:
            return RowTile(chunk, 1, SPLIT_WARPS), "split"
        return RowTile(chunk, 1, LOOPED_WARPS), "looped"
    return covering_tile(n_rows, n_cols, acc), "persistent"


def covering_tile(n_rows: int, n_cols: int, acc: tl.dtype) -> RowTile:
    """The first of ROW_TILES that covers rows of up to 16384 columns, with one row a program where there are few."""
    block, rows, num_warps = next(tile for tile in ROW_TILES if tile.block >= n_cols)
    # A float64 takes two registers.
    return RowTile(block, rows if n_rows >= MANY_ROWS else 1, 2 * num_warps if acc == tl.float64 else num_warps)


def two_inputs_tile(n_rows: int, n_cols: int, acc: tl.dtype) -> tuple[RowTile, str]:
    """Which tile and strategy for kernels that hold two inputs of a row: twice the warps, as each takes as many registers."""
    if n_cols > CHUNK[acc]:
        return RowTile(CHUNK[acc], 1, LOOPED_WARPS), "looped"
    tile = covering_tile(n_rows, n_cols, acc)
    return tile._replace(num_warps=min(32, 2 * tile.num_warps if tile.block > 1024 else tile.num_warps)), "persistent"
