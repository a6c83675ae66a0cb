"""Who holds the dispatcher's entries: read from the dispatcher's own account of them.

From torch 2.13 on ``Library.impl`` replaces what was there without a word, and torch itself registers kernels in Python
(``torch._native``). ``Holding`` remembers how the entries stood right after ours were made, and names what came since.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

COMPOSITE = "CompositeImplicitAutograd"
_LINE = re.compile(r"^(?P<key>\w+)(\[alias\])?(?P<inactive> \(inactive\))?: registered at (?P<where>.+?) :: ", re.MULTILINE)
_TORCHS_CPP = re.compile(r"(^|/)(aten/src/ATen|torch/csrc)/")


@dataclass(frozen=True)
class Registration:
    """One kernel of an entry. where: the file and the line at which it was registered."""

    overload: str
    key: str
    where: str

    def __str__(self) -> str:
        return f"{self.overload} on {self.key}, registered at {self.where}"


def registrations(overload: str, keys: Iterable[str]) -> Iterator[Registration]:
    """All kernels at these keys, for each key the one in force first."""
    for found in _LINE.finditer(torch._C._dispatch_dump(overload)):
        if found["key"] in keys:
            yield Registration(overload, found["key"], found["where"])


def foreign(entries: Iterable[tuple[str, str]]) -> list[Registration]:
    """What neither torch's C++ nor we have registered for these entries (overload, key), or in front of them."""
    return [
        registration
        for overload, key in entries
        for registration in registrations(overload, _reached_first(key))
        if not _TORCHS_CPP.search(registration.where)
    ]


class Holding:
    """The entries that we hold, as they stood when this was made. Made again it would take a thief for an owner."""

    def __init__(self, entries: Iterable[tuple[str, str]]) -> None:
        self._then = {entry: list(registrations(entry[0], _reached_first(entry[1]))) for entry in entries}

    def taken(self) -> list[Registration]:
        """What was registered since over an entry of ours or in front of it. One read of each entry: some milliseconds."""
        found = []
        for (overload, key), then in self._then.items():
            now = list(registrations(overload, _reached_first(key)))
            found += Counter(now) - Counter(then)
            ours, in_force = _in_force(then, key), _in_force(now, key)
            if in_force is None:
                found.append(Registration(overload, key, "nowhere: our kernel was taken out"))
            elif in_force != ours:  # by who was there before us, went, and came again from the same line
                found.append(in_force)
        return list(dict.fromkeys(found))

    def in_front(self) -> list[Registration]:
        """What others had registered, before these entries were made, where a call arrives before it reaches ours."""
        found = []
        for (_, key), then in self._then.items():
            found += [r for r in then if r.key != key and not _TORCHS_CPP.search(r.where)]
        return list(dict.fromkeys(found))


def _in_force(found: list[Registration], key: str) -> Registration | None:
    return next((registration for registration in found if registration.key == key), None)


def _reached_first(key: str) -> tuple[str, ...]:
    """The keys whose kernels a call reaches before the one at this key, or instead of it, and the key itself."""
    if key == COMPOSITE:
        return ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "Autograd", "CompositeExplicitAutograd", COMPOSITE)
    return key, f"Autograd{key}", "Autograd"
