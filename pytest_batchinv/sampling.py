"""Sampling with a seed for each row: a row draws the same token alone and in any batch, in eager and in compiled code.

``torch.multinomial`` takes its numbers from one generator by their place in the batch, so that a row's token follows its
neighbours. Here a row's number is that of its own seed and position, by Philox; the sums are of the kernels of the mode, inside
it and outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pytest_batchinv.kernels import operators

operators.operators()  # defines batchinv::multinomial and batchinv::sample


def multinomial(probabilities: Tensor, seeds: Tensor, positions: Tensor | int = 0) -> Tensor:
    """One column of each row, drawn with the row's probabilities.

    ``u = (w0 * 2**20 + w1 // 2**12) / 2**52``, with the first words of Philox4x32-10 under the key ``seed`` at the counter
    ``position``. The token is the first column whose running sum is above ``u`` times the sum of the row. The sums are in
    float64, and on a CPU one chain, by columns in ascending order. On a GPU they are those of the
    mode's ``cumsum``.

    Args:
        probabilities: [rows, columns] of a float dtype, 0 or more; they need not sum up to 1.
        seeds: [rows] of int64, one for each row. Equal seeds at equal positions draw the same number.
        positions: [rows] of int64, or one for all rows: the index of the token in its sequence, say. Each position draws anew.

    Returns:
        [rows] of int64.

    Raises:
        ValueError: a probability is negative or NaN, a row's sum is 0 or infinite, or a shape, dtype or device is another.
    """
    token: Tensor = torch.ops.batchinv.multinomial(probabilities, seeds, _for_each(positions, seeds))
    return token


def sample(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor | int = 0,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """One token of each row: :func:`multinomial` of ``softmax(logits / temperature)``, in float64, without what is left out.

    Args:
        logits: [rows, tokens] of a float dtype. Those of -inf are never drawn.
        seeds: [rows] of int64, one for each row.
        positions: [rows] of int64, or one for all rows.
        temperature: above 0.
        top_k: of the largest logits that many are kept; of equal ones those with a lower index.
        top_p: of those, the largest are kept as long as the sum of the probabilities before is below ``top_p`` times the sum of
            all, of equal ones those with a lower index first. One token is always kept.

    Returns:
        [rows] of int64.

    Raises:
        ValueError: a logit is NaN or +inf, a row has -inf alone, or an option, shape, dtype or device is out of range.
    """
    positions = _for_each(positions, seeds)
    token: Tensor = torch.ops.batchinv.sample(logits, seeds, positions, float(temperature), top_k, top_p)
    return token


def _for_each(positions: Tensor | int, seeds: Tensor) -> Tensor:
    return positions if isinstance(positions, Tensor) else torch.full_like(seeds, positions)
