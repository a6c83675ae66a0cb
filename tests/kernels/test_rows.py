"""The order of sums in the row kernels, and that nothing but it decides the bits: Triton's interpreter, on the CPU.

The order is simulated here in numpy, addition by addition, and must come out exactly. Values of very different size are
planted at drawn columns: then other orders give other results. The tests run in a process of their own.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_batchinv.kernels import cuda, plans, reference
from pytest_batchinv.kernels.cuda import reduce, rows, softmax

CHILD_ENVIRONMENT = {"TRITON_INTERPRET": "1"}

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 100, 1000, 9000, 16385, 40000]
deterministic = settings(deadline=None, derandomize=True, max_examples=12)


# --- what the tests share -------------------------------------------------------------------------------------------


FUNCTIONS = {
    "sum": lambda x: cuda.row_sum(x, x.dtype),
    "mean": lambda x: cuda.row_mean(x, x.dtype),
    "mean_of_squares": lambda x: cuda.row_mean_of_squares(x, reference.accumulator_dtype(x.dtype)),
    "norm_1": lambda x: cuda.row_norm(x, 1, x.dtype),
    "norm_2": lambda x: cuda.row_norm(x, 2, x.dtype),
    "var_mean": lambda x: cuda.row_var_mean(x, 1, x.dtype),
    "logsumexp": lambda x: cuda.row_logsumexp(x, x.dtype),
    "softmax": lambda x: cuda.row_softmax(x, False, x.dtype),
    "log_softmax": lambda x: cuda.row_softmax(x, True, x.dtype),
    "logprobs": lambda x: softmax.row_logprobs(x, torch.arange(x.shape[0])[:, None] % x.shape[1], x.dtype),
    "cumsum": lambda x: cuda.row_cumsum(x, x.dtype),
    "layer_norm": lambda x: cuda.row_layer_norm(x, x[0].sin(), x[0].cos(), 1e-5),
    "rms_norm": lambda x: cuda.row_rms_norm(x, x[0].sin(), 1e-6),
}
each_function = pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    plans.forget_plans()


def replace(monkeypatch, module, name, value):
    """Plans made with what was there before are forgotten."""
    monkeypatch.setattr(module, name, value)
    plans.forget_plans()


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def assert_same_bits(got, want):
    for x, y in zip(as_tuple(got), as_tuple(want), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = (t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()]) for t in (x, y))
        assert torch.equal(x, y), f"{(x != y).sum().item()} of {x.numel()} values differ"


def mixed(n_rows, n_cols, dtype):
    """Values of different sizes, so that another order rarely gives the same sum."""
    scale = torch.tensor([1e-3, 1.0, 20.0], dtype=torch.float64)[torch.randint(0, 3, (n_rows, n_cols))]
    return (scale * torch.randn(n_rows, n_cols, dtype=torch.float64)).to(dtype)


# --- the order, simulated --------------------------------------------------------------------------------------------


def chunks(row, behind):
    """The row in chunks of 16384 (4096 in float64), the last one filled up."""
    size = 4096 if row.dtype == np.float64 else 16384
    count = max(1, math.ceil(len(row) / size))
    return np.pad(row, (0, count * size - len(row)), constant_values=behind).reshape(count, size)


def chunk_sum(terms):
    if len(terms) == 16384:
        terms = terms[:8192] + terms[8192:]
    while len(terms) > 1:
        terms = terms[0::2] + terms[1::2]
    return terms[0]


def row_sum(row):
    total = row.dtype.type(0)
    for chunk in chunks(row, 0):
        total = total + chunk_sum(chunk)
    return total


def row_max_and_sum_of_exp(row):
    largest, total = row.dtype.type(-np.inf), row.dtype.type(0)
    for chunk in chunks(row, -np.inf):
        of_chunk = chunk.max()
        sum_of_chunk = chunk_sum(np.exp(chunk - of_chunk))
        new = max(largest, of_chunk)
        total = total * np.exp(largest - new) + sum_of_chunk * np.exp(of_chunk - new)
        largest = new
    return largest, total


def row_sum_and_squares(row):
    """sum(x), and sum((x - mean) ** 2), merged from each chunk's own."""
    scalar, n_cols, size = row.dtype.type, len(row), chunks(row, 0).shape[1]
    total = squares = scalar(0)
    for i, chunk in enumerate(chunks(row, 0)):
        before, count = scalar(i * size), scalar(min(size, n_cols - i * size))
        sum_of_chunk = chunk_sum(chunk)
        centred = (chunk - sum_of_chunk / count)[: int(count)]
        squares_of_chunk = chunk_sum(np.pad(centred * centred, (0, size - int(count))))
        if i == 0:
            total, squares = sum_of_chunk, squares_of_chunk
        else:
            step = sum_of_chunk / count - total / before
            squares = squares + squares_of_chunk + step * step * (before * count / (before + count))
            total = total + sum_of_chunk
    return total, squares


def row_cumsum(row):
    """Column j takes one addition for each 1 in the digits of j, lowest first; blocks of 4096, ascending."""
    out, before = np.empty_like(row), row.dtype.type(0)
    for start in range(0, len(row), 4096):
        block = np.pad(row[start : start + 4096], (0, max(0, start + 4096 - len(row))))
        sums, totals, columns = block.copy(), block.copy(), np.arange(4096)
        for digit in range(12):
            has_digit = (columns >> digit) & 1 == 1
            sums[has_digit] = sums[has_digit] + totals[(columns[has_digit] >> digit) - 1]
            totals = totals[0::2] + totals[1::2]
        out[start : start + 4096] = before + sums[: len(row) - start]
        before = before + totals[0]
    return out


planted = st.integers(40, 40000).flatmap(
    lambda n_cols: st.tuples(st.just(n_cols), st.lists(st.integers(0, n_cols - 1), min_size=6, max_size=40, unique=True))
)


def plant(n_cols, places, dtype):
    """2 ** 24 (2 ** 53 in float64), its negative, and ones between: each addition next to the large ones loses a one."""
    large = 2.0 ** (53 if dtype == torch.float64 else 24)
    x = torch.zeros(1, n_cols, dtype=dtype)
    for i, place in enumerate(places):
        x[0, place] = (large, 1.0, -large, 1.0, 3.0)[i % 5]
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("split_below", [0, math.inf])
def test_order_of_a_sum_is_the_documented_one(dtype, split_below, monkeypatch):
    replace(monkeypatch, rows, "SPLIT_BELOW", split_below)
    results, exact = [], []

    @given(planted)
    @deterministic
    def planted_values(case):
        x = plant(*case, dtype)
        want = row_sum(x[0].numpy())
        assert_same_bits(cuda.row_sum(x, dtype), torch.tensor([want]))
        assert_same_bits(cuda.row_cumsum(x, dtype), torch.tensor(row_cumsum(x[0].numpy()))[None])
        results.append(float(want))
        exact.append(math.fsum(x[0].tolist()))

    planted_values()
    assert results != exact, "no plant showed an order"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_cols", [1, 128, 1030])
def test_mean_of_squares_has_the_bits_of_the_mean_of_the_squares(n_cols, dtype):
    x = mixed(3, n_cols, dtype)
    wide = x.float()
    assert_same_bits(cuda.row_mean_of_squares(x, torch.float32), cuda.row_mean(wide * wide, torch.float32))


