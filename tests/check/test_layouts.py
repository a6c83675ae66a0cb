"""Relations L, C and D: their cases reach what they name, and the subject that computes exactly holds them."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_batchinv import BatchVarianceError, check_batch_invariant
from pytest_batchinv.mutants import rows as planted
from pytest_batchinv.mutants.sequences import Sequences
from pytest_batchinv.relations import RELATIONS
from pytest_batchinv.report import message
from pytest_batchinv.shapes import BatchShape, Row, Steps
from pytest_batchinv.subjects.rows import RowsSubject

LCD = ("L", "C", "D")
ROWS = (Row(0, 9), Row(1, 6))


def first(letter, subject):
    return RELATIONS[letter].cases(subject.space).first


def test_what_computes_exactly_holds_every_relation():
    records = check_batch_invariant(Sequences(), ("R", "S", "I", *LCD), max_examples=50)
    assert [(record.relation, record.verdict) for record in records] == [(letter, "equal") for letter in ("R", "S", "I", *LCD)]


@pytest.mark.parametrize("letter", LCD)
def test_a_function_of_rows_has_nothing_that_could_be_asked(letter):
    (record,) = check_batch_invariant(RowsSubject(planted.invariant, [planted.pool()]), (letter,))
    assert record.verdict == "not_run"
    assert "no other layout" in record.error or "keeps no cache" in record.error


def test_every_boundary_of_a_chunked_prefill_is_swept():
    cases = RELATIONS["C"].cases(Sequences().space)
    boundaries = {case.steps.ends[0] for part in cases.then for case in part if len(case.steps.ends) == 1}
    assert boundaries == set(range(1, 33))


@given(st.data())
def test_drawn_cases_are_cases_that_the_subject_can_run(data):
    space = Sequences().space
    case = data.draw(st.one_of([RELATIONS[letter].cases(space).drawn for letter in LCD]))
    assert not space.holds(case)
    assert len(Sequences().run(case)) == len(case)
    assert BatchShape.from_json(case.to_json()) == case


def test_a_layout_or_cache_that_the_subject_cannot_do_is_in_no_case_and_is_said():
    subject = Sequences()
    subject.space = replace(subject.space, layouts=("right",), caches=("dynamic",), left_out=("left padding is left out: why",))
    assert {case.layout for letter in LCD for case in first(letter, subject)} == {"right"}
    assert not any(case.opposite_padding for case in first("L", subject))
    assert {case.steps.cache for letter in "CD" for case in first(letter, subject)} == {"dynamic"}
    (record,) = check_batch_invariant(subject, ("L",), max_examples=5)
    assert (record.verdict, record.notes) == ("equal", ("left padding is left out: why",))


def test_a_finding_is_shrunk_to_the_step_that_shows_it_and_says_why_there_is_no_trace():
    subject = Sequences(lambda forward: forward.start == 8 and forward.n_queries == 8)
    with pytest.raises(BatchVarianceError, match="a static cache with 3 spare keys, in steps that end at column 2, 4, 8"):
        check_batch_invariant(subject, ("C",), case=BatchShape(ROWS, "left", 7).in_steps(Steps((2, 4, 8), "static", spare=3)))
    with pytest.raises(BatchVarianceError) as caught:
        check_batch_invariant(Sequences(lambda forward: forward.start == 14), ("C",))
    assert caught.value.shape == BatchShape((Row(0, 15),)).in_steps(Steps((14,)))
    assert "the subject does not tell what each of its forwards computes" in message.describe(caught.value.record)


def test_a_case_in_steps_is_replayed_by_the_relations_that_know_steps_alone():
    case = BatchShape(ROWS).in_steps(Steps((3,)))
    verdicts = {}
    for letter in ("I", *LCD):
        subject = Sequences(lambda forward: forward.start == 3)
        try:
            (record,) = check_batch_invariant(subject, (letter,), case=case)
        except BatchVarianceError as error:
            record = error.record
        except Exception as error:
            verdicts[letter] = str(error)
            continue
        verdicts[letter] = record.verdict
    assert "relations L, C and D" in verdicts.pop("I")
    assert verdicts == {"L": "differs", "C": "differs", "D": "differs"}


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Steps((3, 3)), r"steps end in ascending order after the prefix, not \[0, 3, 3\]"),
        (lambda: Steps((3,), prefix=3), "ascending order after the prefix"),
        (lambda: Steps((3,), "paged"), "a cache is one of dynamic, static, sliding, not 'paged'"),
        (lambda: Steps((3,), spare=1), "only a static cache has spare keys"),
        (lambda: Steps((3,), "static", rejected=1), "a static cache cannot forget tokens"),
        (lambda: BatchShape(ROWS).in_steps(Steps((9,))), "the last step computes nothing: it begins at column 9 of 9"),
        (lambda: BatchShape(ROWS, "packed").in_steps(Steps((3,))), "a packed batch is computed at once"),
        (lambda: BatchShape(ROWS, "packed", opposite_padding=1), "a packed batch has no padding"),
        (lambda: BatchShape(ROWS, first_position=-1), "first_position is 0 or more, not -1"),
    ],
)
def test_what_are_no_steps_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_row_alone_keeps_its_positions_and_the_plain_batch_keeps_its_rows():
    case = BatchShape(ROWS, "left", 2, opposite_padding=3, first_position=5)
    assert case.width == 14
    assert case.alone(1) == BatchShape((ROWS[1],), first_position=5)
    assert case.plain() == BatchShape(ROWS, first_position=5)
    assert msgspec.structs.replace(case, steps=Steps((4,))).at_once() == case
