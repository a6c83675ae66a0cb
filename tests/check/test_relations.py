"""Each relation catches its planted faults, names itself, and leaves what is no fault of its kind alone."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from pytest_batchinv import (
    BatchVarianceError,
    assert_batch_invariant,
    batch_invariant_mode,
    check_batch_invariant,
    extensions,
)
from pytest_batchinv.mutants import rows as planted
from pytest_batchinv.mutants.sequences import Sequences
from pytest_batchinv.plugin.options import RELATIONS as OPTION_WORDS
from pytest_batchinv.relations import RELATIONS, chosen
from pytest_batchinv.relations.base import Side
from pytest_batchinv.shapes import BatchShape, Row, Steps
from pytest_batchinv.subjects.base import RowOutputs
from pytest_batchinv.subjects.ranks import OverRanks
from pytest_batchinv.subjects.rows import RowsSubject

MUTANTS = [(letter, mutant.name) for letter, relation in RELATIONS.items() for mutant in relation.mutants()]


@pytest.mark.parametrize("letter, name", MUTANTS, ids=[f"{letter}-{name}" for letter, name in MUTANTS])
def test_every_mutant_of_a_relation_is_caught_by_it(letter, name):
    (mutant,) = (mutant for mutant in RELATIONS[letter].mutants() if mutant.name == name)
    with batch_invariant_mode() if mutant.in_mode else nullcontext():
        with pytest.raises(BatchVarianceError, match=rf"relation {letter}\b"):
            check_batch_invariant(mutant.make(), (letter,), max_examples=10)


@pytest.mark.parametrize("letter", RELATIONS)
def test_every_relation_has_planted_faults_with_names_of_their_own(letter):
    mutants = RELATIONS[letter].mutants()
    names = [mutant.name for mutant in mutants]
    assert len(set(names)) == len(names) > 0
    assert all(isinstance(name, str) and callable(mutant.make) for name, mutant in zip(names, mutants, strict=True))
    assert {mutant.in_mode for mutant in mutants} == {letter == "T"}  # what the mode does over ranks


def test_the_options_name_every_relation_with_its_words():
    assert list(OPTION_WORDS) == [*RELATIONS, "N"]
    assert [relation.words for relation in RELATIONS.values()] == list(OPTION_WORDS.values())[:-1]


def test_rounding_that_follows_the_batch_size_is_no_leak_and_a_leak_is_found_before_it(emitted):
    """Relation S holds in stock torch where I does not: shapes alone decide on a kernel."""
    head, x = torch.nn.Linear(1024, 32), torch.randn(40, 1024)
    (record,) = check_batch_invariant(RowsSubject(head, [x]), ("S",), max_examples=20)
    assert record.verdict == "equal"
    with pytest.raises(BatchVarianceError, match="relation I"):
        check_batch_invariant(RowsSubject(head, [x]), ("S", "I"))
    fn, pool = planted.scaled_by_the_largest()
    with pytest.raises(BatchVarianceError, match="relation S, isolation"):
        check_batch_invariant(RowsSubject(fn, [pool]), ("R", "S", "I"))


def test_every_row_is_kept_once_while_each_of_its_neighbours_is_another():
    from pytest_batchinv.search.runs import SubjectRuns
    from pytest_batchinv.shapes import of_rows

    seen = []

    def spy(x):
        seen.append(planted.index_of(x).tolist())
        return planted.invariant(x)

    case = of_rows(range(13))
    positions = []
    for comparison in RELATIONS["S"].sides(SubjectRuns(RowsSubject(spy, [planted.pool()])), case):
        positions.append(comparison.positions)
    kept_beside_another = {
        (p, q) for kept, rows in zip(positions, seen[1:], strict=True) for p in kept for q in range(13) if rows[q] != q
    }
    assert kept_beside_another >= {(p, q) for p in range(13) for q in range(13) if p != q}


def test_a_pool_without_another_row_of_the_same_shape_cannot_be_asked_for_isolation():
    (record,) = check_batch_invariant(RowsSubject(planted.invariant, [planted.pool(1)]), ("S",))
    assert (record.verdict, record.compared_something) == ("not_run", False)
    assert "no two rows of the pool have the same shapes" in record.error


def test_eager_code_is_not_compared_with_itself():
    records = check_batch_invariant(RowsSubject(planted.invariant, [planted.pool()]), ("R", "X"), max_examples=1)
    assert [record.relation for record in records] == ["R"]


def test_compiled_functions_are_equal_to_eager_ones_in_the_mode_and_named_by_what_was_compiled():
    module = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.SiLU())
    with batch_invariant_mode():
        record = assert_batch_invariant(module, planted.pool(), relations=("R", "X"), max_examples=10)
        (other,) = check_batch_invariant(RowsSubject(torch.compile(module), [planted.pool()]), ("R",), max_examples=1)
    assert (record.relation, record.verdict, record.subject.compile_mode) == ("X", "equal", "default")
    assert (record.subject.name, other.subject.name, other.subject.compile_mode) == ("Sequential", "Sequential", "compiled")


def test_a_function_of_torch_has_the_name_that_users_write():
    assert RowsSubject(torch.tanh, (torch.zeros(2, 3),)).info.name == "torch.tanh"


def test_relation_x_names_the_operators_that_diverge_in_place_ones_too():
    def fn(x):
        y = x.abs()
        y.sqrt_()
        return torch.exp2(y)

    pool = torch.rand(40, 4096, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        BatchVarianceError, match=r"operators +compiled alone, other bits than in eager code: .*aten::"
    ) as caught:
        assert_batch_invariant(fn, pool, relations=("X",), max_examples=1)
    assert caught.value.finding.sections[0].title == "operators"


def test_relations_of_other_packages_come_after_ours_and_take_none_of_our_letters(monkeypatch):
    class Again(type(RELATIONS["R"])):
        letter = "W"

    entries = {"W": EntryPoint("W", "a_package:Again", extensions.RELATIONS)}
    monkeypatch.setitem(sys.modules, "a_package", SimpleNamespace(Again=Again))
    monkeypatch.setattr(extensions, "found", {extensions.RELATIONS: entries}.get)
    assert [relation.letter for relation in chosen(("W", "I", "R"), "a test")] == ["R", "I", "W"]
    with pytest.raises(ValueError, match=r"a test checks the relations R .*, X \(.*\), W; not Z$"):
        chosen(("W", "Z"), "a test")
    entries["I"] = EntryPoint("I", "a_package:Again", extensions.RELATIONS)
    with pytest.raises(ValueError, match="gives 'I' in pytest_batchinv.relations, which pytest-batchinv has itself"):
        chosen(("W",), "a test")


# --- what a relation says before it runs anything, and after it found something ----------------------------------------

ROWS = tuple(Row(i, 5) for i in range(6))
AT_ONCE = BatchShape(ROWS, "left", 3, opposite_padding=1, first_position=2)
STEPPED = msgspec.structs.replace(AT_ONCE, steps=Steps((4,)))


@pytest.mark.parametrize(
    "at_once, in_steps, letter",
    [
        *(("", "", letter) for letter in "RSLX"),
        *(("", "computed in steps is one of the relations L, C and D", letter) for letter in "IT"),
        ("", "computed in steps with a cache has no gradients", "G"),
        ("computed at once, so there are no chunks to compare", "", "C"),
        ("computed at once, so nothing of it is decoded", "", "D"),
    ],
)
def test_a_case_that_is_none_of_the_relations_is_not_taken_and_the_sentence_says_why(at_once, in_steps, letter):
    takes = RELATIONS[letter].takes
    for why, sentence in ((takes(AT_ONCE), at_once), (takes(STEPPED), in_steps)):
        assert sentence in why
        assert bool(sentence) == bool(why)


def of_kind(**words) -> Sequences:
    """What runs sequences, and is another subject in this."""
    subject = Sequences()
    if "compile_mode" in words:
        subject.info = msgspec.structs.replace(subject.info, **words)
    else:
        subject.space = replace(subject.space, **words)
    return subject


def pool_of(*lengths) -> RowsSubject:
    return RowsSubject(lambda rows: rows, [[torch.ones(length) for length in lengths]], collate=lambda rows: rows)


@pytest.mark.parametrize(
    "make, sentence, letter",
    [
        *((Sequences, "", letter) for letter in "RSILCD"),
        *((lambda: pool_of(2, 2, 3), "", letter) for letter in "RSI"),
        (lambda: pool_of(2, 2), "<lambda> lays its rows out by itself, so there is no other layout to ask for", "L"),
        (lambda: of_kind(lays_out=True), "sums of tokens lays its rows out by itself", "L"),
        *(
            (lambda: of_kind(caches=()), "sums of tokens keeps no cache in which it could go on (sequences, eager)", letter)
            for letter in "CD"
        ),
        (lambda: of_kind(max_rows=1), "a batch of one row has no neighbours", "S"),
        (lambda: of_kind(max_rows=2), "", "S"),
        (lambda: of_kind(shapes_follow_length=False), "rows of one length need not have the same shapes here", "S"),
        (lambda: pool_of(2, 3, 4), "no two rows of the pool have the same shapes", "S"),
        (Sequences, "sums of whole numbers have no gradients", "G"),
        (lambda: RowsSubject(planted.invariant, [planted.pool()]), "", "G"),
        (Sequences, "sums of tokens cannot be divided over ranks", "T"),
        (lambda: of_kind(compile_mode="compiled"), "what was compiled is not known, so there is no eager code", "X"),
        (lambda: RowsSubject(torch.compile(planted.invariant), [planted.pool()]), "", "X"),
    ],
)
def test_what_cannot_be_asked_of_a_subject_is_said_in_a_sentence(make, sentence, letter):
    why = RELATIONS[letter].obstacle(make())
    assert sentence in why
    assert bool(sentence) == bool(why)


class Spy:
    """Runs whose outputs are where each row stood."""

    def __init__(self, subject):
        self.subject = subject

    def run(self, case):
        return RowOutputs(rows=[{"stood": Side(case, position)} for position in range(len(case))])

    def alone(self, case, by=None):
        return RowOutputs(rows=[self.run(case.alone(position))[0] for position in range(len(case))])

    run_eager = run


@pytest.mark.parametrize("letter, case", [*((letter, AT_ONCE) for letter in "RSILG"), ("C", STEPPED), ("D", STEPPED)])
@pytest.mark.parametrize("position", range(len(ROWS)))
def test_a_trace_gets_the_two_runs_in_which_the_row_is_compared_in_their_order(letter, case, position):
    runs = Spy(Sequences())
    compared = []
    for comparison in RELATIONS[letter].sides(runs, case):
        positions = comparison.positions or range(len(case))
        for at, expected, actual in zip(positions, comparison.expected, comparison.actual, strict=True):
            compared += [(expected["stood"], actual["stood"])] if at == position else []
    assert [*RELATIONS[letter].two_runs(runs, case, position)] == compared != []
    for sides in compared:
        assert all(side.case.rows[side.position] == ROWS[position] for side in sides)
        assert (Side(case, position) in sides) and (sides[0] != sides[1]) == (letter != "R")


@pytest.mark.parametrize("letter", "TX")
def test_what_is_no_two_runs_of_eager_code_in_this_process_gets_no_trace(letter):
    assert [*RELATIONS[letter].two_runs(Spy(Sequences()), AT_ONCE, 0)] == []


class Ranks(OverRanks):
    """Ranks that give one object, or each its own."""

    def __init__(self, numbers, alike):
        self.numbers, self.alike, self.given = numbers, alike, {}

    def on(self, number):
        return tuple((number, rank) for rank in range(number))


class SpyOfRanks(Spy):
    def run_by(self, subject, case):
        number, rank = subject
        who = "in the batch", number, 0 if self.subject.alike else rank
        return self.subject.given.setdefault(who, RowOutputs(rows=[{"who": who, "p": p} for p in range(len(case))]))

    def alone(self, case, by=None):
        return RowOutputs(rows=[{"who": ("alone", *by), "p": p} for p in range(len(case))])


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("numbers", [(1, 2, 4), (2, 1), (3,)])
def test_each_rank_is_compared_with_the_first_one_and_each_number_of_ranks_with_rows_alone(numbers, alike):
    relation, runs = RELATIONS["T"], SpyOfRanks(Ranks(numbers, alike))
    told, first = {}, numbers[0]
    for expected, actual, positions in relation.sides(runs, AT_ONCE):
        assert positions is None and len(expected) == len(actual) == len(ROWS)
        for position in range(len(ROWS)):
            assert list(expected[position]) == list(actual[position])
            values = zip(expected[position].values(), actual[position].values(), strict=True)
            (one, other), (here, there) = values
            assert here == there == position
        names = {relation.sides_of(name) for name in expected[0]}
        (name,) = names
        assert [key.partition(": ")[0] for key in expected[0]] == ["who", "p"]
        told[name] = one, other

    def on(number):
        return "on 1 rank" if number == 1 else f"on {number} ranks"

    ranks = [(number, rank) for number in numbers for rank in range(1 if alike else number)]
    assert told == {
        **{
            (on(first), f"on rank {rank} of {number}"): (("in the batch", first, 0), ("in the batch", number, rank))
            for number, rank in ranks
            if (number, rank) != (first, 0)
        },
        **{
            (f"alone, {on(number)}", f"in the batch, {on(number)}"): (("alone", number, 0), ("in the batch", number, 0))
            for number in numbers
        },
    }


# --- functions of rows as subjects ------------------------------------------------------------------------------------


def ragged_pool():
    return [torch.randn(length, generator=torch.Generator().manual_seed(length)) for length in (3, 5, 3, 8, 1, 5)]


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def test_ragged_rows_are_collated_and_a_list_has_an_entry_for_each():
    def unpadded(x, lengths):
        return [row[:length] * 2 for row, length in zip(x, lengths, strict=True)]

    def leaks(x, lengths):
        return [row[:length] + x.shape[1] * 1e-3 for row, length in zip(x, lengths, strict=True)]

    for relation in ("R", "S", "I"):
        record = assert_batch_invariant(unpadded, ragged_pool(), collate=padded, relations=(relation,), max_examples=10)
        assert record.verdict == "equal"
    with pytest.raises(BatchVarianceError, match="relation I"):
        assert_batch_invariant(leaks, ragged_pool(), collate=padded, max_examples=10)


def test_nested_outputs_are_compared_row_by_row():
    def nested(x):
        return torch.nested.as_nested_tensor([row[: 1 + int(row[0]) % 3] for row in x], layout=torch.jagged)

    assert assert_batch_invariant(nested, planted.pool(), relations=("I",), max_examples=5).verdict == "equal"


def test_outputs_by_name_along_another_dimension_and_none_are_taken():
    sizes = set()

    def fn(x):
        sizes.add(len(x))
        return {"a": planted.invariant(x.t()).t(), "nothing": None}

    pool = planted.pool().t().contiguous()
    assert assert_batch_invariant(fn, pool, batch_dim=1, max_examples=3).verdict == "equal"
    assert sizes == {planted.N_COLS}

    def second_varies(x):
        return x, planted.one_ulp_up(x) if len(x) > 1 else x

    with pytest.raises(BatchVarianceError, match="at position 0 of 2; output 1"):
        assert_batch_invariant(second_varies, planted.pool())


@pytest.mark.parametrize(
    "fn, inputs, words, says",
    [
        (lambda x: x.sum(0), [planted.pool()], {}, r"has the shape \[16\] for a batch of 1 rows: .*per-row results only"),
        (lambda x: x, [], {}, "the inputs are one or more tensors whose dimension 0 indexes the rows, not none"),
        (lambda x: x, [planted.pool(), planted.pool(5)], {}, "the same number of rows, at least 1"),
        (lambda x: "a", [planted.pool()], {}, "returns a tensor, or a tuple, list or mapping of tensors, not of type str"),
        (lambda x: None, [planted.pool()], {}, "not None"),
        (lambda x: x.to_sparse(), [planted.pool()], {}, r"layout torch.sparse_coo, .*return it .to_dense\(\)"),
        (lambda x: x, [planted.pool()], {"collate": padded}, "with collate= the inputs are one or more lists of rows"),
        (lambda x: x, [planted.pool()], {"compile_mode": "fast"}, "there is no compile mode 'fast'; use one of eager, default"),
        (lambda x: x, [planted.pool()], {"case": "x"}, "case='x' is no BatchShape; BatchShape.from_json"),
        (3, [planted.pool()], {}, "is a function or a module, .*; it is of type int"),
    ],
)
def test_what_is_no_function_of_rows_is_refused_in_a_sentence(fn, inputs, words, says):
    with pytest.raises(ValueError, match=says):
        assert_batch_invariant(fn, *inputs, **words)


@pytest.mark.parametrize(
    "words", [{"case": "x"}, {"relations": ("Q",)}, {"max_examples": 0}, {"compile_mode": "fast"}, {"fn": 3}]
)
def test_a_wrong_argument_shows_the_users_frames_alone(words):
    with pytest.raises(ValueError) as caught:
        assert_batch_invariant(words.pop("fn", torch.exp), planted.pool(), **words)
    assert {entry.path for entry in caught.traceback.filter(caught)} == {Path(__file__)}
