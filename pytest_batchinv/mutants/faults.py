"""Planted faults that must be caught and located: by which relation, at which operator, on which line.

Kernels are operators of their own, as those of other libraries are: a tracer sees one call and not what is inside. The line
that a trace must name ends in ``# planted``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]

N_ROWS, K, N = 48, 64, 24
LENGTH = 12


class Fault(NamedTuple):
    """make: a fresh function and its pool. relation: the first one that must catch it. op: what must be named, of compiled code
    as the kernel's own operator or as one in it.

    control_flow: the two sides call other operators, so that a line is named and no operator diverges by itself. is_located:
    False for what follows from what ran before the check, which a trace runs in another order.
    """

    name: str
    relation: str
    op: str
    make: Callable[[], tuple[Function, Tensor]]
    control_flow: bool = False
    is_located: bool = True
    compile_mode: str = "eager"

    @property
    def relations(self) -> tuple[str, ...]:
        """Those that are asked, in this order."""
        return ("R", "S", "I") if self.compile_mode == "eager" else ("I", "X")


FAULTS: list[Fault] = []


def _pool(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape))).mul(2).sub(1)


def _weight(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(99)).sub(0.5)


# --- kernels ---------------------------------------------------------------------------------------------------------


def _in_parts(x: Tensor, w: Tensor, parts: int) -> Tensor:
    """Row by row, so that stock torch's own variance is not in it: the sum over K in this many parts, one after the other."""
    products = x[:, :, None].double() * w[None].double()
    chunks = [part.sum(1).float() for part in products.chunk(parts, 1)]
    return torch.stack(chunks).cumsum(0)[-1] if parts > 1 else chunks[0]


def _kernel(name: str, relation: str = "I", is_located: bool = True) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Any]:
    """Plants a kernel [M, K] x [K, N] -> [M, N] between two layers whose bits do not depend on the batch."""

    def plant(fn: Callable[[Tensor, Tensor], Tensor]) -> Any:
        op = torch.library.custom_op(f"batchinv_mutants::{fn.__name__}", fn, mutates_args=())

        def make() -> tuple[Function, Tensor]:
            w = _weight(K, N)

            def layer(x: Tensor) -> Tensor:
                hidden = x * 0.5 + 0.25
                out = op(hidden, w)  # planted
                return out.abs() + 1.0

            return layer, _pool(N_ROWS, K)

        FAULTS.append(Fault(name, relation, f"batchinv_mutants::{fn.__name__}", make, is_located=is_located))
        return op

    return plant


@_kernel("split-K from 32 rows on")
def split_k(x: Tensor, w: Tensor) -> Tensor:
    return _in_parts(x, w, 4 if len(x) >= 32 else 1)


@_kernel("GEMV for one row")
def gemv(x: Tensor, w: Tensor) -> Tensor:
    return _in_parts(x, w, 8 if len(x) == 1 else 1)


@_kernel("another tile from 17 rows on")
def other_tile(x: Tensor, w: Tensor) -> Tensor:
    return _in_parts(x, w, 2 if len(x) > 16 else 1)


@_kernel("a reduction split by the number of elements")
def split_by_numel(x: Tensor, w: Tensor) -> Tensor:
    return _in_parts(x, w, 2 if x.numel() > 100 * K else 1)


@_kernel("specialised on multiples of 16 rows")
def multiple_of_16(x: Tensor, w: Tensor) -> Tensor:
    return _in_parts(x, w, 2 if len(x) % 16 == 0 else 1)


@_kernel("the tail of a tile")
def tile_tail(x: Tensor, w: Tensor) -> Tensor:
    whole = len(x) // 8 * 8
    return torch.cat([_in_parts(x[:whole], w, 1), _in_parts(x[whole:], w, 2)])


@_kernel("the last row of an odd batch")
def odd_tail(x: Tensor, w: Tensor) -> Tensor:
    out = _in_parts(x, w, 1)
    if len(x) % 2 and len(x) > 1:
        out[-1] = _in_parts(x[-1:], w, 2)[0]
    return out


@_kernel("TF32 from 64 rows on")
def tf32(x: Tensor, w: Tensor) -> Tensor:
    if len(x) >= 64:
        x = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return _in_parts(x, w, 1)


@_kernel("bf16 accumulation from 128 rows on")
def bf16_accumulator(x: Tensor, w: Tensor) -> Tensor:
    out = _in_parts(x, w, 1)
    return out.bfloat16().float() if len(x) >= 128 else out


