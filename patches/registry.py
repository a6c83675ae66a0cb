"""Patches of torch: each behind two gates, in force only inside a context, and undone to the object that was there.

    @patch("torch._inductor.codegen.cpp.CppVecKernel.indirect_assert", torch="<2.12", group="inductor",
           reason="...", upstream="pytorch/pytorch#178148", fingerprints={"2.11.0": "0123456789abcdef"})
    def indirect_assert(original):
        def indirect_assert(self, ...):  # a plain function: Dynamo looks through other wrappers and skips them
            ...
        return indirect_assert

    with applied("inductor"):  # a group, or a patch by its name
        ...

The gates: the version of torch must be in the PEP 440 range (else the patch is *not needed*), and the source text that the
patch was written for must be one whose fingerprint is known, held by nobody else (else it is *refused*, aloud). Targets are
found by their source files, so neither a look at the status nor entering the context imports the module of a target: a
patch lands when that module is imported. The names of what is applied are part of every compilation's cache key.

Other distributions name modules with patches of their own in the entry point group ``pytest_batchinv.patches``.
"""

import contextlib
import hashlib
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, metadata
from types import FunctionType
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pytest_batchinv.patches.compilation import around_compilation
from pytest_batchinv.patches.imports import has_run, is_imported, when_imported
from pytest_batchinv.patches.sources import Definition, NoSource, definition, split

ENTRY_POINTS = "pytest_batchinv.patches"
_OURS = ("inductor_fallback_list", "inductor_indirect_assert", "inductor_rounded_casts", "inductor_reuse")
_MISSING = object()


class PatchRefused(RuntimeError):
    """A patch was asked for by name, and its target is not what it was written for, or the mode forbids it."""


class PatchWarning(UserWarning):
    """A patch of a group that is needed here was refused, or another library took its target."""


@dataclass(frozen=True)
class Row:
    """The state of one patch: applied, waiting (for its module), off, not needed, refused, or taken; and why."""

    name: str
    group: str
    state: str
    why: str
    target: str
    torch: str
    numerics: bool
    upstream: str


