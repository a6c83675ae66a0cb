"""The search finds what is cheap to find, whatever the seed, and says what it covered. The mode is off here."""

import itertools
import math
from dataclasses import replace
from datetime import timedelta
from functools import partial

import hypothesis
import msgspec
import pytest
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from pytest_batchinv import BatchVarianceError, assert_batch_invariant, check_batch_invariant, context
from pytest_batchinv.compare import first_row_that_differs
from pytest_batchinv.mutants import rows as planted
from pytest_batchinv.mutants.sequences import Sequences
from pytest_batchinv.relations import RELATIONS, Comparison
from pytest_batchinv.search import runs as search_runs
from pytest_batchinv.search import strategies, sweep
from pytest_batchinv.search.runs import SubjectRuns
from pytest_batchinv.search.shrink import smallest
from pytest_batchinv.shapes import LAYOUTS, BatchShape, Row, Steps, of_rows
from pytest_batchinv.subjects.base import RowOutputs, Space, Subject, SubjectInfo
from pytest_batchinv.subjects.rows import RowsSubject

POOLS = (4, 20, 40, 150, 320)


def caught(make, relation="I", **words) -> BatchVarianceError:
    fn, pool = make()
    with pytest.raises(BatchVarianceError) as error:
        assert_batch_invariant(fn, pool, relations=(relation,), **words)
    return error.value


def pool_space(n_rows: int) -> Space:
    return Space(tuple(Row(i) for i in range(n_rows)), (1,) * n_rows)


MODEL = Space(tuple(Row(i, 1 + 9 * i) for i in range(20)), None, LAYOUTS, max_length=300, max_tokens=2048)