@pytest.mark.parametrize("split_below", [0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_cols", SIZES)
def test_order_of_every_statistic_is_the_documented_one(n_cols, dtype, split_below, monkeypatch):
    replace(monkeypatch, rows, "SPLIT_BELOW", split_below)
    x = mixed(2, n_cols, dtype)
    each = [row.numpy() for row in x]
    scalar, count = each[0].dtype.type, each[0].dtype.type(n_cols)

    def check(got, of_row):
        assert_same_bits(got, torch.from_numpy(np.stack([of_row(row) for row in each])))

    check(cuda.row_sum(x, dtype), row_sum)
    check(cuda.row_mean(x, dtype), lambda row: row_sum(row) / count)
    check(cuda.row_mean_of_squares(x, dtype), lambda row: row_sum(row * row) / count)
    check(cuda.row_norm(x, 1, dtype), lambda row: row_sum(np.abs(row)))
    check(cuda.row_norm(x, 2, dtype), lambda row: np.sqrt(row_sum(row * row)))
    check(cuda.row_cumsum(x, dtype), row_cumsum)
    var, mean = cuda.row_var_mean(x, 0, dtype)
    check(mean, lambda row: row_sum_and_squares(row)[0] / count)
    check(var, lambda row: row_sum_and_squares(row)[1] / count)
    y, rstd = cuda.row_rms_norm(x, None, 0.5)
    alone, nothing = cuda.row_rms_norm(x, None, 0.5, with_rstd=False)
    assert nothing is None
    assert_same_bits(alone, y)
    check(rstd, lambda row: scalar(1) / np.sqrt(row_sum(row * row) / count + scalar(0.5)))
    check(y, lambda row: row * (scalar(1) / np.sqrt(row_sum(row * row) / count + scalar(0.5))))

    def layer_norm(row):
        total, squares = row_sum_and_squares(row)
        return (row - total / count) * (scalar(1) / np.sqrt(squares / count + scalar(0.5)))

    check(cuda.row_layer_norm(x, None, None, 0.5)[0], layer_norm)
    maxima_and_sums = [row_max_and_sum_of_exp(row) for row in each]
    largest, total = (np.array(numbers)[:, None] for numbers in zip(*maxima_and_sums, strict=True))
    values = x.numpy()
    assert_same_bits(cuda.row_logsumexp(x, dtype), torch.from_numpy((largest + np.log(total))[:, 0]))
    assert_same_bits(cuda.row_softmax(x, False, dtype), torch.from_numpy(np.exp(values - largest) * (scalar(1) / total)))
    assert_same_bits(cuda.row_softmax(x, True, dtype), torch.from_numpy(values - largest - np.log(total)))


# --- what must not change a bit --------------------------------------------------------------------------------------


@each_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_cols", [16385, 33000])
def test_bits_of_long_rows_do_not_follow_the_strategy(call, dtype, n_cols, monkeypatch):
    """Looped or split."""
    x = mixed(2, n_cols, dtype)
    seen, choose = [], rows._tile_and_strategy

    def noted(*args):
        tile, strategy = choose(*args)
        seen.append(strategy)
        return tile, strategy

    replace(monkeypatch, rows, "_tile_and_strategy", noted)
    replace(monkeypatch, rows, "SPLIT_BELOW", 0)
    looped = call(x)
    replace(monkeypatch, rows, "SPLIT_BELOW", math.inf)
    assert_same_bits(call(x), looped)
    if n_cols > 16384 and call is not FUNCTIONS["cumsum"]:
        assert set(seen) == {"looped", "split"}


@each_function
@pytest.mark.parametrize("n_cols", [1, 700, 5000])
def test_bits_do_not_follow_the_tile(call, n_cols, monkeypatch):
    x = mixed(7, n_cols, torch.float32)
    want = call(x)
    for table in (
        (rows.RowTile(16384, 1, 4),),
        (rows.RowTile(8192, 2, 4), rows.RowTile(16384, 4, 8)),
        (rows.RowTile(1024, 4, 1), rows.RowTile(8192, 4, 1)),
    ):
        replace(monkeypatch, rows, "ROW_TILES", table)
        for many in (1, 8):
            replace(monkeypatch, rows, "MANY_ROWS", many)
            assert_same_bits(call(x), want)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp", "logprobs", "sum", "norm_1", "norm_2", "cumsum"])
@pytest.mark.parametrize("n_cols", [3, 5000, 20000])
def test_bits_do_not_follow_padding_after(name, n_cols, monkeypatch):
    x = mixed(2, n_cols, torch.float32)
    want = FUNCTIONS[name](x)
    value = 0.0 if name in ("sum", "norm_1", "norm_2", "cumsum") else -torch.inf
    for width in (129, 16385, 40000):
        for split_below in (0, math.inf):
            if width > n_cols:
                replace(monkeypatch, rows, "SPLIT_BELOW", split_below)
                got = FUNCTIONS[name](torch.nn.functional.pad(x, (0, width - n_cols), value=value))
                assert_same_bits(got[:, :n_cols] if got.shape[-1] == width else got, want)


@each_function
@pytest.mark.parametrize("split_below", [0, math.inf])
def test_bits_of_a_row_are_its_own_where_another_is_nan(call, split_below, monkeypatch):
    replace(monkeypatch, rows, "SPLIT_BELOW", split_below)
    x = mixed(3, 17000, torch.float32)
    want = as_tuple(call(x))
    x[1, 16500], x[2, 0] = torch.nan, torch.inf
    assert_same_bits(tuple(out[:1] for out in as_tuple(call(x))), tuple(out[:1] for out in want))


@pytest.mark.parametrize("split_below", [0, math.inf])
def test_bits_of_infinities_in_long_rows(split_below, monkeypatch):
    """What torch gives: wherever the infinities stand, in whichever chunk."""
    replace(monkeypatch, rows, "SPLIT_BELOW", split_below)
    x = mixed(6, 40000, torch.float32)
    x[0] = -torch.inf
    x[1, 39999] = torch.inf
    x[2, :20000] = -torch.inf
    x[3, 20000:] = -torch.inf
    x[4, 5] = torch.nan
    x[5, 5], x[5, 30000] = torch.nan, torch.inf
    for name in ("logsumexp", "softmax", "log_softmax"):
        want = {
            "logsumexp": lambda: reference.row_logsumexp(x, x.dtype),
            "softmax": lambda: reference.row_softmax(x, False, x.dtype),
            "log_softmax": lambda: reference.row_softmax(x, True, x.dtype),
        }[name]()
        torch.testing.assert_close(FUNCTIONS[name](x), want, rtol=1e-5, atol=1e-6, equal_nan=True)
    var, mean = cuda.row_var_mean(x, 1, x.dtype)
    torch.testing.assert_close(var, reference.row_var_mean(x, 1, x.dtype)[0], rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(mean, reference.row_mean(x, x.dtype), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_bits_of_moments_far_from_zero_are_near_the_reference():
    """Merging squares about two means must not cancel."""
    x = 1000.0 + torch.randn(2, 40000)
    var, _ = cuda.row_var_mean(x, 1, x.dtype)
    torch.testing.assert_close(var, reference.row_var_mean(x, 1, x.dtype)[0], rtol=1e-5, atol=0)


# --- logprobs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_cols", [1, 1000, 16385])
def test_logprobs_are_the_gathered_log_softmax(dtype, n_cols):
    x = mixed(3, n_cols, dtype)
    for out_dtype in (dtype, torch.promote_types(dtype, torch.float32)):
        whole = cuda.row_softmax(x, True, out_dtype)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[out_dtype]
        for k in (1, 3, 40):
            index = torch.randint(0, n_cols, (3, k))
            for columns in (index, index.T.contiguous().T, index[:, :1].expand(3, k)):
                got = softmax.row_logprobs(x, columns, out_dtype)
                assert_same_bits(got, whole.gather(1, columns))
                want = reference.row_logprobs(x, columns, out_dtype)
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * 100)


@pytest.mark.parametrize("shape", [(0, 5, 2), (3, 5, 0), (0, 0, 0)])
def test_logprobs_of_nothing(shape):
    n_rows, n_cols, k = shape
    got = softmax.row_logprobs(torch.ones(n_rows, n_cols), torch.zeros(n_rows, k, dtype=torch.int64), torch.float32)
    assert got.shape == (n_rows, k)


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_logprobs_of_an_index_out_of_range_fail(bad, monkeypatch):
    from triton.runtime import interpreter

    # The interpreter does not read the launch's option.
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    index = torch.tensor([[0, 1], [4, bad]])
    with pytest.raises(Exception, match="an index is not a column of its row"):
        softmax.row_logprobs(torch.ones(2, 5), index, torch.float32)


@pytest.mark.parametrize(
    "index", [torch.zeros(2, 1, dtype=torch.int32), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)]
)
def test_logprobs_refuse_another_index(index):
    with pytest.raises(ValueError, match=r"row_logprobs takes int64 \[2, k\]"):
        softmax.row_logprobs(torch.ones(2, 5), index, torch.float32)


def test_order_of_the_constants_is_the_simulated_one():
    """The simulation above writes these numbers out: they are a promise, and no tunables."""
    assert {str(acc): size for acc, size in rows.CHUNK.items()} == {"fp32": 16384, "fp64": 4096}
    assert reduce._CUMSUM_BLOCK == 4096