@dataclass(eq=False)
class Patch:
    """One patch. What is not in the constructor's call is its state: everything of it is changed under the lock."""

    name: str
    target: str
    factory: Callable[[Any], Any]
    torch: SpecifierSet
    group: str
    reason: str
    fingerprints: Mapping[str, str]
    numerics: bool = False
    harmless_with: str = ""
    gives_effect_to: str = ""
    upstream: str = ""
    also: tuple[str, ...] = ()
    source: str = ""

    users: int = field(default=0, init=False)
    failure: str = field(default="", init=False)  # why it could not be put in place when its module came
    made: tuple[Any, Any] | None = field(default=None, init=False)  # the original, and what stands for it
    held: dict[str, Any] = field(default_factory=dict, init=False)  # place -> what its owner's __dict__ held
    withdraw: list[Callable[[], None]] = field(default_factory=list, init=False)

    @property
    def places(self) -> tuple[str, ...]:
        return (self.target, *self.also)

    def is_needed(self) -> bool:
        return self.torch.contains(torch_version(), prereleases=True)

    def obstacle(self) -> str:
        """Why this patch cannot be applied although it is needed; empty where nothing stands against it. Imports nothing."""
        try:
            found = definition(self.source or self.target)
        except NoSource as error:
            return f"its target was not found: {error}"
        if found.fingerprint not in self.fingerprints.values():
            return (
                f"the source of {self.source or self.target} has the unknown fingerprint {found.fingerprint} in torch "
                f"{torch_version()}: read it, and if the patch fits, add {{{str(torch_version().public)!r}: "
                f"{found.fingerprint!r}}} to its fingerprints"
            )
        if self.users and not self.failure:
            return ""
        return self.failure or (self._holder_before_us() if has_run(split(self.target)[0]) else "")

    def _holder_before_us(self) -> str:
        owner, name = _owner(self.target)
        raw = _raw(owner, name)
        if self.made is not None and _plain(raw) is self.made[1]:
            return ""  # ours, put back by a library that had taken it for the original
        value = _plain(getattr(owner, name, None) if raw is _MISSING else raw)
        stock = definition(self.source if self.source and raw is _MISSING else self.target)
        return "" if _is_stock(value, stock) else f"{self.target} is held by {holder(value)}"

    def settle(self, arrived: str = "") -> None:
        """Puts the patch in every place whose module has run. Where it cannot: ``failure`` says why, and a warning.

        arrived: a module that has run just now, which Python still counts as being imported.
        """

        def is_there(place: str) -> bool:
            module = split(place)[0]
            return module == arrived or has_run(module)

        if not self.users or self.failure or not is_there(self.target):
            return
        try:
            if not self.held:
                if why := self._holder_before_us():
                    raise PatchRefused(why)
                self.made = self._make()
            for place in self.places:
                if place not in self.held and is_there(place):
                    self._take(place)
        except Exception as error:  # it may be somebody's import that we are called from
            self._give_back()
            self.failure = f"{error}" if isinstance(error, PatchRefused) else f"{type(error).__name__}: {error}"
            warnings.warn(PatchWarning(f"patch {self.name} is not in force: {self.failure}"), stacklevel=3)

    def _make(self) -> tuple[Any, Any]:
        owner, name = _owner(self.target)
        original = _plain(getattr(owner, name) if _raw(owner, name) is _MISSING else _raw(owner, name))
        if self.made is not None and original is self.made[1]:
            return self.made
        replacement = self.factory(original)
        if isinstance(original, FunctionType) and not isinstance(replacement, FunctionType):
            raise TypeError(
                f"the factory of patch {self.name} returned a {type(replacement).__name__} for a function: Dynamo looks "
                "through wrappers and would skip it. Return a plain function"
            )
        return original, replacement

    def _take(self, place: str) -> None:
        owner, name = _owner(place)
        original, replacement = self.made
        raw = _raw(owner, name)
        value = _plain(getattr(owner, name) if raw is _MISSING else raw)
        if value is replacement:  # bound after the target was patched; what belongs there is the original
            raw = original
        elif value is not original:
            raise PatchRefused(f"{place} is held by {holder(value)}")
        self.held[place] = raw
        setattr(owner, name, type(raw)(replacement) if isinstance(raw, (staticmethod, classmethod)) else replacement)

    def _give_back(self) -> None:
        for place, raw in reversed(self.held.items()):
            owner, name = _owner(place)
            if _plain(_raw(owner, name)) is not self.made[1]:
                continue  # somebody came later: it is theirs
            if raw is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, raw)
        self.held.clear()

    def begin(self) -> None:
        self.failure = ""
        for module in dict.fromkeys(split(place)[0] for place in self.places):
            self.withdraw.append(when_imported(module, _settle_all))

    def end(self) -> None:
        for withdraw in self.withdraw:
            withdraw()
        self.withdraw.clear()
        self._give_back()
        self.failure = ""

    def later_owners(self) -> list[str]:
        """Who holds a place that was ours, as sentences."""
        found = []
        for place in self.held:
            value = _plain(_raw(*_owner(place)))
            if value is not self.made[1]:
                found.append(f"{place} has since been taken by {holder(value)}, which is left alone")
        return found

    def row(self) -> Row:
        state, why = self._state()
        return Row(self.name, self.group, state, why, self.target, str(self.torch), self.numerics, self.upstream)

    def _state(self) -> tuple[str, str]:
        if not self.is_needed():
            return "not needed", f"torch {torch_version()} is not {self.torch}"
        if why := self.obstacle():
            return "refused", why
        if not self.users:
            return "off", "changes bits: applied only when asked for by name" if self.numerics else self.reason
        if taken := self.later_owners():
            return "taken", "; ".join(taken)
        if not self.held:
            return "waiting", f"{split(self.target)[0]} is not imported yet"
        return "applied", self.reason


_lock = threading.RLock()
_patches: dict[str, Patch] = {}
_only_harmless_with: list[Collection[str]] = []


