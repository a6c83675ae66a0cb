"""A record tells what happened: a crash, a refusal, an interruption and a shape that follows the batch are no "equal"."""

import itertools
import re
import warnings
from contextlib import nullcontext
from dataclasses import replace

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_batchinv import (
    BatchShape,
    BatchVarianceError,
    assert_batch_invariant,
    batch_invariant_mode,
    check_batch_invariant,
    check_negative_control,
    context,
)
from pytest_batchinv.check import UnverifiedError, check_engine
from pytest_batchinv.diagnose import account, coverage
from pytest_batchinv.kernels.aten.common import Refused
from pytest_batchinv.mode import ModeError, stock_torch
from pytest_batchinv.mutants import rows as planted
from pytest_batchinv.report.record import Breakpoints, Counts, Finding, OpCoverage, Record, Section, Skipped
from pytest_batchinv.search import sweep
from pytest_batchinv.shapes import of_rows
from pytest_batchinv.subjects.base import NotRun, SubjectInfo
from pytest_batchinv.subjects.rows import RowsSubject

POOL = planted.pool(9)


def subject(fn, pool=POOL, **words) -> RowsSubject:
    return RowsSubject(fn, [pool], **words)


def recording():
    """A function without a fault, and the rows of each batch that it is given."""
    seen = []

    def fn(x):
        seen.append(planted.index_of(x).tolist())
        return planted.invariant(x)

    return fn, seen


def raising(error):
    raise error


def from_5_rows(error):
    def fn(x):
        if len(x) >= 5:
            raising(error)
        return planted.invariant(x)

    return fn


