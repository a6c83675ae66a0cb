"""Bitwise comparison."""

import pytest
import torch

from pytest_batchinv.compare import as_bits, first_difference

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_ulp_is_found_where_it_is(dtype):
    expected = torch.linspace(-3, 3, 12).to(dtype).reshape(3, 4)
    actual = expected.clone()
    actual[1, 2] = torch.nextafter(actual[1, 2], torch.tensor(9.0, dtype=dtype))
    found = first_difference(expected, actual)
    assert (found.index, found.ulp, found.n_differ, found.n_total) == ((1, 2), 1, 1, 12)
    assert float(found.expected) == expected[1, 2].item()
    assert int(found.actual_hex, 16) - int(found.expected_hex, 16) == 1
    assert len(found.expected_hex) == 2 + 2 * expected.element_size()
    assert first_difference(expected, expected.clone()) is None


def test_the_first_of_several_is_reported():
    expected, actual = torch.zeros(2, 3), torch.zeros(2, 3)
    actual[0, 2] = actual[1, 0] = 1.0
    found = first_difference(expected, actual)
    assert (found.index, found.n_differ) == ((0, 2), 2)


def test_zeros_of_both_signs_differ_by_nothing_but_their_bits():
    found = first_difference(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert (found.expected_hex, found.actual_hex, found.ulp) == ("0x00000000", "0x80000000", 0)


def test_ulps_are_counted_across_zero():
    tiny = torch.tensor(2.0**-149)
    assert first_difference(tiny, -tiny).ulp == 2


def test_nan_equals_only_nan_of_the_same_bits():
    nan, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert first_difference(nan, nan.clone()) is None
    found = first_difference(nan, other)
    assert (found.expected, found.ulp) == ("nan", None)
    assert "ulp" not in str(found)


def test_integers_and_bools_are_compared_as_they_are():
    assert first_difference(torch.arange(4), torch.arange(4)) is None
    assert first_difference(torch.arange(4), torch.tensor([0, 1, 2, 9])).index == (3,)
    assert first_difference(torch.tensor([True, False]), torch.tensor([True, True])).index == (1,)


def test_strides_do_not_matter():
    x = torch.randn(3, 4)
    assert first_difference(x, x.t().contiguous().t()) is None
    assert as_bits(x.t()).shape == (4, 3)


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64)])
def test_other_shapes_and_dtypes_are_refused(other):
    with pytest.raises(ValueError, match="bits can be compared only between tensors of one shape and dtype"):
        first_difference(torch.zeros(2), other)


def test_a_difference_reads_as_a_sentence():
    text = str(first_difference(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]])))
    assert text.startswith("1 of 2 values differ; the first at [0, 1]: 2.0 (0x40000000) against 3.0 (0x40400000), 4194304")
