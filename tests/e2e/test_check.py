"""The checks catch what they are for: planted faults are found, made small, and named. The mode is off here."""

import copy
import itertools
import json
import re
import shlex
from functools import cache

import hypothesis
import pytest
import torch
from hypothesis.database import DirectoryBasedExampleDatabase, InMemoryExampleDatabase
from pytest_batchinv.kernels import counters, inductor, overloads, table

from pytest_batchinv import BatchVarianceError, assert_batch_invariant, batch_invariant_mode, records
from pytest_batchinv.check import check_engine, check_negative_control
from pytest_batchinv.engines import NotRun
from pytest_batchinv.engines.transformers import TransformersEngine
from pytest_batchinv.shapes import TRIED_SIZES, BatchShape, Row, as_ranges
from pytest_batchinv.strategies import SWEPT_SIZES, sweep

K, N = 16, 6
POOL = torch.randn(40, K, generator=torch.Generator().manual_seed(3))
WEIGHT = torch.randn(K, N, generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def database():
    """An example database of the test's own, in Hypothesis' profile, where the checks take it from."""
    before = hypothesis.settings.get_current_profile_name()
    database = InMemoryExampleDatabase()
    use_profile(database=database)
    yield database
    hypothesis.settings.load_profile(before)


def use_profile(**words) -> None:
    hypothesis.settings.register_profile("test_check", derandomize=False, **words)
    hypothesis.settings.load_profile("test_check")


@pytest.fixture
def emitted():
    found = []
    with records.collecting(found.append):
        yield found


def product(x, start=0, stop=K):
    """x @ WEIGHT, one term after the other: no kernel has a choice here."""
    total = torch.zeros(len(x), N)
    for k in range(start, stop):
        total = total + x[:, k, None] * WEIGHT[k]
    return total


def one_ulp_up(x):
    return torch.nextafter(x, torch.tensor(torch.inf))


def splits_k_from(n_rows):
    def splits_k(x):
        return product(x) if len(x) < n_rows else product(x, 0, K // 2) + product(x, K // 2, K)

    return splits_k


# --- functions of rows ----------------------------------------------------------------------------------------------


def caught(fn, *inputs, **words) -> BatchVarianceError:
    with pytest.raises(BatchVarianceError) as error:
        assert_batch_invariant(fn, *(inputs or (POOL,)), **words)
    return error.value


def failing_batch(error: BatchVarianceError) -> list[int]:
    return json.loads(re.search(r"batch +rows (\[.*\])", str(error))[1])


def test_a_function_that_leaves_rows_alone_passes_and_says_what_was_compared():
    record = assert_batch_invariant(product, POOL, max_examples=20, seed=0)
    assert (record.verdict, record.relation, record.subject) == ("equal", "RI", "product")
    assert record.examples > len(SWEPT_SIZES) + 20
    assert record.rows > sum(SWEPT_SIZES)
    assert record.compared_bytes == (record.rows + 1 + len(POOL)) * N * 4  # and the two batches of relation R
    assert record.difference == {}


@pytest.mark.parametrize("n_rows", [2, 9, 10, 45])
def test_a_product_that_splits_k_from_a_batch_size_on_is_caught_at_that_size(n_rows):
    error = caught(splits_k_from(n_rows), max_examples=200, seed=0)
    assert len(failing_batch(error)) == n_rows
    assert error.sizes == tuple(
        size for size in (1, 2, 3, 4, 5, 7, 8, 9, 14, 15, 16, 17, 21, 28, 31, 32, 33, 35, 42, 45, 48, 49, 63, 64, 65)
        if size >= n_rows
    )  # fmt: skip
    assert f"bits change at batch sizes {as_ranges(error.sizes, TRIED_SIZES)};" in str(error)


def test_the_message_names_the_relation_the_row_and_both_values_in_hex_and_ulp():
    error = caught(splits_k_from(9))
    expected, actual = product(POOL)[0], splits_k_from(9)(POOL)[0]
    first = int((expected != actual).int().argmax())
    a, b = (int(x[first].view(torch.int32)) for x in (expected, actual))
    assert str(error).startswith("splits_k_from.<locals>.splits_k: a row has other bits in a batch than alone (rel")
    assert f"0x{a & 0xFFFFFFFF:08x}" == error.difference.expected_hex
    assert f"0x{b & 0xFFFFFFFF:08x}" == error.difference.actual_hex
    assert error.difference.ulp == abs(a - b)
    assert re.search(r"row +0, at position 0 of 9, output 0\n", str(error))
    assert str(error.difference) in str(error)


def test_the_replay_line_makes_the_batch_that_fails():
    fn = splits_k_from(9)
    line = re.search(r"replay +(.*)", str(caught(fn)))[1]
    names = {"torch": torch, "inputs": (POOL,)}
    exec(line, names)
    (batch,) = names["batch"]
    assert not torch.equal(fn(batch)[0], fn(batch[:1])[0])


def test_a_fault_at_one_position_is_caught_at_that_position():
    def off_at_31(x):
        out = product(x)
        out[31:32] = one_ulp_up(out[31:32])
        return out

    error = caught(off_at_31)
    assert len(failing_batch(error)) == 32
    assert "at position 31 of 32" in str(error)
    assert error.difference.ulp == 1
    assert error.sizes[:2] == (32, 33)  # the row keeps its position where sizes are tried


def test_a_fault_by_a_neighbour_shrinks_to_the_row_and_that_neighbour():
    pool = POOL.clamp(-1, 1)
    pool[7] *= 3

    def scaled_by_the_loudest(x):
        scale = x.abs().amax().clamp(min=1)
        return product(x / scale) * scale

    error = caught(scaled_by_the_loudest, pool)
    assert len(failing_batch(error)) == 2
    assert 7 in failing_batch(error)
    assert 2 in error.sizes


def test_noise_from_run_to_run_is_told_apart_from_batch_variance(emitted):
    ticks = itertools.count()

    def noisy(x):
        return product(x) + float(next(ticks) % 2)

    error = caught(noisy)
    assert "(relation R, run-to-run)" in str(error)
    assert "relation I" not in str(error)
    assert error.sizes == ()
    assert [record.verdict for record in emitted] == ["differs"]
    assert emitted[0].examples == 0  # no batch was compared with its rows alone


def test_noise_in_batches_only_is_noise_too():
    ticks = itertools.count()

    def noisy_in_batches(x):
        return product(x) + (float(next(ticks) % 2) if len(x) > 1 else 0.0)

    assert "(relation R, run-to-run)" in str(caught(noisy_in_batches))


def test_a_second_output_that_varies_is_named():
    def normed(x):
        return product(x), None, one_ulp_up(x) if len(x) > 1 else x

    assert "at position 0 of 2, output 1\n" in str(caught(normed))


def test_rows_along_another_dimension_are_checked_too():
    def transposed(x):
        return splits_k_from(3)(x.t()).t()

    assert len(failing_batch(caught(transposed, POOL.t().contiguous(), batch_dim=1))) == 3
    assert_batch_invariant(lambda x: product(x.t()).t(), POOL.t().contiguous(), batch_dim=1, max_examples=5)


def test_nan_rows_with_equal_bits_pass():
    pool = POOL.clone()
    pool[3] = torch.nan
    assert assert_batch_invariant(product, pool, max_examples=10).verdict == "equal"


def test_nan_that_comes_with_the_batch_is_caught():
    def nan_in_batches(x):
        return product(x) if len(x) < 4 else product(x) * torch.nan

    error = caught(nan_in_batches)
    assert error.difference.actual == "nan"
    assert error.difference.ulp is None
    assert error.sizes[0] == 4


def test_a_zero_that_changes_its_sign_is_caught():
    error = caught(lambda x: torch.zeros(len(x)) * (1.0 if len(x) < 3 else -1.0))
    assert (error.difference.expected_hex, error.difference.actual_hex) == ("0x00000000", "0x80000000")


def test_an_output_without_a_row_for_each_row_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"has the shape \[16\] for a batch of 1 rows: .* return per-row results only"):
        assert_batch_invariant(lambda x: x.sum(0), POOL)


def test_an_unknown_relation_is_refused_with_the_right_ones():
    with pytest.raises(ValueError, match="checks the relations R, I, not Q, X"):
        assert_batch_invariant(product, POOL, relations=("X", "R", "Q"))


def test_a_failure_emits_its_record_and_so_does_a_success(emitted):
    error = caught(splits_k_from(9))
    assert_batch_invariant(product, POOL, max_examples=5)
    assert [record.verdict for record in emitted] == ["differs", "equal"]
    assert emitted[0].difference["expected_hex"] == error.difference.expected_hex
    assert emitted[0].difference["sizes"] == list(error.sizes)


# --- what is drawn, and the example database ------------------------------------------------------------------------


def drawn_batches(fn, **words) -> list[list]:
    """The batches that fn was given, as bytes of their rows."""
    batches = []

    def spy(x):
        batches.append(x.numpy().tobytes())
        return fn(x)

    assert_batch_invariant(spy, POOL, **words)
    return batches


def test_a_seed_draws_the_same_batches_and_another_seed_others():
    first, again, other = (drawn_batches(product, max_examples=15, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_derandomised_profile_draws_the_same_batches_every_time():
    hypothesis.settings.register_profile("test_check_ci", derandomize=True, database=None)
    hypothesis.settings.load_profile("test_check_ci")
    assert drawn_batches(product, max_examples=15) == drawn_batches(product, max_examples=15)


FEW_ROWS = POOL[:12]


def rare_fault(x):
    """Beyond the sweep, and beyond a search of one example."""
    return product(x) if len(x) < 20 else one_ulp_up(product(x))


def fails_at_the_first_drawn_example() -> bool:
    try:
        assert_batch_invariant(rare_fault, FEW_ROWS, max_examples=1)
    except BatchVarianceError:
        return True
    return False


@pytest.fixture
def rare_beyond_the_sweep(monkeypatch):
    monkeypatch.setattr("pytest_batchinv.check._swept_rows", lambda pool: [[0], [0, 1]])


def test_a_failure_is_kept_and_replayed_first(rare_beyond_the_sweep):
    assert not fails_at_the_first_drawn_example()
    error = caught(rare_fault, FEW_ROWS, max_examples=500)
    assert fails_at_the_first_drawn_example()
    assert failing_batch(error) == failing_batch(caught(rare_fault, FEW_ROWS, max_examples=1))


def test_a_failure_is_kept_for_its_own_subject_only(rare_beyond_the_sweep):
    caught(rare_fault, FEW_ROWS, max_examples=500)

    def another_subject(x):
        return rare_fault(x)

    assert assert_batch_invariant(another_subject, FEW_ROWS, max_examples=1).verdict == "equal"


@pytest.mark.parametrize("junk", [b"", b"\x00", b"not an example", bytes(range(256)) * 20])
def test_a_corrupt_example_database_does_no_harm(rare_beyond_the_sweep, tmp_path, junk):
    use_profile(database=DirectoryBasedExampleDatabase(tmp_path))
    caught(rare_fault, FEW_ROWS, max_examples=500)
    entries = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert entries
    for path in entries:
        path.write_bytes(junk)
    assert assert_batch_invariant(product, POOL, max_examples=5).verdict == "equal"
    assert len(failing_batch(caught(rare_fault, FEW_ROWS, max_examples=500))) >= 20


# --- engines --------------------------------------------------------------------------------------------------------

VOCABULARY = 7
CENSUS = BatchShape((Row(0, 5), Row(1, 3)))  # the batch of which operators are listed


@cache
def row_logprobs(row: Row) -> torch.Tensor:
    generator = torch.Generator().manual_seed(row.id * 1000 + row.length)
    return torch.randn(row.length, VOCABULARY, generator=generator).log_softmax(-1)


class StubEngine:
    """Logprobs that depend on the row alone, but for the fault: fault(shape, position, logprobs) -> logprobs."""

    name, subject, device, dtype, attn = "stub", "stub-model", "cpu", "fp32", "none"
    layouts = ("right", "left", "packed")
    max_length, max_tokens = 40, 2048

    def __init__(self, fault=None, compile_mode="eager"):
        self.fault, self.compile_mode = fault, compile_mode
        self.seen = []

    def logprobs(self, shape):
        self.seen.append(shape)
        rows = [row_logprobs(row) for row in shape.rows]
        return [self.fault(shape, i, row) for i, row in enumerate(rows)] if self.fault else rows

    def in_eager_mode(self):
        eager = copy.copy(self)
        eager.fault, eager.compile_mode = None, "eager"
        return eager


def varies_from(n_rows):
    return lambda shape, position, row: row if len(shape) < n_rows else one_ulp_up(row)


def engine_caught(engine, **words) -> BatchVarianceError:
    with pytest.raises(BatchVarianceError) as error:
        check_engine(engine, **words)
    return error.value


def test_an_engine_that_leaves_rows_alone_has_records_of_r_and_i_with_counts(emitted):
    engine = StubEngine()
    engine.logprobs(CENSUS)  # makes the rows, whose random numbers are no operator of the model
    found = check_engine(engine, max_examples=30)
    assert found == emitted
    assert [(record.relation, record.verdict) for record in found] == [("R", "equal"), ("I", "equal")]
    run_to_run, batches = found
    swept = list(sweep(engine.layouts, engine.max_length, engine.max_tokens))
    assert batches.examples > len(swept) + 15
    assert batches.rows > sum(map(len, swept))
    assert batches.compared_bytes > 4 * VOCABULARY * sum(row.length for shape in swept for row in shape.rows)
    assert 0 < run_to_run.examples < len(swept)
    assert (batches.nan_rows, batches.not_run, batches.unclassified_ops) == (0, [], [])
    case = (batches.subject, batches.engine, batches.device, batches.dtype, batches.attn, batches.compile_mode)
    assert case == ("stub-model", "stub", "cpu", "fp32", "none", "eager")
    assert batches.machine["torch"] == torch.__version__


def test_an_operator_that_nobody_has_vouched_for_is_listed():
    def outside_the_table(shape, position, row):
        return row + 0 * torch.linalg.qr(row.t() @ row).R.sum()

    engine = StubEngine(outside_the_table)
    engine.in_eager_mode = lambda: engine
    engine.logprobs(CENSUS)
    (record,) = check_engine(engine, relations=["I"], shape=CENSUS)
    assert record.unclassified_ops == ["aten::linalg_qr"]


def test_a_row_is_run_alone_only_once():
    engine = StubEngine()
    check_engine(engine, relations=["I"], max_examples=1)
    alone = [shape for shape in engine.seen if shape == BatchShape((Row(1, 1),))]
    assert len(alone) == 1


@pytest.mark.parametrize("n_rows", [2, 16, 45])
def test_a_fault_from_a_batch_size_on_shrinks_to_that_many_rows_of_length_1(n_rows):
    error = engine_caught(StubEngine(varies_from(n_rows)), max_examples=200)
    assert error.shape == BatchShape((Row(0, 1),) * n_rows)
    assert error.sizes[0] == n_rows


def test_the_message_tells_the_case_the_row_the_bits_the_sizes_and_how_to_replay_it(monkeypatch):
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "tests/test_x.py::test_a[tiny 1] (call)")
    error = engine_caught(StubEngine(varies_from(16)))
    message, row = str(error), error.shape.rows[0]
    expected, actual = (int(x.view(torch.int32)[0, 0]) for x in (row_logprobs(row), one_ulp_up(row_logprobs(row))))
    assert message.startswith("stub-model (fp32, attention none, eager, cpu): a row has other bits in a batch than")
    assert f"id {row.id}, {row.length} tokens, {row.content}; at position 0 of 16" in message
    n_values = row.length * VOCABULARY
    assert f"{n_values} of {n_values} logprobs; the first at token 0, vocabulary index 0" in message
    assert f"(0x{expected & 0xFFFFFFFF:08x}) against" in message
    assert f"(0x{actual & 0xFFFFFFFF:08x}), 1 ulp apart" in message
    assert "bits change at batch sizes 16-" in message
    words = shlex.split(re.search(r"replay +(.*)", message)[1])
    assert words[:4] == ["pytest", "--batch-invariant", "--batchinv-model", "stub-model"]
    assert BatchShape.from_json(words[words.index("--batchinv-shape") + 1]) == error.shape
    assert words[-1] == "tests/test_x.py::test_a[tiny 1]"


def test_a_replayed_shape_is_run_alone_and_nothing_else():
    shape = BatchShape((Row(4, 3), Row(2, 5), Row(4, 3)), "left", 3)
    engine = StubEngine()
    (record,) = check_engine(engine, relations=["I"], shape=shape)
    assert (record.examples, record.rows) == (1, 3)
    assert set(engine.seen) == {shape, shape.alone(0), shape.alone(1), CENSUS}
    error = engine_caught(StubEngine(varies_from(2)), shape=shape)
    assert error.shape == shape


def test_a_fault_of_one_layout_names_the_layout():
    def off_when_packed(shape, position, row):
        return one_ulp_up(row) if shape.layout == "packed" and len(shape) > 1 else row

    error = engine_caught(StubEngine(off_when_packed))
    assert error.shape == BatchShape((Row(0, 1),) * 2, "packed")
    assert "at position 0 of 2, packed" in str(error)


def test_a_fault_at_one_position_shrinks_to_the_batch_that_ends_there():
    def off_at_31(shape, position, row):
        return one_ulp_up(row) if position == 31 else row

    error = engine_caught(StubEngine(off_at_31))
    assert error.shape == BatchShape((Row(0, 1),) * 32)
    assert "at position 31 of 32" in str(error)
    assert error.sizes[:2] == (32, 33)


def test_noise_from_run_to_run_ends_the_check_before_relation_i(emitted):
    ticks = itertools.count()
    engine = StubEngine(lambda shape, position, row: one_ulp_up(row) if next(ticks) % 3 == 0 else row)
    assert "relation R, run-to-run" in str(engine_caught(engine))
    assert [(record.relation, record.verdict) for record in emitted] == [("R", "differs")]
    assert emitted[0].difference["n_differ"] > 0


def test_relations_run_in_the_order_r_i_x_whatever_order_is_asked_for():
    found = check_engine(StubEngine(compile_mode="default"), relations=("X", "I", "R"), max_examples=3)
    assert [record.relation for record in found] == ["R", "I", "X"]


def test_eager_code_is_not_compared_with_itself():
    assert [r.relation for r in check_engine(StubEngine(), relations=("R", "X"), max_examples=3)] == ["R"]


def test_an_unknown_relation_of_an_engine_is_refused_with_the_right_ones():
    with pytest.raises(ValueError, match="R, I"):
        check_engine(StubEngine(), relations=("Q",))


def test_batches_that_could_not_run_are_recorded_and_the_check_goes_on():
    def no_room_from_9(shape, position, row):
        if len(shape) >= 9:
            raise NotRun(f"out of memory: {len(shape)} rows")
        return row

    _, record = check_engine(StubEngine(no_room_from_9), max_examples=20)
    assert record.verdict == "equal"
    assert record.examples > 0
    assert all(len(BatchShape.from_json(skipped["shape"])) >= 9 for skipped in record.not_run)
    assert "out of memory: 33 rows" in {skipped["reason"] for skipped in record.not_run}


def test_a_check_in_which_no_batch_could_run_is_no_pass(emitted):
    def no_room(shape, position, row):
        raise NotRun("out of memory")

    with pytest.raises(Exception, match="out of memory"):
        check_engine(StubEngine(no_room), max_examples=3)
    assert "equal" not in {record.verdict for record in emitted}


def test_another_error_is_recorded_as_an_error_and_raised(emitted):
    def broken(shape, position, row):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        check_engine(StubEngine(broken))
    assert [(record.verdict, record.notes) for record in emitted] == [("error", ["RuntimeError: planted"])]


def test_nan_logprobs_with_equal_bits_pass_and_are_counted():
    def nan_in_row_1(shape, position, row):
        return torch.full_like(row, torch.nan) if shape.rows[position].id == 1 else row

    shape = BatchShape((Row(0, 3), Row(1, 2), Row(1, 2)))
    (record,) = check_engine(StubEngine(nan_in_row_1), relations=["I"], shape=shape)
    assert (record.verdict, record.rows, record.nan_rows) == ("equal", 3, 2)


def test_relation_x_holds_where_compiled_logprobs_are_the_eager_ones():
    (record,) = check_engine(StubEngine(compile_mode="default"), relations=["X"])
    assert (record.verdict, record.compile_mode) == ("equal", "default")
    assert record.examples > 10


def test_relation_x_names_the_operators_whose_compiled_bits_are_others(monkeypatch, emitted):
    kept = {overload: f for overload, f in inductor._table().items() if overload not in _pointwise()}
    monkeypatch.setattr(inductor, "_table", lambda: kept)
    shape = BatchShape((Row(0, 9), Row(1, 9)))
    # A cache key of its own: the table is not part of the key, its fingerprint is.
    with batch_invariant_mode(), torch.compiler.config.patch(cache_key_tag="planted"):
        engine = TransformersEngine("tiny-llama", device="cpu", dtype="fp32", compile_mode="default")
        error = engine_caught(engine, relations=["X"], shape=shape)
    assert "compiled code gives other bits than eager code (relation X)" in str(error)
    operators = re.search(r"operators +compiled alone, other bits than in eager code: (.*)", str(error))[1]
    assert "aten::silu" in operators.split(", ")
    assert "aten::add.Tensor" not in operators.split(", ")
    assert [(record.relation, record.verdict) for record in emitted] == [("X", "differs")]


def _pointwise():
    return {overloads.overload_of(name) for name in table.POINTWISE}


# --- the negative control -------------------------------------------------------------------------------------------


def test_the_negative_control_catches_an_engine_that_varies(emitted):
    record = check_negative_control(StubEngine(varies_from(9)))
    assert (record.relation, record.verdict) == ("N", "caught")
    assert len(BatchShape.from_json(record.difference["shape"])) == 9
    assert record.difference["sizes"][0] == 9
    assert emitted == [record]


def test_the_negative_control_is_inconclusive_where_nothing_varies(emitted):
    record = check_negative_control(StubEngine(), max_examples=5)
    assert (record.relation, record.verdict, record.difference) == ("N", "inconclusive", {})
    assert record.examples > 5
    assert emitted == [record]


def test_the_negative_control_runs_with_the_mode_off_and_leaves_it_on():
    hits = []

    def counts(shape, position, row):
        with counters.counting_apart() as counted:
            torch.ones(2, 2) @ torch.ones(2, 2)
            hits.append(dict(counted))
        return row

    with batch_invariant_mode() as mode:
        check_negative_control(StubEngine(counts), max_examples=1)
        assert not any(hits[:-2])  # the last two: the census of operators, which runs after the search
        torch.ones(2, 2) @ torch.ones(2, 2)
        assert mode.hits == {"aten::mm": 1}
