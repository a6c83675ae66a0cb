"""Bitwise comparison of two tensors: equal, or the first difference. There is no tolerance here."""

from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.complex64: torch.int64,
    torch.bool: torch.uint8,
}


@dataclass(frozen=True)
class Difference:
    """The first element that differs, and how many do. ulp: distance in units in the last place; None for non-floats."""

    index: tuple[int, ...]
    expected: str
    actual: str
    expected_hex: str
    actual_hex: str
    ulp: int | None
    n_differ: int
    n_total: int

    def __str__(self) -> str:
        distance = "" if self.ulp is None else f", {self.ulp} ulp apart"
        return (
            f"{self.n_differ} of {self.n_total} values differ; the first at {list(self.index)}: "
            f"{self.expected} ({self.expected_hex}) against {self.actual} ({self.actual_hex}){distance}"
        )


def as_bits(x: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN equals NaN of the same bits and -0.0 differs from 0.0."""
    return x.contiguous().view(_BITS[x.dtype]) if x.dtype in _BITS else x


def first_difference(expected: Tensor, actual: Tensor) -> Difference | None:
    """None where both have the same shape, dtype and bits. Raises ValueError where shape or dtype differ."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        raise ValueError(
            f"bits can be compared only between tensors of one shape and dtype, not between "
            f"{list(expected.shape)} {expected.dtype} and {list(actual.shape)} {actual.dtype}"
        )
    expected_bits, actual_bits = as_bits(expected), as_bits(actual)
    if torch.equal(expected_bits, actual_bits):
        return None
    differs = expected_bits != actual_bits
    flat = int(differs.flatten().int().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), expected.shape))
    a, b = expected[index].cpu(), actual[index].cpu()
    return Difference(
        index=index,
        expected=repr(a.item()),
        actual=repr(b.item()),
        expected_hex=_hex(a),
        actual_hex=_hex(b),
        ulp=_ulp(a, b),
        n_differ=int(differs.sum()),
        n_total=differs.numel(),
    )


def _hex(scalar: Tensor) -> str:
    bits = as_bits(scalar)
    width = bits.element_size() * 8
    return f"0x{int(bits) & ((1 << width) - 1):0{width // 4}x}"


def _ulp(a: Tensor, b: Tensor) -> int | None:
    """Number of representable values between the two; None where one is NaN, or where there is no such order."""
    if not a.is_floating_point() or a.isnan() or b.isnan():
        return None
    return abs(_ordinal(a) - _ordinal(b))


def _ordinal(scalar: Tensor) -> int:
    """Bits of a float as an integer in the order of the values: negative floats count down from -1."""
    bits = int(as_bits(scalar))
    return bits if bits >= 0 else -(bits & ((1 << (scalar.element_size() * 8 - 1)) - 1))
