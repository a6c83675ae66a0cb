"""Bitwise comparison: equal, or the first difference. There is no tolerance here."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from pytest_batchinv.subjects.base import RowOutputs

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Difference(msgspec.Struct, frozen=True):
    """The first element that differs, and how many do.

    kind: "bits"; or "shape", where shape or dtype differ, and ``expected`` and ``actual`` say them. ulp: distance in units in
    the last place; None for what is no float.
    """

    kind: str
    index: tuple[int, ...]
    expected: str
    actual: str
    expected_hex: str = ""
    actual_hex: str = ""
    ulp: int | None = None
    n_differ: int = 0
    n_total: int = 0

    def __str__(self) -> str:
        if self.kind == "shape":
            return f"{self.expected} against {self.actual}"
        distance = "" if self.ulp is None else f", {self.ulp:,} ulp apart"
        return (
            f"{self.n_differ:,} of {self.n_total:,} values differ; the first at {list(self.index)}: "
            f"{self.expected} ({self.expected_hex}) against {self.actual} ({self.actual_hex}){distance}"
        )


class RowDifference(NamedTuple):
    """Which row of a batch differs, and in which of its outputs."""

    position: int
    output: str
    difference: Difference


def refuse_uncomparable(name: str, x: Tensor) -> None:
    """Raises ValueError for a tensor whose bits cannot be read row by row."""
    if x.layout not in (torch.strided, torch.jagged):
        raise ValueError(f"{name} is a tensor of layout {x.layout}, which has no bits for each row; return it .to_dense()")
    if x.device.type == "meta":
        raise ValueError(f"{name} is on the device meta, where there are no bits to compare")


def as_bits(x: Tensor) -> Tensor:
    """The tensor's bits as integers, so that NaN equals NaN of the same bits and -0.0 differs from 0.0.

    Of a quantised tensor the integers alone: its scale and zero point are compared apart. A dtype of 16 bytes gets a last
    dimension twice as long.
    """
    if x.is_quantized:
        return x.int_repr()
    if x.is_complex() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    x = x.contiguous()
    if x.dim() == 0:
        x = x[None]
    return x.view(_INTEGERS[x.element_size()])


def first_difference(expected: Tensor, actual: Tensor) -> Difference | None:
    """None where both have the same shape, dtype and bits."""
    if _kind(expected) != _kind(actual):
        return Difference("shape", (), _kind(expected), _kind(actual))
    if _equal_bits(expected, actual):
        return None
    expected_bits, actual_bits = as_bits(expected), as_bits(actual)
    differs = (expected_bits != actual_bits).reshape(expected.numel(), -1).any(1)
    flat = int(differs.int().argmax())
    a, b = expected.reshape(-1)[flat], actual.reshape(-1)[flat]
    index, rest = [], flat
    for size in reversed(expected.shape):
        rest, i = divmod(rest, size)
        index.append(i)
    return Difference(
        kind="bits",
        index=tuple(reversed(index)),
        expected=_value(a),
        actual=_value(b),
        expected_hex=_hex(a),
        actual_hex=_hex(b),
        ulp=_ulp(a, b),
        n_differ=int(differs.sum()),
        n_total=differs.numel(),
    )


def first_row_that_differs(expected: RowOutputs, actual: RowOutputs) -> RowDifference | None:
    """The first row, by position, with an output that differs; of those the first."""
    if _all_equal(expected, actual):
        return None
    for position, (one, other) in enumerate(zip(expected, actual, strict=True)):
        if one.keys() != other.keys():
            kinds = (", ".join(one), ", ".join(other))
            return RowDifference(position, "the outputs", Difference("shape", (), *kinds))
        for name, tensor in one.items():
            difference = first_difference(tensor, other[name])
            if difference is not None:
                return RowDifference(position, name, difference)
    return None


def _all_equal(expected: RowOutputs, actual: RowOutputs) -> bool:
    """Whole batches at once, where both sides are stacked."""
    a, b = expected.stacked, actual.stacked
    if a is None or b is None or a.keys() != b.keys():
        return False
    return all(_kind(a[name]) == _kind(b[name]) and _equal_bits(a[name], b[name]) for name in a)


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(as_bits(a), as_bits(b))


def _kind(x: Tensor) -> str:
    """Shape and dtype, and for a quantised tensor how it is scaled: what must be equal before bits can be."""
    scaled = ""
    if x.is_quantized:
        per_channel = x.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
        scaled = f" {x.q_per_channel_scales().tolist()}" if per_channel else f" {x.q_scale()!r} {x.q_zero_point()}"
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}{scaled}"


def _value(scalar: Tensor) -> str:
    try:
        return repr(scalar.cpu().item())
    except (RuntimeError, NotImplementedError):  # packed 4-bit floats and plain bits have no values of their own
        return _hex(scalar)


def _hex(scalar: Tensor) -> str:
    bits = as_bits(scalar.cpu())
    digits = bits.element_size() * 2
    return "0x" + "".join(f"{int(part) & ((1 << 4 * digits) - 1):0{digits}x}" for part in bits.flatten())


def _ulp(a: Tensor, b: Tensor) -> int | None:
    """Number of representable values between the two; None where one is NaN, or where there is no such order."""
    if not a.is_floating_point() or "float4" in str(a.dtype) or "e8m0" in str(a.dtype):
        return None
    if any(x.cpu().to(torch.float64).isnan() for x in (a, b)):
        return None
    return abs(_ordinal(a) - _ordinal(b))


def _ordinal(scalar: Tensor) -> int:
    """Bits of a float as an integer in the order of the values: negative ones count down from -0.0, which is 0 as 0.0 is."""
    width = scalar.element_size() * 8
    bits = int(as_bits(scalar.cpu())) & ((1 << width) - 1)
    sign = 1 << (width - 1)
    return bits if bits < sign else -(bits - sign)
