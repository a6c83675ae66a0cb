"""Which operator of one side is which of the other."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from pytest_batchinv.report.record import Badge


class Key(NamedTuple):
    """What two calls of one operator have in common. parameters: those that it was given, or gave a view of."""

    module: str
    overload: str
    source: str
    parameters: tuple[str, ...]


class Pairs(NamedTuple):
    """by_other: for each call of the second side its call of the first, -1 where there is none. only_one: calls without one."""

    by_other: list[int]
    only_one: list[int]
    badge: Badge


def align_parts(one: Sequence[Key], parts: Sequence[Sequence[Key]]) -> Pairs:
    """Each part of the second side with the whole of the first, which is run at once."""
    found = [align(one, part) for part in parts]
    by_other = [there for pairs in found for there in pairs.by_other]
    paired = set(by_other)
    badge: Badge = "order" if all(pairs.badge == "order" for pairs in found) else "module"
    return Pairs(by_other, [i for i in range(len(one)) if i not in paired], badge)


def align(one: Sequence[Key], other: Sequence[Key]) -> Pairs:
    """By order where both sequences are the same; else the longest runs of equal keys, which keeps the order."""
    if list(one) == list(other):
        return Pairs(list(range(len(other))), [], "order")
    by_other = [-1] * len(other)
    for start, there, length in SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks():
        by_other[there : there + length] = range(start, start + length)
    paired = set(by_other)
    return Pairs(by_other, [i for i in range(len(one)) if i not in paired], "module")
