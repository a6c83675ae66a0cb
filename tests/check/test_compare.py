"""Bitwise comparison, of every dtype that torch has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_batchinv.compare import as_bits, first_difference, first_row_that_differs, refuse_uncomparable
from pytest_batchinv.subjects.base import RowOutputs

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EIGHT_BITS = [dtype for name, dtype in vars(torch).items() if name.startswith("float8_")]
PACKED = [torch.float4_e2m1fn_x2]
OTHERS = [torch.complex128, torch.complex64, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
ALL = [*FLOATS, *EIGHT_BITS, *PACKED, *OTHERS, *UNSIGNED]


def of_bytes(raw: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_two_bit_patterns_are_equal_only_where_all_bits_are(dtype, data):
    bits = st.lists(st.sampled_from([0, 1]), min_size=64, max_size=64)
    raw = bits if dtype == torch.bool else st.binary(min_size=64, max_size=64)
    one = bytes(data.draw(raw))
    other = bytearray(one)
    place = data.draw(st.integers(0, 63))
    other[place] ^= 1 if dtype == torch.bool else 1 << data.draw(st.integers(0, 7))
    a, b = of_bytes(one, dtype), of_bytes(bytes(other), dtype)
    assert first_difference(a, a.clone()) is None
    found = first_difference(a, b)
    assert (found.index, found.n_differ) == ((place // dtype.itemsize,), 1)
    assert found.expected_hex != found.actual_hex
    assert first_difference(a.reshape(2, -1), b.reshape(2, -1)).n_differ == 1


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64, torch.complex128, torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
def test_zeros_of_both_signs_differ_and_nan_has_no_ulp(dtype):
    zero, minus = torch.zeros(1).to(dtype), (-torch.zeros(1)).to(dtype)
    assert first_difference(zero, minus).ulp == (None if dtype.is_complex else 0)
    found = first_difference(zero, torch.full((1,), torch.nan).to(dtype))
    assert "nan" in found.actual
    assert found.ulp is None


def test_a_conjugated_and_a_negated_view_are_their_values():
    x = torch.complex(torch.randn(4), torch.randn(4))
    assert first_difference(x.conj(), x.conj().resolve_conj()) is None
    assert first_difference(x.conj().imag, x.conj().imag.resolve_neg()) is None
    assert first_difference(x, x.conj()) is not None


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors_are_compared_by_integers_scale_and_zero_point():
    x = torch.randn(8)
    one, same, scaled = (torch.quantize_per_tensor(x, scale, 3, torch.qint8) for scale in (0.1, 0.1, 0.2))
    assert first_difference(one, same) is None
    assert first_difference(one, scaled).kind == "shape"
    other = torch.quantize_per_tensor(x + 0.3, 0.1, 3, torch.qint8)
    assert first_difference(one, other).kind == "bits"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_channel")
def test_tensors_with_a_scale_for_each_channel_are_compared_by_all_of_them():
    x, zero = torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)
    one, same, scaled = (
        torch.quantize_per_channel(x, torch.tensor([0.1, last]), zero, 0, torch.qint8) for last in (0.2, 0.2, 0.3)
    )
    assert first_difference(one, same) is None
    assert first_difference(one, scaled).kind == "shape"


def test_a_format_that_has_exponents_alone_has_no_ulp():
    one, other = (torch.tensor([power], dtype=torch.uint8).view(torch.float8_e8m0fnu) for power in (126, 128))
    assert first_difference(one, other).ulp is None


def test_the_bits_of_a_complex_number_are_those_of_its_two_parts():
    found = first_difference(torch.tensor([1 + 2j]), torch.tensor([1 - 2j]))
    assert (found.expected_hex, found.actual_hex) == ("0x400000003f800000", "0xc00000003f800000")
    wide = first_difference(torch.tensor([1 + 2j], dtype=torch.complex128), torch.tensor([0j], dtype=torch.complex128))
    assert (wide.expected_hex, wide.actual_hex) == ("0x3ff00000000000004000000000000000", "0x" + "0" * 32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_ulp_is_found_where_it_is(dtype):
    expected = torch.linspace(-3, 3, 12).to(dtype).reshape(3, 4)
    actual = expected.clone()
    actual[1, 2] = torch.nextafter(actual[1, 2], torch.tensor(9.0, dtype=dtype))
    found = first_difference(expected, actual)
    assert (found.index, found.ulp, found.n_differ, found.n_total) == ((1, 2), 1, 1, 12)
    assert float(found.expected) == expected[1, 2].item()
    assert len(found.expected_hex) == 2 + 2 * expected.element_size()


def test_ulps_are_counted_across_zero():
    tiny = torch.tensor(2.0**-149)
    assert first_difference(tiny, -tiny).ulp == 2


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(max_examples=30, deadline=None)
@given(values=st.tuples(st.integers(-40, 40), st.integers(-40, 40)))
def test_ulps_are_steps_from_one_number_to_the_next(dtype, values):
    """-0.0 and 0.0 are no step apart."""
    up = torch.tensor(torch.inf, dtype=dtype)
    number = [torch.zeros((), dtype=dtype), -torch.zeros((), dtype=dtype)]
    a, b = (number[value < 0].clone() for value in values)
    for x, value in zip((a, b), values, strict=True):
        for _ in range(abs(value)):
            x.copy_(torch.nextafter(x, up if value > 0 else -up))
    found = first_difference(a, b)
    steps = abs(values[0] - values[1])
    assert (found is None and steps == 0) or found.ulp == steps


def test_a_difference_is_told_with_both_numbers_their_bits_and_the_distance():
    expected, actual = torch.tensor([2.0, -1.0]), torch.tensor([2.0, 1.0])
    found = first_difference(expected, actual)
    assert str(found) == (
        "1 of 2 values differ; the first at [1]: -1.0 (0xbf800000) against 1.0 (0x3f800000), 2,130,706,432 ulp apart"
    )
    integers = first_difference(torch.tensor([1, -2]), torch.tensor([1, 3]))
    assert str(integers) == ("1 of 2 values differ; the first at [1]: -2 (0xfffffffffffffffe) against 3 (0x0000000000000003)")


def test_strides_do_not_matter():
    x = torch.randn(3, 4)
    assert first_difference(x, x.t().contiguous().t()) is None
    assert as_bits(x.t()).shape == (4, 3)


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64)])
def test_another_shape_or_dtype_is_a_difference_of_its_own_kind(other):
    found = first_difference(torch.zeros(2), other)
    assert found.kind == "shape"
    assert str(found) == f"float32 [2] against {str(other.dtype).removeprefix('torch.')} {list(other.shape)}"


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo, which has no bits for each row; return it .to_dense()"),
        (lambda: torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr"),
        (lambda: torch.empty(3, device="meta"), "on the device meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_what_has_no_bits_for_each_row_is_refused_in_a_sentence(make, says):
    with pytest.raises(ValueError, match="the output is") as caught:
        refuse_uncomparable("the output", make())
    assert says in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(n_rows=st.integers(1, 9), row=st.integers(0, 8), stacked=st.booleans())
def test_the_first_row_that_differs_is_named_whether_rows_are_stacked_or_not(n_rows, row, stacked):
    row %= n_rows
    x, y = torch.zeros(n_rows, 3), torch.zeros(n_rows, 3)
    y[row:, 1] = 1.0

    def outputs(t):
        if stacked:
            return RowOutputs({"a": torch.ones(n_rows), "b": t})
        return RowOutputs(rows=[{"a": torch.ones(1), "b": r} for r in t])

    assert first_row_that_differs(outputs(x), outputs(x)) is None
    found = first_row_that_differs(outputs(x), outputs(y))
    assert found.position == row
    assert (found.output, found.difference.index) == ("b", (1,))


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    ("one", "other", "kinds"),
    [
        ({"a": 0.0}, {"b": 0.0}, ("a", "b")),
        ({"a": 0.0}, {"a": 0.0, "b": 0.0}, ("a", "a, b")),
        ({"a": 0.0, "b": 0.0}, {"a": 0.0}, ("a, b", "a")),
    ],
)
def test_outputs_of_other_names_are_a_difference(stacked, one, other, kinds):
    found = first_row_that_differs(*(_outputs(given, stacked, torch.float32) for given in (one, other)))
    assert (found.position, found.output, found.difference.kind) == (0, "the outputs", "shape")
    assert (found.difference.expected, found.difference.actual, found.difference.index) == (*kinds, ())


@pytest.mark.parametrize("differs", [False, True])
@pytest.mark.parametrize("first_is_stacked", [False, True])
def test_rows_of_a_stacked_output_are_compared_with_rows_that_are_apart(first_is_stacked, differs):
    stacked, apart = _outputs({"a": 1.0}, True, torch.float32), _outputs({"a": 2.0 if differs else 1.0}, False, torch.float32)
    found = first_row_that_differs(*((stacked, apart) if first_is_stacked else (apart, stacked)))
    assert (found is not None) == differs


@pytest.mark.parametrize("stacked", [True, False])
def test_two_numbers_of_rows_are_no_answer(stacked):
    """The subjects answer for that: here it is a fault of ours, and no verdict."""
    rows = [{"a": torch.zeros(3)}, {"a": torch.zeros(3)}]
    two, three = (RowOutputs({"a": torch.zeros(n, 3)}) if stacked else RowOutputs(rows=(rows * 2)[:n]) for n in (2, 3))
    with pytest.raises(ValueError, match="zip"):
        first_row_that_differs(two, three)


@pytest.mark.parametrize("stacked", [True, False])
def test_the_same_bits_in_another_dtype_are_a_difference(stacked):
    found = first_row_that_differs(*(_outputs({"a": 0}, stacked, dtype) for dtype in (torch.float32, torch.int32)))
    assert (found.position, found.output, found.difference.kind) == (0, "a", "shape")


def test_a_difference_of_shape_counts_no_values():
    found = first_difference(torch.zeros(2), torch.zeros(3))
    assert (found.n_differ, found.n_total, found.index) == (0, 0, ())


def _outputs(values, stacked, dtype):
    rows = {name: torch.full((2, 3), value, dtype=dtype) for name, value in values.items()}
    return RowOutputs(rows) if stacked else RowOutputs(rows=[{name: x[i] for name, x in rows.items()} for i in range(2)])