# --- what is no "equal" -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, verdict",
    [
        (RuntimeError("planted"), "error"),
        (MemoryError("planted"), "error"),
        (Refused("planted"), "refused"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(3), "interrupted"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("relation", ["R", "S", "I"])
def test_what_a_function_raises_is_recorded_with_the_batch_and_raised(emitted, relation, error, verdict):
    with pytest.raises(type(error)) as caught:
        assert_batch_invariant(from_5_rows(error), POOL, relations=(relation,))
    assert caught.value is error
    (record,) = emitted
    assert (record.relation, record.verdict) == (relation, verdict)
    words = f": {error}" if str(error) else ""
    assert record.error == f"{type(error).__name__}{words}"
    assert len(BatchShape.from_json(record.case)) >= 5
    assert record.machine["torch"] == torch.__version__


class Wrapping(Exception):
    """As torch's exceptions of compiled code."""

    inner_exception: BaseException | None = None


def wrapped(how, inner):
    outer = Wrapping("while running the model")
    setattr(outer, how, inner)
    return outer


@pytest.mark.parametrize("wraps", [*itertools.product(("inner_exception", "__cause__", "__context__"), repeat=2)], ids="-".join)
def test_a_refusal_that_dynamo_or_a_caller_wrapped_is_a_refusal(emitted, wraps):
    error = Refused("planted")
    for how in wraps:
        error = wrapped(how, error)
    with pytest.raises(Wrapping):
        assert_batch_invariant(from_5_rows(error), POOL)
    assert emitted[-1].verdict == "refused"


def test_errors_that_wrap_each_other_in_a_ring_are_an_error(emitted):
    one, other = Wrapping("one"), Wrapping("other")
    one.inner_exception, other.inner_exception = other, one
    with pytest.raises(Wrapping):
        assert_batch_invariant(from_5_rows(one), POOL, relations=("I",))
    assert emitted[-1].verdict == "error"


@pytest.mark.parametrize(
    "fn, kinds",
    [
        (lambda x: x.repeat(1, 1 + (len(x) > 3)), ("float32 [16]", "float32 [32]")),
        (lambda x: x.double() if len(x) > 3 else x, ("float32 [16]", "float64 [16]")),
    ],
    ids=["shape", "dtype"],
)
def test_a_shape_or_dtype_that_follows_the_batch_is_a_verdict_of_its_own(emitted, fn, kinds):
    with pytest.raises(BatchVarianceError, match=re.escape(f"{kinds[0]} alone against {kinds[1]} in the batch")) as caught:
        assert_batch_invariant(fn, POOL)
    assert [record.verdict for record in emitted] == ["equal", "shape_differs"]
    assert len(caught.value.shape) == 4
    assert caught.value.sizes[0] == 4


def test_a_check_in_which_no_batch_could_run_is_no_pass(emitted):
    def no_memory(x):
        raise NotRun("out of memory")

    with pytest.raises(NotRun, match="no batch could run, so nothing was compared: out of memory"):
        assert_batch_invariant(no_memory, POOL)
    assert [record.verdict for record in emitted] == ["not_run"]


def test_where_no_batch_could_run_the_first_reason_is_told():
    def no_memory(x):
        raise NotRun(f"out of memory for {len(x)} rows")

    for case in (None, of_rows([0])):
        with pytest.raises(NotRun, match="no batch could run, so nothing was compared: out of memory for 1 rows"):
            assert_batch_invariant(no_memory, POOL, case=case)


def test_batches_that_could_not_run_are_recorded_and_the_check_goes_on():
    def no_memory_from_9(x):
        if len(x) >= 9:
            raise NotRun(f"out of memory: {len(x)} rows")
        return planted.invariant(x)

    (record,) = check_batch_invariant(subject(no_memory_from_9), ("I",), max_examples=5)
    assert record.verdict == "equal"
    assert all(len(BatchShape.from_json(skipped.case)) >= 9 for skipped in record.not_run)
    assert "out of memory: 33 rows" in {skipped.reason for skipped in record.not_run}


def test_a_second_interrupt_while_a_finding_is_explained_keeps_the_finding(emitted, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(account, "_breakpoints", interrupted)
    fn, pool = planted.from_size(2)
    with pytest.raises(KeyboardInterrupt):
        assert_batch_invariant(fn, pool, relations=("I",))
    assert emitted[0].verdict == "differs"
    assert emitted[0].finding.n_rows == 2


@pytest.mark.parametrize("diagnosis", ["_breakpoints"])
def test_a_diagnosis_that_fails_neither_hides_nor_changes_the_finding(emitted, monkeypatch, diagnosis):
    fn, pool = planted.from_size(2)
    with pytest.raises(BatchVarianceError) as explained:
        assert_batch_invariant(fn, pool, relations=("I",))

    def broken(*_):
        raise RuntimeError("planted in the diagnosis")

    monkeypatch.setattr(account, diagnosis, broken)
    with pytest.raises(BatchVarianceError, match="could not be told: RuntimeError: planted in the diagnosis") as caught:
        assert_batch_invariant(fn, pool, relations=("I",))
    assert [record.verdict for record in emitted] == ["differs", "differs"]
    bare = msgspec.structs.replace(explained.value.finding, breakpoints=None, sections=())
    assert msgspec.structs.replace(caught.value.finding, sections=()) == bare


def test_op_coverage_that_fails_is_said_and_the_verdict_stays(monkeypatch):
    def broken(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(coverage, "op_coverage", broken)
    with batch_invariant_mode():
        (record,) = check_batch_invariant(subject(planted.invariant), ("R",), max_examples=1)
    assert (record.verdict, record.ops.error) == ("equal", "RuntimeError: planted")


# --- diagnosis runs once, after the search ----------------------------------------------------------------------------


def test_sizes_are_explained_once_on_the_smallest_batch(monkeypatch):
    explained = []
    true_breakpoints = account.sizes.breakpoints

    def spy(case, *args, **words):
        explained.append(case)
        return true_breakpoints(case, *args, **words)

    monkeypatch.setattr(account.sizes, "breakpoints", spy)
    fn, pool = planted.from_size(45)
    with pytest.raises(BatchVarianceError) as caught:
        assert_batch_invariant(fn, pool)
    assert [len(case) for case in explained] == [45]
    assert caught.value.sizes == tuple(range(45, 301))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 300), last=st.integers(0, 300))
def test_breakpoints_hold_the_failing_size_and_are_exact(size, last):
    """One range of sizes that differ: bisection finds both of its ends wherever they are."""
    last = max(size, last)
    case, space = of_rows([0] * size), subject(planted.invariant).space
    found = account.sizes.breakpoints(case, 0, space, lambda shape, position: size <= len(shape) <= last)
    assert size in found.sizes
    if last == 300 or last > size + 20:
        assert found.ranges == ((size, last),)
    assert found.bound == 300
    assert found.tried < 80


# --- what a record holds ----------------------------------------------------------------------------------------------


def test_a_record_says_what_was_covered_by_which_seed_and_shows_no_case_where_all_is_equal(emitted):
    (equal,) = check_batch_invariant(subject(planted.invariant), ("I",), max_examples=1, seed=5)
    assert (equal.verdict, equal.seed, equal.case, equal.error, equal.finding) == ("equal", 5, "", "", None)
    assert equal.covered[0] == "all sizes 1-300"
    fn, pool = planted.from_size(9)
    with pytest.raises(BatchVarianceError) as caught:
        check_batch_invariant(subject(fn, pool), ("I",), seed=6)
    record = caught.value.record
    assert (record.seed, record.error, record.case) == (6, "", record.finding.case)


def test_a_record_says_whether_the_mode_was_on_and_which_operators_ran():
    head = torch.nn.Linear(16, 4)

    def fn(x):
        return torch.linalg.vander(head(x)[:, :1], N=2) if x.dtype == torch.complex64 else torch.erfinv(head(x).tanh())

    (off,) = check_batch_invariant(subject(planted.invariant), ("R",), max_examples=1)
    with batch_invariant_mode():
        (on,) = check_batch_invariant(subject(fn, torch.randn(9, 16)), ("R",), max_examples=1)
        control = check_negative_control(subject(planted.invariant), max_examples=1)
    assert (off.mode, on.mode, control.mode) == ("off", "on", "stock")
    assert off.ops is None and control.ops is None
    assert {"aten::addmm", "aten::tanh"} <= set(on.ops.covered)
    assert on.hits["aten::tanh"] == on.counts.forwards
    assert on.fingerprint and on.receipt["torch"] == torch.__version__


def test_a_record_counts_the_calls_that_the_table_answered_in_its_own_check():
    with batch_invariant_mode():
        records = [check_batch_invariant(subject(fn), ("R",), max_examples=1)[0] for fn in (torch.tanh, torch.exp, torch.tanh)]
    hits = [record.hits for record in records]
    assert hits[0] == hits[2] == {"aten::tanh": records[0].counts.forwards}
    assert hits[1] == {"aten::exp": records[1].counts.forwards}


def test_an_operator_that_nobody_vouches_for_is_named_for_a_function_of_rows():
    with batch_invariant_mode():
        record = assert_batch_invariant(lambda x: x + 0 * torch.linalg.qr(x.t() @ x).R.sum(), POOL, relations=("R",))
    assert record.unclassified_ops == ["aten::linalg_qr"]


def test_operators_that_ran_past_the_table_make_equal_bits_prove_nothing(emitted):
    def bypasses(x):
        with stock_torch():
            return x.double() @ x.double().t()[:, :1].sum(1, keepdim=True).new_ones(16, 1)

    with batch_invariant_mode(), pytest.raises(ModeError, match=r"aten::mm.* ran past the table, so equal bits prove nothing"):
        assert_batch_invariant(bypasses, POOL, relations=("R",))
    assert emitted[0].verdict == "error"


@pytest.mark.parametrize(
    "ops, says",
    [
        (OpCoverage({"aten::mm": 3}, ("aten::add",)), ""),
        (OpCoverage({}, (), ("aten::a", "aten::b")), "aten::a, aten::b ran, .*: docs/coverage.md says"),
        (OpCoverage({}, (), ("aten::a",), not_scanned="scan it first"), "aten::a ran, .*: scan it first."),
        (OpCoverage(error="RuntimeError: planted"), r"it is not known which operators ran \(RuntimeError: planted\)"),
    ],
    ids=["none", "some", "not scanned", "not known"],
)
def test_strict_refuses_what_nobody_vouches_for_and_says_what_to_do(emitted, monkeypatch, ops, says):
    monkeypatch.setattr(coverage, "op_coverage", lambda *_: ops)
    with batch_invariant_mode(), context.surrounding(context.Context(strict=True, emit=emitted.append)):
        with pytest.raises(UnverifiedError, match=says) if says else nullcontext():
            assert_batch_invariant(planted.invariant, POOL, relations=("R",), max_examples=1)
    assert [(record.verdict, record.ops) for record in emitted] == [("error" if says else "equal", ops)]


def test_operators_are_asked_for_of_one_row_too_but_neither_after_an_error_nor_elsewhere(emitted):
    def alone_otherwise(x):
        return torch.erfinv(x.tanh()) if len(x) == 1 else x.tanh()

    elsewhere = subject(planted.invariant)
    elsewhere.info = SubjectInfo("far", "function", "a server", "fp32", elsewhere=True)
    with batch_invariant_mode():
        check_batch_invariant(subject(alone_otherwise), ("R",), max_examples=1)
        check_batch_invariant(elsewhere, ("R",), max_examples=1)
        with pytest.raises(RuntimeError):
            check_batch_invariant(subject(from_5_rows(RuntimeError("planted"))), ("R",))
    asked, not_here, failed = [record.ops for record in emitted]
    assert "aten::erfinv" in {*asked.covered, *asked.row_local, *asked.unverified}
    assert not_here is failed is None
    assert [record.mode for record in emitted] == ["on", "elsewhere", "on"]


def test_an_own_kernel_without_a_covered_operator_is_equal_in_the_mode():
    with batch_invariant_mode():
        record = assert_batch_invariant(planted.invariant, POOL, max_examples=3)
    assert (record.verdict, record.mode, record.compared_something) == ("equal", "on", True)


@given(st.builds(Counts), st.sampled_from(["equal", "differs", "interrupted"]), st.booleans())
def test_a_record_cannot_be_changed_and_goes_to_json_and_back(counts, verdict, with_finding):
    finding = Finding(
        case='{"rows":[0,1]}', position=1, n_rows=2, row='{"id":1}', output="the output", sides=("alone", "in the batch"),
        kind="bits", index=(1, 2), expected="1.0", actual="nan", expected_hex="0x00", actual_hex="0x01", ulp=None, n_differ=1,
        n_total=9, breakpoints=Breakpoints(((2, 3),), 40, 300), sections=(Section("sizes", ("a", "b")),), replay="pytest",
    )  # fmt: skip
    record = Record(
        subject=SubjectInfo("f", "function", "cpu", "fp32"), relation="I", verdict=verdict, mode="on", counts=counts,
        finding=finding if with_finding else None, ops=OpCoverage({"aten::mm": 3}, ("aten::add",), ("aten::qr",)),
        not_run=(Skipped('{"rows":[0]}', "no memory"),),
    )  # fmt: skip
    assert Record.from_json(record.to_json()) == record
    with pytest.raises(AttributeError):
        record.verdict = "equal"
    with pytest.raises(ValueError, match="not a record of schema 3"):
        Record.from_json(record.to_json().replace(f'"verdict":"{verdict}"', '"verdict":"fine"'))


# --- controls, replay, words ------------------------------------------------------------------------------------------


def test_the_negative_control_catches_what_varies_and_is_inconclusive_otherwise(emitted):
    fn, pool = planted.from_size(9)
    record = check_negative_control(subject(fn, pool))
    assert (record.relation, record.verdict, record.control, record.finding.n_rows) == ("I", "caught", True, 9)
    other = check_negative_control(subject(planted.invariant), max_examples=5)
    assert (other.verdict, other.finding) == ("inconclusive", None)
    assert emitted == [record, other]


def test_a_control_whose_subject_breaks_is_an_error_and_not_inconclusive(emitted):
    with pytest.raises(RuntimeError, match="planted"):
        check_negative_control(subject(from_5_rows(RuntimeError("planted"))))
    assert emitted[0].verdict == "error"


def test_a_control_of_what_another_process_computes_is_refused_with_the_reason():
    elsewhere = subject(planted.invariant)
    elsewhere.info = SubjectInfo("far", "function", "a server", "fp32", elsewhere=True)
    with pytest.raises(ValueError, match=r"far is computed by a server, where stock_torch\(\) changes nothing"):
        check_negative_control(elsewhere)


@pytest.mark.parametrize("asked", [("N",), ("I", "N"), ("N", "R")])
def test_the_control_comes_last_of_the_relations_and_is_drawn_by_the_same_seed(emitted, asked):
    def drawn(seed):
        fn, seen = recording()
        records = check_batch_invariant(subject(fn), asked, max_examples=20, seed=seed)
        letters = [(record.relation, record.control) for record in records]
        assert letters == [*((letter, False) for letter in asked if letter != "N"), ("I", True)]
        assert records == emitted[-len(asked) :]
        return seen

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("beside", [False, True])
def test_a_control_draws_as_many_batches_as_it_is_told(beside):
    def control(n):
        if beside:
            return check_batch_invariant(subject(planted.invariant), ("N",), max_examples=n)[-1]
        return check_negative_control(subject(planted.invariant), max_examples=n)

    assert control(1).counts.examples < control(100).counts.examples


def test_an_assertion_with_a_seed_draws_the_same_batches_again():
    def drawn(seed):
        fn, seen = recording()
        assert_batch_invariant(fn, POOL, relations=("I",), max_examples=20, seed=seed)
        return seen

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("check", [check_batch_invariant, check_negative_control])
def test_a_wrong_number_of_examples_is_refused_by_the_name_of_what_was_called(check):
    with pytest.raises(ValueError, match=f"^{check.__name__}: max_examples=0"):
        check(subject(planted.invariant), max_examples=0)


def test_a_given_case_is_run_and_nothing_else():
    fn, seen = recording()
    case = of_rows([4, 2, 4])
    (record,) = check_batch_invariant(subject(fn), ("I",), case=case)
    assert (record.replayed, record.counts.examples, record.counts.rows) == (True, 1, 3)
    assert record.covered == ("the one batch that was given",)
    assert sorted(seen) == [[2], [4], [4, 2, 4]]


def test_the_case_of_the_surroundings_is_run_and_one_that_does_not_fit_is_left_out(emitted):
    surrounding = context.Context(case=of_rows([0, 20]), emit=emitted.append)
    with context.surrounding(surrounding):
        fn, pool = planted.from_size(2)
        with pytest.raises(BatchVarianceError) as caught:
            assert_batch_invariant(fn, pool, relations=("I",))
        record = assert_batch_invariant(planted.invariant, POOL, relations=("I",))
    assert caught.value.shape.rows == of_rows([0, 20]).rows
    assert (record.verdict, record.compared_something) == ("not_run", False)
    assert "there is no row 20 in a pool of 9" in record.error
    with pytest.raises(NotRun, match="there is no row 20 in a pool of 9"):
        assert_batch_invariant(planted.invariant, POOL, case=of_rows([20]))


def test_a_control_searches_whatever_case_the_surroundings_give(emitted):
    with context.surrounding(context.Context(case=of_rows([0]), emit=emitted.append)):
        fn, pool = planted.from_size(9)
        check_negative_control(subject(fn, pool))
    assert [(record.verdict, record.replayed, record.finding.n_rows) for record in emitted] == [("caught", False, 9)]


def test_a_record_has_the_notes_of_the_subject_and_of_what_the_relation_made_of_it():
    class Noting(RowsSubject):
        def __init__(self, note):
            super().__init__(planted.invariant, [POOL])
            self.note, self.space = note, replace(self.space, left_out=("left out",))

        def notes(self):
            return (self.note,)

        def with_gradients(self):
            return Noting("of its gradients")

    records = check_batch_invariant(Noting("of itself"), ("R", "G"), max_examples=1)
    assert [record.notes for record in records] == [("left out", "of itself"), ("left out", "of itself", "of its gradients")]


@pytest.mark.parametrize("given_seed, seed", [(None, 7), (0, 0), (8, 8)])
@pytest.mark.parametrize("given_examples, drawn", [(None, 2), (3, 3)])
def test_seed_and_number_of_examples_are_those_of_the_surroundings_where_none_is_given(given_seed, seed, given_examples, drawn):
    told = []
    with context.surrounding(context.Context(seed=7, max_examples=2, progress=told.append)):
        (record,) = check_batch_invariant(subject(planted.invariant), ("I",), seed=given_seed, max_examples=given_examples)
    assert record.seed == seed
    assert [told.total for told in told if told.phase == "drawn"] == [drawn] * drawn


def test_a_replay_on_other_rows_says_so():
    fn, pool = planted.from_size(2)
    with pytest.raises(BatchVarianceError) as caught:
        assert_batch_invariant(fn, pool, relations=("I",))
    case = caught.value.shape
    with pytest.raises(BatchVarianceError) as same:
        assert_batch_invariant(fn, pool, relations=("I",), case=case)
    with pytest.raises(BatchVarianceError) as other:
        assert_batch_invariant(fn, pool * 2, relations=("I",), case=case)
    assert same.value.record.notes == ()
    assert "the rows are not those of the finding" in other.value.record.notes[0]
    assert same.value.finding.expected_hex == caught.value.finding.expected_hex


def test_the_message_names_relation_row_values_sizes_mode_and_replay(monkeypatch):
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "tests/test_x.py::test_a[tiny 1] (call)")
    fn, pool = planted.from_size(9)
    with pytest.raises(BatchVarianceError) as caught:
        assert_batch_invariant(fn, pool)
    text = str(caught.value)
    assert "varies_where.fn (fp32, eager, cpu): a row has other bits in a batch than alone (relation I" in text
    assert "row         0, at position 0 of 9; the output" in text
    assert re.search(r"16 of 16 values; the first at \[0\]:\n.*0x3f800000\) alone, .*\(0x3f800001\) in the batch, 1 ulp", text)
    assert "bits change at batch sizes 9-300;" in text
    assert "mode        off: this is torch as it is" in text
    assert 'replay      pytest --batch-invariant --batchinv-shape \'{"rows":[0,0,0,0,0,0,0,0,0]' in text
    assert text.endswith("'tests/test_x.py::test_a[tiny 1]'")


CHECKS = [
    lambda fn, **words: assert_batch_invariant(fn, POOL, **words),
    lambda fn, **words: check_batch_invariant(subject(fn), **words),
    lambda fn, **words: check_engine(subject(fn), **words),
    lambda fn: check_negative_control(subject(fn)),
]


@pytest.mark.parametrize("check", CHECKS)
def test_a_users_error_shows_the_users_frames_and_none_of_ours(check):
    with pytest.raises(RuntimeError) as caught:
        check(from_5_rows(RuntimeError("planted")))
    files = [entry.path.name for entry in caught.traceback if entry.frame.f_globals["__name__"].startswith("pytest_batchinv")]
    shown = [entry for entry in caught.traceback if not entry.ishidden(caught)]
    assert set(files) <= {"check.py"}
    assert [entry.path.name for entry in shown] == ["test_verdicts.py"] * 4  # the test, its lambda, the function, what it calls


def test_an_error_of_our_own_shows_where_it_was_raised():
    with pytest.raises(NotRun) as caught:
        assert_batch_invariant(planted.invariant, POOL, case=of_rows([20]))
    files = [entry.path.name for entry in caught.traceback]
    assert (files[0], files[-1]) == ("test_verdicts.py", "find.py")


def test_the_name_of_the_check_up_to_0_1_is_the_check(emitted):
    records = check_engine(subject(planted.invariant), max_examples=1)
    assert [record.relation for record in records] == ["R", "I"]
    assert records[1].counts.examples < check_engine(subject(planted.invariant), relations=("I",))[0].counts.examples
    (record,) = check_engine(subject(planted.invariant), relations=("I",), shape=of_rows([4, 2]))
    assert (record.replayed, record.counts.rows) == (True, 2)


# --- what was asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "relations, wrong", [(("Q",), "Q"), ((), "none at all"), (("R", "Z", "Q"), "Q, Z"), (("N",), "N")], ids=repr
)
def test_an_unknown_relation_is_refused_with_the_right_ones(relations, wrong):
    right = r"assert_batch_invariant checks the relations R \(run to run\), S \(.*\), I"
    with pytest.raises(ValueError, match=f"^{right}.*; not {wrong}$"):
        assert_batch_invariant(planted.invariant, POOL, relations=relations)