@_kernel("an order of sums that follows the row's place")
def order_by_place(x: Tensor, w: Tensor) -> Tensor:
    out = _in_parts(x, w, 1)
    out[3::4] = _in_parts(x[3::4], w, 2)
    return out


@_kernel("a per-tensor scale", relation="S")
def per_tensor_scale(x: Tensor, w: Tensor) -> Tensor:
    scale = x.abs().amax() / 127
    return _in_parts((x / scale).round() * scale, w, 1)


@_kernel("the row before is added", relation="S")
def off_by_one(x: Tensor, w: Tensor) -> Tensor:
    return _in_parts(x + torch.cat([x[:1], x[:-1]]) * 1e-4, w, 1)


@_kernel("a NaN or an infinity of the batch reaches all rows", relation="S")
def leaks_through_zero(x: Tensor, w: Tensor) -> Tensor:
    return _in_parts(x, w, 1) + x.sum() * 1e-6


@_kernel("statistics of the batch", relation="S")
def batch_statistics(x: Tensor, w: Tensor) -> Tensor:
    return _in_parts(x - x.mean(0), w, 1)


def _atomics() -> Any:
    ticks = itertools.count()

    def atomics(x: Tensor, w: Tensor) -> Tensor:
        return _in_parts(x, w, 2 if next(ticks) % 2 else 1)

    return _kernel("atomics", "R")(atomics)


def _stale_cache() -> Any:
    seen: list[int] = []

    def stale_cache(x: Tensor, w: Tensor) -> Tensor:
        """Takes the launch that was chosen for the size before."""
        seen.append(len(x))
        return _in_parts(x, w, 2 if seen[-2:][0] > 1 else 1)

    return _kernel("a stale launch cache", "R", is_located=False)(stale_cache)


_atomics()
_stale_cache()


# --- pieces of models ------------------------------------------------------------------------------------------------


def _piece(name: str, op: str, relation: str = "I", control_flow: bool = False) -> Callable[[Callable[[], Any]], Any]:
    def plant(make: Callable[[], tuple[Function, Tensor]]) -> Any:
        FAULTS.append(Fault(name, relation, op, make, control_flow))
        return make

    return plant


def _sequences(x: Tensor) -> Tensor:
    return x.reshape(len(x), LENGTH, -1)


def _ulp(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, torch.inf))


@torch.library.custom_op("batchinv_mutants::mix", mutates_args=())
def mix(x: Tensor, visible: Tensor | None) -> Tensor:
    """Attention in miniature, [B, T, D] and [T, T] or None for causality: sums over what is visible, key by key."""
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if visible is None else visible
    out = torch.zeros_like(x)
    order = range(x.shape[1]) if visible is None else reversed(range(x.shape[1]))
    for key in order:
        out = out + torch.where(seen[:, key, None], x[:, key, None], 0.0)
    return out


@_piece("the mask is dropped at batch 1", "batchinv_mutants::mix")
def mask_dropped() -> tuple[Function, Tensor]:
    def attention(x: Tensor) -> Tensor:
        hidden = _sequences(x)
        visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() if len(x) > 1 else None
        return mix(hidden, visible).flatten(1)  # planted

    return attention, _pool(N_ROWS, LENGTH * 8)


@_piece("a branch on the number of rows", "", control_flow=True)
def branch_on_shape() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        y = x * 0.5
        if len(x) >= 20:
            y = y * 3.0 / 3.0  # planted
        return y + 1.0

    return piece, _pool(N_ROWS, K)


@_piece("a row takes its neighbour's place after a permutation", "aten::index_select", relation="S")
def wrong_row() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        order = torch.arange(len(x)).roll(1) if len(x) == 2 else torch.arange(len(x))
        return torch.index_select(x * 0.5, 0, order) + 1.0  # planted

    return piece, _pool(N_ROWS, K)


@_piece("a gather of the wrong row", "aten::index.Tensor", relation="S")
def wrong_gather() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        hidden = x * 0.5
        return hidden[torch.zeros(len(x), dtype=torch.long)] + hidden  # planted

    return piece, _pool(N_ROWS, K)


@_piece("normalised over the batch", "aten::mean.dim", relation="S")
def batch_mean() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)  # planted

    return piece, _pool(N_ROWS, K)


