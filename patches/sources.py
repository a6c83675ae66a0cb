"""Source texts of patch targets, found and hashed without importing the module that holds them."""

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
import textwrap
from dataclasses import dataclass
from pathlib import Path


class NoSource(LookupError):
    """A dotted path leads to no source text."""


@dataclass(frozen=True)
class Definition:
    """Where a dotted path is defined. attributes: the path inside the module. line: the first one, decorators included."""

    module: str
    attributes: tuple[str, ...]
    file: str
    line: int
    text: str

    @property
    def fingerprint(self) -> str:
        """Hex digits that name the text, whatever its indentation and its trailing blanks."""
        lines = [line.rstrip() for line in textwrap.dedent(self.text).strip().splitlines()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@functools.cache
def definition(dotted: str) -> Definition:
    """The definition of ``package.module.Class.method`` (or a function, a class, a name bound at the top of a module).

    Imports nothing but, where the top-level package asks for it, that package's finder. Raises NoSource.
    """
    module, attributes = split(dotted)
    file = _file(module)
    source = Path(file).read_text()
    node = _find(ast.parse(source), attributes)
    if node is None:
        raise NoSource(f"{file} defines no {'.'.join(attributes)}")
    line = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    text = "\n".join(source.splitlines()[line - 1 : node.end_lineno])
    return Definition(module, attributes, file, line, text)


@functools.cache
def split(dotted: str) -> tuple[str, tuple[str, ...]]:
    """Module and attributes of a dotted path: the longest front part that is a module. Raises NoSource."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        if _spec(module) is not None:
            return module, tuple(parts[cut:])
    raise NoSource(f"there is no module {parts[0]} here")


def _file(module: str) -> str:
    spec = _spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise NoSource(f"{module} has no Python source")
    return spec.origin


def _spec(module: str) -> importlib.machinery.ModuleSpec | None:
    package, _, _ = module.rpartition(".")
    if not package:
        try:
            return importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
    parent = _spec(package)
    if parent is None or parent.submodule_search_locations is None:
        return None
    # PathFinder, and not find_spec of importlib.util, which would import the package first.
    return importlib.machinery.PathFinder.find_spec(module, parent.submodule_search_locations)


def _find(node: ast.AST, attributes: tuple[str, ...]) -> ast.AST | None:
    if not attributes:
        return node
    for child in _statements(node):
        if attributes[0] in _names(child):
            found = _find(child, attributes[1:])
            if found is not None:
                return found
    return None


def _statements(node: ast.AST):
    """The statements of a body, those under its ifs and tries too."""
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
                yield from _statements(child)
            else:
                yield child


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []
