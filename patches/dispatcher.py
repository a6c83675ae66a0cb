"""Who holds the dispatcher's entries, read from the dispatcher's own account of them.

From torch 2.13 on ``Library.impl`` replaces a kernel without a warning, and torch itself registers kernels in Python
(``torch._native``). ``Holding`` remembers the entries right after ours were made, and names what was registered since.
"""

import re
from collections import Counter
from collections.abc import Iterable
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

    @property
    def is_torchs(self) -> bool:
        return _TORCHS_CPP.search(self.where) is not None


def foreign(entries: Iterable[tuple[str, str]]) -> list[Registration]:
    """What others than torch's C++ have registered for these entries (overload, key), or where a call arrives before them."""
    return [found for overload, key in entries for found in _reached(overload, key) if not found.is_torchs]


class Holding:
    """The entries that we hold, as they stood when this was made: make it right after the entries."""

    def __init__(self, entries: Iterable[tuple[str, str]]) -> None:
        self._then = {entry: _reached(*entry) for entry in entries}

    def taken(self) -> list[Registration]:
        """What was registered since over an entry of ours, or where a call arrives before it. Takes some milliseconds."""
        found: list[Registration] = []
        for (overload, key), then in self._then.items():
            now = _reached(overload, key)
            found += Counter(now) - Counter(then)
            if (in_force := _in_force(now, key)) != _in_force(then, key):
                # Not new: somebody who was there before us left, and came again from the same line.
                found.append(in_force or Registration(overload, key, "nowhere: our kernel was removed"))
        return list(dict.fromkeys(found))

    def in_front(self) -> list[Registration]:
        """What others had registered before these entries were made, where a call arrives before it reaches ours."""
        before_ours = [r for (_, key), then in self._then.items() for r in then if r.key != key]
        return list(dict.fromkeys(r for r in before_ours if not r.is_torchs))


def _in_force(found: list[Registration], key: str) -> Registration | None:
    return next((registration for registration in found if registration.key == key), None)


def _reached(overload: str, key: str) -> list[Registration]:
    """The kernels at this key, and those that a call reaches before it or in its stead; for each key the one in force first."""
    keys = (key, f"Autograd{key}", "Autograd")
    if key == COMPOSITE:
        keys = ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "Autograd", "CompositeExplicitAutograd", COMPOSITE)
    lines = _LINE.finditer(torch._C._dispatch_dump(overload))
    return [Registration(overload, line["key"], line["where"]) for line in lines if line["key"] in keys]