@_piece("a sum over the batch", "aten::sum.dim_IntList", relation="S")
def batch_sum() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        total = (x * 0.5).sum(0, keepdim=True)  # planted
        return x + total * 1e-3

    return piece, _pool(N_ROWS, K)


@_piece("cumulated over the batch", "aten::cumsum", relation="S")
def batch_cumsum() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        return torch.cumsum(x * 0.5, 0)  # planted

    return piece, _pool(N_ROWS, K)


@_piece("softmax over the rows", "aten::_softmax", relation="S")
def softmax_over_rows() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        return torch.softmax(x * 0.5, 0)  # planted

    return piece, _pool(N_ROWS, K)


@_piece("batch norm in training mode", "aten::native_batch_norm", relation="S")
def batch_norm() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        hidden = torch.stack([x, x * x], 2)  # a batch of one row has statistics, too
        return F.batch_norm(hidden, None, None, training=True)[:, :, 0]  # planted

    return piece, _pool(N_ROWS, K)


@_piece("the largest of the batch clips all", "aten::amax", relation="S")
def clipped() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        bound = (x * 0.5).amax()  # planted
        return x.minimum(bound)

    return piece, _pool(N_ROWS, K)


@torch.library.custom_op("batchinv_mutants::experts", mutates_args=())
def experts(x: Tensor, choice: Tensor) -> Tensor:
    """Each row by its expert; more than 32 tokens of one expert take another path."""
    out = torch.empty_like(x)
    for expert in range(4):
        chosen = choice == expert
        y = x[chosen] * (expert + 1)
        out[chosen] = _ulp(y) if int(chosen.sum()) > 8 else y
    return out


@_piece("the path of an expert follows its number of tokens", "batchinv_mutants::experts", relation="S")
def expert_path() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        choice = x[:, :4].argmax(1)
        return experts(x * 0.5, choice) + 1.0  # planted

    return piece, _pool(N_ROWS, K)


@torch.library.custom_op("batchinv_mutants::route", mutates_args=())
def route(scores: Tensor) -> Tensor:
    """The best expert of each row; ties go to another one in large batches."""
    flipped = len(scores) > 8
    best = scores.flip(1).argmax(1) if flipped else scores.argmax(1)
    return scores.shape[1] - 1 - best if flipped else best


@_piece("ties of the router", "batchinv_mutants::route")
def router_ties() -> tuple[Function, Tensor]:
    weights = _weight(4, K)

    def piece(x: Tensor) -> Tensor:
        scores = (x[:, :4] > 0).float()
        choice = route(scores)  # planted
        return x * weights[choice]

    return piece, _pool(N_ROWS, K)


@torch.library.custom_op("batchinv_mutants::recurrence", mutates_args=())
def recurrence(x: Tensor, chunk: int) -> Tensor:
    """[B, T, D] -> [B, T, D]: a running sum whose state is rounded at each chunk's end."""
    state, out = torch.zeros_like(x[:, 0]), []
    for step in range(x.shape[1]):
        state = state * 0.9 + x[:, step]
        if (step + 1) % chunk == 0:
            state = state.bfloat16().float()
        out.append(state)
    return torch.stack(out, 1)


@_piece("chunk boundaries follow the batch", "batchinv_mutants::recurrence")
def chunk_boundary() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        chunk = 4 if len(x) <= 6 else 3
        return recurrence(_sequences(x), chunk).flatten(1)  # planted

    return piece, _pool(N_ROWS, LENGTH * 8)


@torch.library.custom_op("batchinv_mutants::norm", mutates_args=())
def norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).double().mean(-1, keepdim=True) + eps).float()


@_piece("eps in another dtype", "batchinv_mutants::norm")
def eps_dtype() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        eps = 1e-5 if len(x) < 24 else float(torch.tensor(1e-5).bfloat16())
        return norm(x, eps) * 2.0  # planted

    return piece, _pool(N_ROWS, K)


@torch.library.custom_op("batchinv_mutants::merge_parts", mutates_args=())
def merge_parts(x: Tensor, parts: int) -> Tensor:
    """Sums over T of [B, T, D] in parts: split-KV."""
    return torch.stack([part.double().sum(1).float() for part in x.chunk(parts, 1)]).cumsum(0)[-1]


