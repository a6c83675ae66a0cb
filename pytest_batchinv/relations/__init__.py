"""The registry of relations, in the order in which they are checked: noise, then leaks, then what varies with the batch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from pytest_batchinv import extensions
from pytest_batchinv.letters import in_order
from pytest_batchinv.relations.base import Cases, Comparison, Mutant, Relation, Runs
from pytest_batchinv.relations.batch import Batch
from pytest_batchinv.relations.chunks import Chunks
from pytest_batchinv.relations.compiled import Compiled
from pytest_batchinv.relations.decode import Decode
from pytest_batchinv.relations.gradients import Gradients
from pytest_batchinv.relations.isolation import Isolation
from pytest_batchinv.relations.layout import Layout
from pytest_batchinv.relations.run_to_run import RunToRun
from pytest_batchinv.relations.tensor_parallel import TensorParallel

__all__ = ["RELATIONS", "Cases", "Comparison", "Mutant", "Relation", "Runs", "chosen"]

RELATIONS: dict[str, Relation] = {
    r.letter: r
    for r in (RunToRun(), Isolation(), Batch(), Layout(), Chunks(), Decode(), Gradients(), TensorParallel(), Compiled())
}


def chosen(letters: Iterable[str], who: str) -> list[Relation]:
    """The relations of these letters: ours in the order of the registry, then those of other packages. Raises ValueError."""
    asked = in_order(letters)
    unknown = [letter for letter in asked if letter not in RELATIONS]
    theirs = extensions.names(extensions.RELATIONS, tuple(RELATIONS)) if unknown else ()
    unknown = [letter for letter in unknown if letter not in theirs]
    if unknown or not asked:
        known = ", ".join((*(f"{letter} ({relation.words})" for letter, relation in RELATIONS.items()), *theirs))
        raise ValueError(f"{who} checks the relations {known}; not {', '.join(unknown) or 'none at all'}")
    return [of_letter(letter) for letter in asked]


def of_letter(letter: str) -> Relation:
    """One of ours, or of another package, by the entry point of this name. Raises ValueError for what is no relation."""
    return RELATIONS[letter] if letter in RELATIONS else _of_another_package(letter)


@cache
def _of_another_package(letter: str) -> Relation:
    given = extensions.load(extensions.RELATIONS, letter)
    relation = given() if isinstance(given, type) else given
    if not isinstance(relation, Relation) or getattr(relation, "letter", None) != letter:
        raise ValueError(
            f"the entry point {letter!r} of {extensions.RELATIONS} gives {relation!r}; it gives a class or an object of "
            f"pytest_batchinv.relations.Relation whose letter is {letter!r}"
        )
    return relation