@pytest.mark.parametrize("max_examples", [0, -1, "5", 2.5, True])
def test_a_wrong_number_of_examples_is_refused_in_a_sentence(max_examples):
    with pytest.raises(ValueError, match=f"max_examples={max_examples!r} is not a whole number from 1 on"):
        assert_batch_invariant(planted.invariant, POOL, max_examples=max_examples)


def test_relations_run_in_the_order_r_s_i_x_and_end_at_the_first_that_does_not_hold(emitted):
    ticks = itertools.count()
    noisy = subject(lambda x: planted.invariant(x) + float(next(ticks) % 2))
    with pytest.raises(BatchVarianceError, match="relation R, run to run"):
        check_batch_invariant(noisy, ("X", "I", "S", "R"))
    assert [(record.relation, record.verdict) for record in emitted] == [("R", "differs")]
    equal = check_batch_invariant(subject(planted.invariant), ("I", "R", "S"), max_examples=1)
    assert [record.relation for record in equal] == ["R", "S", "I"]


def test_a_nan_of_equal_bits_is_equal_and_counted():
    pool = POOL.clone()
    pool[3, 1:] = torch.nan
    (record,) = check_batch_invariant(subject(planted.invariant, pool), ("I",), case=of_rows([0, 3, 3]))
    assert (record.verdict, record.counts.nan_rows) == ("equal", 2)