def patch(
    target: str,
    *,
    torch: str,
    group: str,
    reason: str,
    fingerprints: Mapping[str, str],
    upstream: str = "",
    numerics: bool = False,
    harmless_with: str = "",
    gives_effect_to: str = "",
    also: Collection[str] = (),
    source: str = "",
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Registers a factory: it gets the original object and returns what shall stand for it, for functions a plain function.

    target: dotted path of a function, a method or a module's name. torch: PEP 440 range of the versions that need the
    patch. fingerprints: torch version -> fingerprint of the source text that was read, as ``status`` prints it. source:
    the dotted path of that text, where it is not the target's own. also: other places that bound the same object.
    numerics: the patch changes bits, and is applied only when asked for by name. harmless_with: the Inductor setting with
    which it changes none. gives_effect_to: an Inductor setting that does nothing on these versions without the patch.
    The factory's name is the patch's name; a second patch of that name raises ValueError.
    """

    def register(factory: Callable[[Any], Any]) -> Callable[[Any], Any]:
        name = factory.__name__
        with _lock:
            if name in _patches:
                raise ValueError(f"there is a patch named {name} already, of {_patches[name].target}")
            _patches[name] = Patch(
                name, target, factory, SpecifierSet(torch), group, reason, dict(fingerprints), numerics, harmless_with,
                gives_effect_to, upstream, tuple(also), source,
            )  # fmt: skip
        return factory

    return register


@contextlib.contextmanager
def applied(*groups_or_names: str) -> Iterator[None]:
    """Inside, for all threads, these patches are in force; each is undone when the last block that asked for it leaves.

    A group stands for those of its patches that are needed here and change no bits; the ones among them that are refused
    are told by a PatchWarning. A name stands for that patch, also one that changes bits. What this torch does not need is
    left out. Compiled code of Dynamo is dropped whenever the set changes.

    Raises PatchRefused where a patch that was asked for by name is refused, ValueError for an unknown name.
    """
    chosen, refused = _choose(groups_or_names)
    for sentence in refused:
        warnings.warn(PatchWarning(sentence), stacklevel=3)
    with contextlib.ExitStack() as stack:
        if chosen:
            stack.enter_context(around_compilation(_cache_key))
        stack.callback(_release, _acquire(chosen))
        yield


def status() -> list[Row]:
    """One row for each patch, in the order in which they were registered. Imports neither torch nor a target's module."""
    load()
    with _lock:
        rows = [found.row() for found in _patches.values()]
    return rows + [
        Row(name, "", "refused", f"its module could not be loaded: {why}", "", "", False, "") for name, why in _broken.items()
    ]


def applied_names() -> list[str]:
    """The patches that blocks have asked for and that are not refused, sorted: those that wait for their module too."""
    with _lock:
        return sorted(found.name for found in _patches.values() if found.users and not found.failure)


def applied_tag() -> str:
    """What names the applied patches in a cache key; empty with none. Holds a hash of each one's own source."""
    return ",".join(f"{name}-{_own_hash(_patches[name].factory)}" for name in applied_names())


@contextlib.contextmanager
def bits_kept(settings: Collection[str]) -> Iterator[None]:
    """Inside, a patch that changes bits is refused, but for one that is harmless with one of these Inductor settings on.

    Raises PatchRefused if such a patch is applied already. So does a compilation inside, if it turned out that the patch
    which gives the setting its effect could not be put in place, or was taken.
    """
    with _lock:
        _refuse_what_moves_bits(settings)
        _only_harmless_with.append(settings)
    try:
        with around_compilation(lambda: _refused_after(settings)):
            yield
    finally:
        with _lock:
            _only_harmless_with.remove(settings)


@contextlib.contextmanager
def _refused_after(settings: Collection[str]) -> Iterator[None]:
    """After the compilation, since it is what imports the modules in which the patches land."""
    yield
    with _lock:
        _refuse_what_moves_bits(settings)


@cache
def load() -> None:
    """Imports the modules that register patches: ours, and those of the entry points."""
    for name in _OURS:
        import_module(f"pytest_batchinv.patches.{name}")
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            _broken[entry.name] = f"{type(error).__name__}: {error} (entry point {entry.value})"


_broken: dict[str, str] = {}


@cache
def torch_version() -> Version:
    """The version of the installed torch, without importing it."""
    return Version(metadata.version("torch"))


def holder(value: Any) -> str:
    """Who made this object, in words: for a function its name, file and line."""
    code = getattr(value, "__code__", None)
    if code is not None:
        return f"{value.__module__}.{value.__qualname__} ({code.co_filename}:{code.co_firstlineno})"
    kind = value if isinstance(value, type) else type(value)
    return f"an object of {kind.__module__}.{kind.__qualname__}"


def _choose(groups_or_names: tuple[str, ...]) -> tuple[list[Patch], list[str]]:
    load()
    with _lock:
        known = {*_patches, *(found.group for found in _patches.values())}
        if unknown := [name for name in groups_or_names if name not in known] or (not groups_or_names and ["nothing"]):
            raise ValueError(f"no patch and no group is called {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
        chosen, refused = [], []
        for found in _patches.values():
            by_name = found.name in groups_or_names
            if not found.is_needed() or not (by_name or found.group in groups_or_names and not found.numerics):
                continue
            why = found.obstacle() or next(filter(None, (_moves_bits(found, kept) for kept in _only_harmless_with)), "")
            if not why:
                chosen.append(found)
            elif by_name:
                raise PatchRefused(f"patch {found.name} is refused: {why}")
            else:
                refused.append(f"patch {found.name} is refused: {why}")
        return chosen, refused


def _refuse_what_moves_bits(settings: Collection[str]) -> None:
    for found in _patches.values():
        if found.users and not found.failure and (why := _moves_bits(found, settings)):
            raise PatchRefused(why)


def _moves_bits(found: Patch, settings: Collection[str]) -> str:
    """Why this patch would change bits beside these settings; empty where it would not."""
    if not found.numerics:
        return ""
    setting = found.harmless_with
    without_effect = _without_effect(setting) if setting in settings else ""
    if setting in settings and not without_effect:
        return ""
    unless = f" unless {setting} is set" if setting else ""
    because = f", which has no effect here: {without_effect}" if without_effect else ""
    return f"patch {found.name} changes bits{unless}{because}, so it cannot be used together with batch-invariant mode"


def _without_effect(setting: str) -> str:
    """Why this Inductor setting does nothing on this torch: the patch that would give it its effect is not in force."""
    for found in _patches.values():
        if found.gives_effect_to == setting and found.is_needed():
            if why := found.obstacle() or "; ".join(found.later_owners()):
                return f"patch {found.name} is not in force ({why})"
    return ""


def _acquire(chosen: list[Patch]) -> list[Patch]:
    with _lock:
        fresh = [found for found in chosen if found.users == 0]
        for found in chosen:
            found.users += 1
        for found in fresh:
            found.begin()
    for module in {split(place)[0] for found in fresh for place in found.places}:
        is_imported(module)  # waits, outside the lock, for a thread that is importing it
    _settle_all()
    if fresh:
        _forget_compiled_code()
    return chosen


def _release(chosen: list[Patch]) -> None:
    with _lock:
        for found in chosen:
            found.users -= 1
        leaving = [found for found in reversed(chosen) if found.users == 0]
        for found in leaving:
            found.end()
    if leaving:
        _forget_compiled_code()


def _settle_all(arrived: str = "") -> None:
    with _lock:
        for found in _patches.values():
            found.settle(arrived)


def _forget_compiled_code() -> None:
    if is_imported("torch._dynamo"):
        sys.modules["torch._dynamo"].reset()


@contextlib.contextmanager
def _cache_key() -> Iterator[None]:
    """torch hashes its files, and not what stands for its functions: without the tag a warm cache mixes the two."""
    import torch

    _settle_all()
    config = torch.compiler.config
    ours = f";patches={applied_tag()}"
    with config.patch(cache_key_tag=config.cache_key_tag + ours) if ours not in config.cache_key_tag else _nothing():
        yield


_nothing = contextlib.nullcontext


@cache
def _own_hash(factory: Callable) -> str:
    return hashlib.sha256(inspect.getsource(factory).encode()).hexdigest()[:8]


def _owner(place: str) -> tuple[Any, str]:
    """The object that holds the last name of a dotted path. Its module must have been imported."""
    module, attributes = split(place)
    owner = sys.modules[module]
    for name in attributes[:-1]:
        owner = getattr(owner, name)
    return owner, attributes[-1]


def _raw(owner: Any, name: str) -> Any:
    """What the owner itself holds, as it is in its __dict__: no inherited attribute, and no bound descriptor."""
    return vars(owner).get(name, _MISSING)


def _plain(raw: Any) -> Any:
    return raw.__func__ if isinstance(raw, (staticmethod, classmethod)) else raw


def _is_stock(value: Any, found: Definition) -> bool:
    """Whether this object is the one that the source file defines."""
    code = getattr(value, "__code__", None)
    if code is not None:
        return code.co_filename == found.file and code.co_firstlineno == found.line
    kind = value if isinstance(value, type) else type(value)
    return kind.__module__.split(".")[0] in (found.module.split(".")[0], "builtins")
