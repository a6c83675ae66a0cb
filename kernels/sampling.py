"""Tokens drawn with a seed for each row: what a row draws follows its values, its seed and its position, and nothing beside it.

torch's generators give numbers by their place in the batch, so that a row draws another number in another batch.
"""

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten.common import FLOATS, kernels_of_device, shape_of

MULTINOMIAL_SCHEMA = "multinomial(Tensor probabilities, Tensor seeds, Tensor positions) -> Tensor"
SAMPLE_SCHEMA = "sample(Tensor logits, Tensor seeds, Tensor positions, float temperature, int? top_k, float? top_p) -> Tensor"
_LOW = 0xFFFFFFFF
_MULTIPLIERS, _STEPS, _ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10


def multinomial(probabilities: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The first column whose running sum is above ``u`` times the row's sum, ``u`` of :func:`uniform`. Columns of 0 are none.

    probabilities: [rows, n_cols], 0 or more, in any scale. seeds, positions: [rows] of int64. The running sum is that of
    ``row_cumsum`` in float64: on a CPU one chain, ascending. Raises ValueError for what is no distribution.
    """
    _check(probabilities, seeds, positions)
    _require_everywhere(probabilities >= 0, "probabilities are 0 or more; one is negative or NaN")
    return _drawn(probabilities.to(torch.float64).contiguous(), seeds, positions)


def sample(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """:func:`multinomial` of ``softmax(logits / temperature)``, in float64, of what ``top_k`` and then ``top_p`` leave.

    top_k: that many of the largest, of equal ones those of lower columns. top_p: the largest, in the same order, as long as the
    sum of those before is below ``top_p`` times the sum of all; both sums are those of ``row_cumsum``. Logits of -inf are left
    out. Raises ValueError for a row without a finite logit, for NaN and +inf, and for options out of range.
    """
    _check(logits, seeds, positions)
    _require(temperature > 0 and temperature < float("inf"), f"a temperature is above 0 and finite, not {temperature}")
    _require(top_k is None or top_k >= 1, f"top_k is 1 or more, not {top_k}")
    _require(top_p is None or 0 < top_p <= 1, f"top_p is above 0 and at most 1, not {top_p}")
    _require_everywhere(logits < float("inf"), "logits are finite or -inf; one is NaN or +inf")
    wide = logits.to(torch.float64)
    largest = wide.amax(-1, keepdim=True) if wide.shape[1] else wide
    _require_everywhere(largest > -float("inf"), "a row's logits are all -inf, so that no token is left")
    kernels = kernels_of_device(logits.device)
    weights = kernels.row_softmax(((wide - largest) / temperature).contiguous(), False, torch.float64)
    if top_k is not None or top_p is not None:
        weights = torch.where(_kept(weights, wide, top_k, top_p), weights, 0.0)
    return _drawn(weights, seeds, positions)


def rows_fake(values: Tensor, *_: object) -> Tensor:
    """One token a row."""
    return values.new_empty(values.shape[0], dtype=torch.int64)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """``(word 0 * 2**20 + word 1 // 2**12) / 2**52`` of :func:`philox`: float64 from 0 to 1 - 2**-52, each exact."""
    words = philox(_words_of(seeds), [*_words_of(positions), torch.zeros_like(seeds), torch.zeros_like(seeds)])
    return ((words[0] << 20) + (words[1] >> 12)).to(torch.float64) * 2.0**-52


def philox(key: list[Tensor], counter: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four words for a counter of four.

    Words of 32 bits in int64, two of them in a key. Whole numbers, and so the same on every device.
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = _product(_MULTIPLIERS[0], c0), _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _STEPS[0]) & _LOW, (k1 + _STEPS[1]) & _LOW
    return [c0, c1, c2, c3]


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word, by halves of the word: the whole product would not fit int64."""
    upper = factor * (word >> 16)
    lower = ((upper & 0xFFFF) << 16) + factor * (word & 0xFFFF)
    return (upper >> 16) + (lower >> 32), lower & _LOW


def _words_of(x: Tensor) -> list[Tensor]:
    return [x & _LOW, (x >> 32) & _LOW]


def _drawn(weights: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    n_cols = weights.shape[1]
    if not weights.numel():
        _require(not weights.shape[0], "rows without a column have no token to draw")
        return rows_fake(weights)
    sums = kernels_of_device(weights.device).row_cumsum(weights, torch.float64)
    total = sums[:, -1:]
    _require_everywhere((total > 0) & (total < float("inf")), "a row's probabilities have a sum that is 0 or infinite")
    columns = torch.arange(n_cols, device=weights.device)
    can_be = weights > 0
    # u is at most 1 - 2**-52, so that the product is below the sum. Where a tree of sums is not monotone, the last one is it.
    is_above = can_be & (sums > uniform(seeds, positions)[:, None] * total)
    first = torch.where(is_above, columns, n_cols).amin(-1)
    return torch.where(first < n_cols, first, torch.where(can_be, columns, -1).amax(-1))


def _kept(weights: Tensor, logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """By the logits, as unequal ones may have equal weights. A stable sort keeps equal ones in the order of the columns."""
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    n_cols = logits.shape[1]
    n_largest = n_cols if top_k is None else min(top_k, n_cols)
    is_kept = (torch.arange(n_cols, device=logits.device) < n_largest).expand(logits.shape)
    if top_p is not None:
        ordered = torch.where(is_kept, weights.gather(-1, order), 0.0)
        sums = kernels_of_device(weights.device).row_cumsum(ordered, torch.float64)
        before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], -1)
        is_kept = is_kept & (before < top_p * sums[:, -1:])
    return torch.zeros_like(is_kept).scatter(-1, order, is_kept)


def _check(values: Tensor, seeds: Tensor, positions: Tensor) -> None:
    _require(values.dim() == 2, f"expected [rows, tokens], but got {shape_of(values)}")
    _require(values.dtype in FLOATS, f"expected float64, float32, float16 or bfloat16, but got {values.dtype}")
    for name, x in (("seed", seeds), ("position", positions)):
        _require(
            x.dtype == torch.int64 and x.shape == values.shape[:1],
            f"expected one {name} of int64 for each of {values.shape[0]} rows, but got {shape_of(x) or 'one'} of {x.dtype}",
        )
        _require(x.device == values.device, f"expected each {name} on {values.device}, but got them on {x.device}")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(f"sampling: {sentence}")


def _require_everywhere(condition: Tensor, sentence: str) -> None:
    """Raises ValueError on the CPU. A GPU asserts it when it comes there: a check here would wait for it."""
    if condition.is_cuda:
        torch._assert_async(condition.all(), f"sampling: {sentence}")
    else:
        _require(bool(condition.all()), sentence)