def test_warnings_are_not_raised_by_a_check_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_batch_invariant(planted.invariant, POOL, max_examples=3)


# --- what the subject raises after the finding -------------------------------------------------------------------------


def varies_from_14_and_raises_at_11(error):
    """The boundaries of the sweep hold 14 and not 11; the search for a smaller batch comes by 11 rows."""

    def fn(x):
        if len(x) == 11:
            raise error
        return planted.one_ulp_up(planted.invariant(x)) if len(x) >= 14 else planted.invariant(x)

    return fn


def test_a_function_that_raises_while_its_finding_is_made_small_does_not_hide_the_finding(emitted):
    with pytest.raises(BatchVarianceError) as caught:
        assert_batch_invariant(varies_from_14_and_raises_at_11(RuntimeError("planted")), POOL, relations=("I",))
    assert [record.verdict for record in emitted] == ["differs"]
    assert caught.value.finding.n_rows == 14


def test_an_interrupt_while_a_finding_is_made_small_keeps_the_finding(emitted):
    with pytest.raises(KeyboardInterrupt):
        assert_batch_invariant(varies_from_14_and_raises_at_11(KeyboardInterrupt()), POOL, relations=("I",))
    (record,) = emitted
    assert (record.verdict, record.finding.n_rows) == ("differs", 14)
    assert record.finding.breakpoints is None and record.finding.sections == ()  # who interrupts waits for no diagnosis