# --- planted faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", POOLS)
@pytest.mark.parametrize(
    "fault, size",
    [
        (lambda n: planted.at_exactly(64, n), 64),
        (lambda n: planted.at_exactly(256, n), 256),
        (lambda n: planted.at_exactly(187, n), 187),
        (lambda n: planted.from_size(200, n), 200),
        (lambda n: planted.row_at_position(min(7, n - 1), 3, n), 4),
        (lambda n: planted.row_at_position(n - 1, 31, n), 32),
        (lambda n: planted.row_right_after(min(11, n - 1), min(4, n - 2), n), 2),
        (lambda n: planted.row_right_after(0, n - 1, n), 2),
        (lambda n: planted.while_last(min(9, n - 1), n), 2),
        (lambda n: planted.repeated(n // 2, 2, n), 2),
        (lambda n: planted.repeated(n // 2, 3, n), 3),
    ],
    ids=["exactly 64", "exactly 256", "exactly 187", "from 200", "7 at 3", "last at 31", "11 after 4", "0 after last", "9 last"]
    + ["twice", "three times"],
)
def test_a_fault_that_is_cheap_to_find_is_found_in_every_pool_and_made_small(n_rows, fault, size):
    error = caught(lambda: fault(n_rows), max_examples=1)
    assert len(error.shape) == size
    assert size in error.sizes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", planted.INVARIANT)
def test_an_invariant_function_is_equal(name, seed):
    fn, pool = planted.INVARIANT[name]()
    records = check_batch_invariant(RowsSubject(fn, [pool]), ("R", "S", "I"), seed=seed, max_examples=20)
    assert [record.verdict for record in records] == ["equal"] * 3


def test_a_fault_far_beyond_the_sweep_is_left_to_the_drawn_batches(database):
    """Three rows of one kind among others: no sweep holds it, drawn batches do."""

    def condition(ids):
        return bool((ids == 3).sum() == 5) and len(ids) > 20

    error = caught(lambda: planted.varies_where(condition, 12), max_examples=2000)
    assert len(error.shape) == 21


# --- what the sweep covers --------------------------------------------------------------------------------------------


@given(st.integers(1, 40))
def test_the_pairs_of_the_sweep_are_all_pairs_each_once(n):
    symbols = list(sweep.de_bruijn(n))
    pairs = list(itertools.pairwise(symbols))
    assert sorted(pairs) == sorted(itertools.product(range(n), repeat=2))


def covered_by(space: Space) -> sweep.Coverage:
    coverage = sweep.Coverage(space)
    for case in [*sweep.boundary_cases(space), *sweep.in_turn(sweep.covering(space), 1000.0)]:
        assert space.fits(case)
        assert not space.holds(case)
        coverage.add(case)
    return coverage


@pytest.mark.parametrize("n_rows", [1, 2, 5, 40, 150])
def test_a_whole_sweep_covers_sizes_positions_pairs_and_repeats_and_says_so(n_rows):
    words = covered_by(pool_space(n_rows)).words()
    pairs = n_rows * (n_rows - 1)
    assert words == (
        "all sizes 1-300",
        f"{n_rows * 32:,} of {n_rows} x 32 positions",
        f"{pairs:,} of {pairs:,} pairs",
        f"{n_rows} of {n_rows} rows repeated",
    )


def test_every_row_stands_last_while_every_other_one_is_there():
    last = {case.rows[-1] for case in sweep.covering(pool_space(40))[2] if len(set(case.rows)) == 40}
    assert len(last) == 40


def test_a_model_is_swept_at_all_boundaries_in_all_layouts_within_its_bounds():
    cases = sweep.boundary_cases(MODEL)
    assert all(MODEL.fits(case) for case in cases)
    assert {len(case) for case in cases} == set(MODEL.boundaries())
    small = {(len(case), case.layout) for case in cases if len(case) <= 65}
    assert small >= set(itertools.product([n for n in MODEL.boundaries() if n <= 65], LAYOUTS))


def test_a_sweep_that_is_out_of_time_says_how_far_it_came(monkeypatch):
    monkeypatch.setattr(sweep, "SECONDS", 0.0)
    (record,) = check_batch_invariant(RowsSubject(planted.invariant, [planted.pool()]), ("I",), max_examples=1)
    assert record.covered[0].startswith(f"{len(pool_space(40).boundaries())} of 300 sizes (1-5, 7-9, 14-17, ")


# --- what is drawn, and the example database --------------------------------------------------------------------------


def drawn_sizes(space: Space) -> list[int]:
    seen = []

    quiet = {"suppress_health_check": list(HealthCheck), "deadline": None, "database": None}

    @hypothesis.settings(max_examples=100, derandomize=True, phases=[Phase.generate], **quiet)
    @given(strategies.cases(space))
    def draw(case):
        assert space.fits(case)
        assert not space.holds(case)
        seen.append(len(case))

    draw()
    return seen


@pytest.mark.parametrize("space", [pool_space(40), MODEL], ids=["pool", "model"])
def test_a_hundred_drawn_batches_have_many_sizes(space):
    assert len(set(drawn_sizes(space))) >= 35


def batches_of(seed: int) -> list[tuple[int, ...]]:
    seen = []

    def spy(x):
        seen.append(tuple(planted.index_of(x).tolist()))
        return planted.invariant(x)

    assert_batch_invariant(spy, planted.pool(), max_examples=15, seed=seed)
    return seen


@pytest.mark.parametrize(
    "wanted",
    {
        "rows out of their order": lambda s: len({*s.rows}) > 2 and s.rows[0].id > s.rows[1].id > s.rows[2].id,
        "a row beside itself": lambda s: len({*s.rows}) > 1 and any(a == b for a, b in itertools.pairwise(s.rows)),
        "rows in their order": lambda s: len({*s.rows}) > 4 and all(b.id == a.id + 1 for a, b in itertools.pairwise(s.rows)),
        "padding on the right": lambda s: s.layout == "right" and s.extra_padding == 40,
        "padding on the left": lambda s: s.layout == "left" and s.extra_padding == 1,
        "no padding": lambda s: s.layout == "left" and s.extra_padding == 0,
        "packed": lambda s: s.layout == "packed" and len(s) > 1,
    }.items(),
    ids=lambda item: item[0],
)
def test_among_the_drawn_batches_of_a_model_there_are(wanted):
    once = hypothesis.settings(max_examples=5000, database=None, phases=(Phase.generate,), suppress_health_check=HealthCheck)
    hypothesis.find(strategies.cases(MODEL), wanted[1], settings=once)


@given(strategies.cases(MODEL))
def test_a_drawn_batch_of_a_model_fits_and_is_not_padded_where_it_is_packed(case):
    assert MODEL.fits(case) and not MODEL.holds(case)
    assert case.layout != "packed" or not case.extra_padding


@pytest.mark.parametrize("space", [pool_space(40), replace(MODEL, layouts=("right",), lays_out=True)], ids=["pool", "lays out"])
def test_a_subject_that_lays_its_rows_out_is_asked_for_no_padding(space):
    @given(strategies.cases(space))
    def check(case):
        assert case.extra_padding == 0

    check()


def test_a_seed_draws_the_same_batches_and_another_seed_others():
    assert batches_of(1) == batches_of(1) != batches_of(2)


def without_a_sweep(monkeypatch):
    monkeypatch.setattr(sweep, "boundary_cases", lambda space: [of_rows([0])])
    monkeypatch.setattr(sweep, "covering", lambda space: [])


def test_a_failure_is_kept_for_its_own_subject_and_replayed_first(database, monkeypatch):
    without_a_sweep(monkeypatch)

    def fails_at_once(name):
        fn, pool = planted.from_size(20, 12)
        subject = RowsSubject(fn, [pool], name=name)
        try:
            check_batch_invariant(subject, ("I",), max_examples=1)
        except BatchVarianceError:
            return True
        return False

    assert not fails_at_once("rare")
    fn, pool = planted.from_size(20, 12)
    with pytest.raises(BatchVarianceError):
        check_batch_invariant(RowsSubject(fn, [pool], name="rare"), ("I",), max_examples=500)
    assert fails_at_once("rare")
    assert not fails_at_once("another subject")


def test_a_failure_that_is_mended_is_kept_no_longer(database, monkeypatch):
    without_a_sweep(monkeypatch)
    fn, pool = planted.from_size(20, 12)
    with pytest.raises(BatchVarianceError):
        check_batch_invariant(RowsSubject(fn, [pool], name="it"), ("I",), max_examples=500)
    assert any(database.data.values())
    check_batch_invariant(RowsSubject(planted.invariant, [pool], name="it"), ("I",), max_examples=9)
    assert not any(database.data.values())


def test_with_a_seed_no_failure_is_kept_or_replayed(database, monkeypatch):
    without_a_sweep(monkeypatch)
    fn, pool = planted.from_size(20, 12)
    subject = RowsSubject(fn, [pool], name="it")
    with pytest.raises(BatchVarianceError):
        check_batch_invariant(subject, ("I",), max_examples=500, seed=0)
    assert not any(database.data.values())
    with pytest.raises(BatchVarianceError):
        check_batch_invariant(subject, ("I",), max_examples=500)
    check_batch_invariant(subject, ("I",), max_examples=1, seed=0)  # the first batch of this seed does not fail


def test_a_profile_with_a_deadline_and_health_checks_changes_nothing(database):
    hypothesis.settings.register_profile("strict", deadline=timedelta(microseconds=1), suppress_health_check=())
    hypothesis.settings.load_profile("strict")
    check_batch_invariant(RowsSubject(planted.invariant, [planted.pool()]), ("I",), max_examples=5)


# --- the smallest case ------------------------------------------------------------------------------------------------


@given(st.integers(1, 66), st.sampled_from(LAYOUTS))
def test_a_failure_from_a_batch_size_on_becomes_that_many_equal_rows(n_rows, layout):
    case = BatchShape(tuple(Row(i, 1 + i % 7, "extreme") for i in range(70)), layout, 0 if layout == "packed" else 3)
    assert smallest(case, lambda shape: len(shape) >= n_rows) == BatchShape((Row(0),) * n_rows)


def test_a_failure_of_one_layout_keeps_it():
    case = BatchShape(tuple(Row(i, 5) for i in range(9)), "packed")
    assert smallest(case, lambda s: s.layout == "packed" and len(s) > 1) == BatchShape((Row(0),) * 2, "packed")


MIXED = BatchShape(
    (Row(4, 5), Row(3, 7, "extreme"), Row(5, 9, "repeated"), Row(4, 5)),
    "left",
    extra_padding=2,
    opposite_padding=3,
    first_position=4,
    steps=Steps((2, 4, 6), rejected=2, prefix=1),
)
NOT_PADDED = msgspec.structs.replace(MIXED, extra_padding=0, opposite_padding=0)
IN_STATIC_CACHE = BatchShape((Row(4, 5), Row(3, 7)), steps=Steps((2, 4), "static", spare=3))


@pytest.mark.parametrize(
    ("case", "fails", "expected"),
    [
        (MIXED, lambda s: True, of_rows([0])),
        (MIXED, lambda s: any(row.content == "extreme" for row in s.rows), BatchShape((Row(3, 1, "extreme"),))),
        (MIXED, lambda s: any(row.id == 5 for row in s.rows), of_rows([5])),
        (MIXED, lambda s: any(row.length == 9 for row in s.rows), BatchShape((Row(0, 9),))),
        (MIXED, lambda s: any((row.id, row.length) == (5, 9) for row in s.rows), BatchShape((Row(5, 9),))),
        (MIXED, lambda s: Row(5, 9, "repeated") in s.rows, BatchShape((Row(5, 9, "repeated"),))),
        (MIXED, lambda s: {row.id for row in s.rows} >= {3, 5}, of_rows([3, 5])),
        (MIXED, lambda s: s.layout == "left", BatchShape((Row(0),), "left")),
        (MIXED, lambda s: s.extra_padding == 2, BatchShape((Row(0),), extra_padding=2)),
        (MIXED, lambda s: s.opposite_padding == 3, BatchShape((Row(0),), opposite_padding=3)),
        (MIXED, lambda s: s.first_position == 4, BatchShape((Row(0),), first_position=4)),
        (MIXED, lambda s: s.steps is not None, BatchShape((Row(0),), steps=Steps())),
        (MIXED, lambda s: s.steps is not None and s.steps.rejected == 2, BatchShape((Row(0),), steps=Steps(rejected=2))),
        (NOT_PADDED, lambda s: s.steps is not None and s.steps.prefix == 1, BatchShape((Row(0, 2),), steps=Steps(prefix=1))),
        (MIXED, lambda s: s.steps is not None and len(s.steps.ends) > 1, BatchShape((Row(0, 5),), steps=Steps((2, 4)))),
        (IN_STATIC_CACHE, lambda s: s.steps is not None, BatchShape((Row(0),), steps=Steps())),
        (
            IN_STATIC_CACHE,
            lambda s: s.steps is not None and s.steps.cache == "static",
            BatchShape((Row(0),), steps=Steps(cache="static")),
        ),
        (
            IN_STATIC_CACHE,
            lambda s: s.steps is not None and s.steps.spare == 3,
            BatchShape((Row(0),), steps=Steps(cache="static", spare=3)),
        ),
    ],
)
def test_only_what_a_failure_needs_is_left_of_its_case(case, fails, expected):
    assert smallest(case, fails) == expected


def test_bits_that_differ_are_made_small_by_batches_whose_bits_differ():
    """The boundaries of the sweep hold 14 and not 11; the search for a smaller batch comes by 11 rows."""

    def fn(x):
        if len(x) == 11:
            return x.double()
        return planted.one_ulp_up(x) if len(x) >= 14 else x

    error = caught(lambda: (fn, planted.pool()))
    assert (error.record.verdict, len(error.shape)) == ("differs", 14)


@pytest.mark.parametrize(
    "letter, words, fault, expected",
    [
        (
            "I",
            {"layouts": ("right", "packed"), "max_tokens": 310},
            lambda forward: len(forward.case) > 1 and forward.case.layout == "packed",
            BatchShape((Row(0),) * 2, "packed"),
        ),
        (
            "C",
            {"caches": ("static",)},
            lambda forward: forward.start > 0,
            BatchShape((Row(0, 2),), steps=Steps((1,), "static")),
        ),
    ],
    ids=["padded rows have more tokens", "there is no plainer cache"],
)
def test_no_batch_is_run_that_the_subject_cannot_run_while_one_is_made_small(letter, words, fault, expected):
    ran = []

    class Spy(Sequences):
        def run(self, case, observer=None):
            ran.append(case)
            return super().run(case, observer)

    subject = Spy(fault)
    subject.space = replace(subject.space, **words)
    with pytest.raises(BatchVarianceError) as caught:
        check_batch_invariant(subject, (letter,), max_examples=1)
    assert caught.value.shape == expected
    assert all(subject.space.fits(case) and not subject.space.holds(case) for case in ran)


def test_a_smaller_case_that_raises_is_no_smaller_form_of_the_finding():
    found = []

    def fn(x):
        if len(x) >= 6:
            found.append(len(x))
            return x * (1.0 + 2**-20)
        if found and len(x) > 1:
            raise ArithmeticError("planted")
        return x

    with pytest.raises(BatchVarianceError) as caught:
        check_batch_invariant(RowsSubject(fn, [planted.pool()]), ("I",))
    assert caught.value.record.finding.n_rows == 6


def test_a_profile_without_a_database_of_examples_searches_too(database):
    hypothesis.settings.register_profile("without", database=None)
    hypothesis.settings.load_profile("without")
    check_batch_invariant(RowsSubject(planted.invariant, [planted.pool()]), ("I",), max_examples=5)


def test_a_case_that_cannot_be_made_small_in_time_stays_what_it_was():
    case = of_rows(range(50))
    assert smallest(case, lambda shape: True, seconds=0.0) == case


# --- how much is run --------------------------------------------------------------------------------------------------


def test_a_row_is_run_alone_once():
    alone = []

    def spy(x):
        if len(x) == 1:
            alone.append(int(planted.index_of(x)))
        return planted.invariant(x)

    check_batch_invariant(RowsSubject(spy, [planted.pool()]), ("I",), max_examples=30)
    once = [case for case in sweep.boundary_cases(pool_space(40)) if len(case) == 1]
    sizes = [case for case in sweep.covering(pool_space(40))[0] if len(case) == 1]
    drawn = len(alone) - 40 - len(once) - len(sizes)
    assert 0 <= drawn <= 30


def test_what_is_counted_is_what_was_compared():
    (record,) = check_batch_invariant(RowsSubject(planted.invariant, [planted.pool()]), ("I",), max_examples=5)
    counts = record.counts
    assert counts.compared_bytes == counts.rows * planted.N_COLS * 4
    assert counts.forwards == counts.examples + 40
    assert torch.tensor(counts.seconds) > 0


@pytest.mark.parametrize("letter, asked, drawn", [("I", 7, 7), ("R", 7, 1), ("R", 35, 3)])
def test_a_search_tells_before_each_case_how_far_it_is(letter, asked, drawn):
    told = []
    subject = RowsSubject(planted.invariant, [planted.pool()], name="it")
    with context.surrounding(context.Context(progress=told.append)):
        (record,) = check_batch_invariant(subject, (letter,), max_examples=asked)
    cases = RELATIONS[letter].cases(subject.space)
    always, then = len(cases.first), sum(len(list(part)) for part in cases.then)
    phases = [(told.phase, told.done, told.total) for told in told]
    assert phases == [
        *(("sweep", done, always) for done in range(always)),
        *(("sweep", done, 0) for done in range(then)),
        *(("drawn", done, drawn) for done in range(drawn)),
    ]
    assert {(told.subject, told.relation) for told in told} == {("it", letter)}
    assert [told.rows for told in told[:always]] == [0, *itertools.accumulate(map(len, cases.first[:-1]))]
    assert told[-1].rows < record.counts.rows
    assert 0 <= told[0].seconds < told[-1].seconds <= record.counts.seconds


# --- what a subject's runs give ---------------------------------------------------------------------------------------

FLOATS = (torch.float32, torch.bfloat16, torch.complex64)
VALUES = (*FLOATS, torch.float8_e4m3fn, torch.int64, torch.bool)


@st.composite
def outputs_of_a_row(draw, names: tuple[str, ...], alike: bool) -> dict[str, torch.Tensor]:
    """By name; with NaN in some. alike: of one shape and dtype for each name."""

    def output(name: str) -> torch.Tensor:
        dtype = VALUES[hash_of(name) % len(VALUES)] if alike else draw(st.sampled_from(VALUES))
        shape = ((), (3,), (2, 2))[hash_of(name) % 3] if alike else draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
        numbers = st.sampled_from([0.0, 1.0, torch.nan] if dtype in FLOATS else [0.0, 1.0])
        n_values = math.prod(shape)
        return torch.tensor(draw(st.lists(numbers, min_size=n_values, max_size=n_values))).to(dtype).reshape(shape)

    return {name: output(name) for name in names}


def hash_of(name: str) -> int:
    return sum(map(ord, name))


def kinds_of(row: dict[str, torch.Tensor]) -> tuple:
    return tuple((name, x.shape, x.dtype) for name, x in row.items())


class Scripted(Subject):
    """Gives the outputs that it was told for each row, and says which batches it was given."""

    info = SubjectInfo("scripted", "function", "cpu", "fp32")

    def __init__(self, table, stacked: bool):
        self.table, self.stacked, self.space, self.ran = table, stacked, pool_space(len(table)), []

    def run(self, case, observer=None):
        self.ran.append(case)
        rows = [self.table[row.id] for row in case.rows]
        if self.stacked and len(set(map(kinds_of, rows))) == 1:
            return RowOutputs({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, shared=self.table[0])
        return RowOutputs(rows=rows, shared=self.table[0])


@st.composite
def scripted(draw) -> Scripted:
    names = tuple(draw(st.sets(st.sampled_from("abcdef"), min_size=1)))
    table = st.lists(outputs_of_a_row(names, alike=draw(st.booleans())), min_size=5, max_size=5)
    return Scripted(draw(table), stacked=draw(st.booleans()))


cases_of_5_rows = st.builds(
    lambda ids, first: msgspec.structs.replace(of_rows(ids), first_position=first),
    st.lists(st.integers(0, 4), min_size=1, max_size=9),
    st.integers(0, 1),
)


@given(scripted(), scripted(), st.lists(st.tuples(cases_of_5_rows, st.booleans()), min_size=1, max_size=4))
def test_rows_alone_are_what_the_subject_gives_for_each_and_each_is_run_once_by_itself(one, other, asked):
    runs = SubjectRuns(one)
    for case, by_other in asked:
        subject = other if by_other else one
        alone = runs.alone(case, subject) if by_other else runs.alone(case)
        rows = [subject.table[row.id] for row in case.rows]
        assert first_row_that_differs(RowOutputs(rows=rows), alone) is None
        assert (alone.stacked is not None) == (subject.stacked and len(set(map(kinds_of, rows))) == 1)
        assert not alone.shared  # which belongs to one batch
        runs.forget_most()
    for subject, by_other in ((one, False), (other, True)):
        wanted = {case.alone(p) for case, by in asked if by == by_other for p in range(len(case))}
        assert len(subject.ran) == len(wanted) and set(subject.ran) == wanted
    assert runs.stats.forwards == len(one.ran) + len(other.ran)
    assert runs.last in {*one.ran, *other.ran}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_rows_alone_with_scales_of_their_own_stay_apart():
    rows = [{"a": torch.quantize_per_tensor(torch.ones(1, 3), scale, 0, torch.qint8)} for scale in (0.5, 0.25)]

    class Quantised(Scripted):
        def run(self, case, observer=None):
            return RowOutputs(self.table[case.rows[0].id])

    alone = SubjectRuns(Quantised(rows, stacked=True)).alone(of_rows([1, 0]))
    assert [row["a"].q_scale() for row in alone] == [0.25, 0.5]


@given(scripted(), cases_of_5_rows)
def test_rows_with_a_nan_in_any_output_are_counted_and_what_is_compared_too(subject, case):
    runs = SubjectRuns(subject)
    assert runs.compare(Comparison(runs.alone(case), runs.run(case))) is None
    rows = [[output for output in subject.table[row.id].values()] for row in case.rows]
    nan_rows = sum(any(x.dtype in FLOATS and bool(x.isnan().any()) for x in row) for row in rows)
    n_bytes = sum(x.nbytes for row in rows for x in row)
    assert (runs.stats.nan_rows, runs.stats.compared_bytes) == (nan_rows, n_bytes)
    runs.compare(Comparison(runs.run(case), runs.run(case)))
    assert (runs.stats.nan_rows, runs.stats.compared_bytes) == (2 * nan_rows, 2 * n_bytes)


def test_a_relation_runs_the_subject_its_eager_code_and_others_and_all_of_it_is_counted():
    subject, eager, other = (Scripted([{"a": torch.tensor(value)}] * 2, stacked=True) for value in (1.0, 2.0, 3.0))
    subject.in_eager_mode = lambda: eager
    runs = SubjectRuns(subject)
    for n_runs, run in enumerate((runs.run, runs.run_eager, partial(runs.run_by, other)), 1):
        case = of_rows([0] * n_runs)
        assert run(case).stacked["a"].tolist() == [float(n_runs)] * n_runs
        assert (runs.stats.forwards, runs.last) == (n_runs, case)


def test_a_difference_stands_at_its_position_in_the_case():
    table = [{"a": torch.tensor([float(i)])} for i in range(5)]
    runs = SubjectRuns(Scripted(table, stacked=True))
    one, other = runs.run(of_rows([0, 1, 2])), runs.run(of_rows([0, 1, 3]))
    assert runs.compare(Comparison(one, other)).position == 2
    assert runs.compare(Comparison(one, other, (4, 5, 7))).position == 7
    assert runs.compare(Comparison(one, one, (4, 5, 7))) is None


def test_rows_alone_that_were_not_asked_for_lately_are_forgotten_between_cases_past_a_bound(monkeypatch):
    subject = Scripted([{"a": torch.zeros(8)} for _ in range(5)], stacked=True)
    runs = SubjectRuns(subject)

    def ran(*ids):
        before = len(subject.ran)
        runs.alone(of_rows(ids))
        return [case.rows[0].id for case in subject.ran[before:]]

    monkeypatch.setattr(search_runs, "ALONE_BYTES", 64)  # two rows
    assert ran(0, 1) == [0, 1]
    runs.forget_most()
    assert ran(0) == []
    assert ran(2, 3) == [2, 3]  # within a case nothing is forgotten
    assert ran(1) == []
    runs.forget_most()
    assert ran(3, 1) == []
    assert ran(0, 2) == [0, 2]
    monkeypatch.setattr(search_runs, "ALONE_BYTES", 8)  # less than one row
    runs.forget_most()
    assert ran(2) == [] != ran(0)