@_piece("split-KV by the batch", "batchinv_mutants::merge_parts")
def split_kv() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        return merge_parts(_sequences(x), max(1, 8 // len(x)))  # planted

    return piece, _pool(N_ROWS, LENGTH * 8)


@_piece("positions that follow the batch", "aten::arange.start")
def positions() -> tuple[Function, Tensor]:
    table = _weight(400, LENGTH)

    def piece(x: Tensor) -> Tensor:
        place = torch.arange(len(x) // 30, len(x) // 30 + 1)  # planted
        return x + table[place].repeat(1, 8)

    return piece, _pool(N_ROWS, LENGTH * 8)


@_piece("written in place for a few rows", "aten::mul_.Tensor")
def in_place() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        y = x * 0.5
        y[:2].mul_(1.0 + 1e-6 * (len(x) > 5))  # planted
        return y + 1.0

    return piece, _pool(N_ROWS, K)


@_piece("every second row", "aten::add_.Tensor")
def every_second() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        y = x * 0.5
        y[1::2].add_(1e-6)  # planted
        return y

    return piece, _pool(N_ROWS, K)


def _noisy() -> Any:
    ticks = itertools.count()

    def flaky(x: Tensor) -> Tensor:
        return _ulp(x) if next(ticks) % 3 == 2 else x.clone()

    op = torch.library.custom_op("batchinv_mutants::flaky", flaky, mutates_args=())

    @_piece("a flaky operator", "batchinv_mutants::flaky", relation="R")
    def make() -> tuple[Function, Tensor]:
        def piece(x: Tensor) -> Tensor:
            return op(x * 0.5) + 1.0  # planted

        return piece, _pool(N_ROWS, K)

    return make


_noisy()


@_piece("dropout left on", "aten::bernoulli_.float", relation="R")
def dropout() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        return F.dropout(x * 0.5, 0.1, training=True)  # planted

    return piece, _pool(N_ROWS, K)


@_piece("a pair of neighbours", "batchinv_mutants::pair", relation="S")
def pair_of_rows() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        return pair(x * 0.5) + 1.0  # planted

    return piece, _pool(N_ROWS, K)


@torch.library.custom_op("batchinv_mutants::pair", mutates_args=())
def pair(x: Tensor) -> Tensor:
    """The second of two equal neighbours is another float."""
    out = x.clone()
    same = torch.zeros(len(x), dtype=torch.bool)
    same[1:] = (x[1:] == x[:-1]).all(1)
    out[same] = _ulp(out[same])
    return out


@_piece("a place far down", "batchinv_mutants::far_down")
def far_down_rows() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        return far_down(x * 0.5) + 1.0  # planted

    return piece, _pool(N_ROWS, K)


@torch.library.custom_op("batchinv_mutants::far_down", mutates_args=())
def far_down(x: Tensor) -> Tensor:
    out = x.clone()
    out[200:] = _ulp(out[200:])
    return out


@_piece("memory that is not aligned", "batchinv_mutants::unaligned")
def unaligned_rows() -> tuple[Function, Tensor]:
    def piece(x: Tensor) -> Tensor:
        return unaligned(x[:, :-1]) + 1.0  # planted

    return piece, _pool(N_ROWS, K + 1)


@torch.library.custom_op("batchinv_mutants::unaligned", mutates_args=())
def unaligned(x: Tensor) -> Tensor:
    """A row whose memory does not begin at a multiple of 16 bytes takes another way."""
    out = x.clone()
    for row in range(len(x)):
        if (row * x.stride(0)) % 4:
            out[row] = _ulp(out[row])
    return out


@_piece("two faults, one in the other's wake", "batchinv_mutants::gemv")
def two_in_a_row() -> tuple[Function, Tensor]:
    w = _weight(K, K)

    def piece(x: Tensor) -> Tensor:
        hidden = gemv(x * 0.5, w)  # planted
        return gemv(hidden * 2.0, w)

    return piece, _pool(N_ROWS, K)


@_piece("a fault that a rounding hides, and one that shows", "batchinv_mutants::other_tile")
def hidden_and_shown() -> tuple[Function, Tensor]:
    w = _weight(K, K)

    def piece(x: Tensor) -> Tensor:
        coarse = split_k(x, w).mul(4).round()
        return other_tile(x, w) + coarse  # planted

    return piece, _pool(N_ROWS, K)


@_piece("a layer deep down", "batchinv_mutants::gemv")
def deep() -> tuple[Function, Tensor]:
    w = _weight(K, K)

    def piece(x: Tensor) -> Tensor:
        for layer in range(6):
            x = x * 0.5 + layer
            if layer == 4:
                x = gemv(x, w)  # planted
        return x

    return piece, _pool(N_ROWS, K)