def test_a_difference_that_is_not_there_when_the_drawn_batch_is_run_again_is_a_finding(emitted, monkeypatch):
    """Noise that relation R missed: Hypothesis runs a failing example again, and calls it flaky where it is equal then."""
    monkeypatch.setattr(sweep, "boundary_cases", lambda space: [of_rows([0])])
    monkeypatch.setattr(sweep, "covering", lambda space: [])
    ticks = itertools.count()

    def fn(x):
        hit = len(x) > 20 and next(ticks) == 0
        return planted.one_ulp_up(planted.invariant(x)) if hit else planted.invariant(x)

    with pytest.raises(BatchVarianceError):
        assert_batch_invariant(fn, POOL, relations=("I",), seed=0)
    assert [record.verdict for record in emitted] == ["differs"]


def test_an_interrupt_after_a_control_was_caught_is_not_swallowed(emitted):
    with pytest.raises(KeyboardInterrupt):
        check_negative_control(subject(varies_from_14_and_raises_at_11(KeyboardInterrupt())))
    assert [record.verdict for record in emitted] == ["caught"]


def test_outputs_without_values_are_no_pass(emitted):
    with pytest.raises(NotRun, match="the outputs hold no values, so nothing was compared"):
        assert_batch_invariant(lambda x: x[:, :0], POOL)
    assert [record.verdict for record in emitted] == ["not_run"]
    record = assert_batch_invariant(lambda x: (x, x[:, :0]), POOL, max_examples=3)
    assert record.verdict == "equal"
