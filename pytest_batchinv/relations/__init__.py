"""The registry of relations, in the order in which they are checked: noise, then leaks, then what varies with the batch."""

from __future__ import annotations

from collections.abc import Iterable

from pytest_batchinv.relations.base import Cases, Comparison, Mutant, Relation, Runs
from pytest_batchinv.relations.batch import Batch
from pytest_batchinv.relations.chunks import Chunks
from pytest_batchinv.relations.compiled import Compiled
from pytest_batchinv.relations.decode import Decode
from pytest_batchinv.relations.gradients import Gradients
from pytest_batchinv.relations.isolation import Isolation
from pytest_batchinv.relations.layout import Layout
from pytest_batchinv.relations.run_to_run import RunToRun

__all__ = ["RELATIONS", "Cases", "Comparison", "Mutant", "Relation", "Runs", "chosen"]

RELATIONS: dict[str, Relation] = {
    r.letter: r for r in (RunToRun(), Isolation(), Batch(), Layout(), Chunks(), Decode(), Gradients(), Compiled())
}


def chosen(letters: Iterable[str], who: str) -> list[Relation]:
    """The relations of these letters in the order of the registry. Raises ValueError that lists them."""
    letters = list(letters)
    unknown = sorted(set(letters) - RELATIONS.keys())
    if unknown or not letters:
        known = ", ".join(f"{letter} ({relation.words})" for letter, relation in RELATIONS.items())
        raise ValueError(f"{who} checks the relations {known}; not {', '.join(unknown) or 'none at all'}")
    return [relation for letter, relation in RELATIONS.items() if letter in letters]
