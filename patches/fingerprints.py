"""Source texts of patch targets, found and hashed without importing the module that holds them."""

import ast
import functools
import hashlib
import importlib.util
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class NoSource(LookupError):
    """A dotted path leads to no source text."""


@dataclass(frozen=True)
class Definition:
    """Where a dotted path is defined. attributes: the path inside the module. line: the first one, decorators included."""

    module: str
    attributes: tuple[str, ...]
    file: str
    line: int
    fingerprint: str

    def defines(self, value: Any) -> bool:
        """Whether this is the object that the source file defines; of an object without code, whether its type fits."""
        if code := getattr(value, "__code__", None):
            return bool(code.co_filename == self.file and code.co_firstlineno == self.line)
        kind = value if isinstance(value, type) else type(value)
        return kind.__module__.partition(".")[0] in (self.module.partition(".")[0], "builtins")


@functools.cache
def definition(dotted: str) -> Definition:
    """The definition of a function, a class, a method or a name bound at the top of a module. Raises NoSource."""
    module, *attributes = dotted.split(".")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: a stand-in in sys.modules, which has no spec
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise NoSource(f"there is no Python package {module} here")
    file = Path(spec.origin)
    while attributes and file.name == "__init__.py" and (inner := _inner(file.parent / attributes[0])):
        file, module = inner, f"{module}.{attributes.pop(0)}"
    source = file.read_text()
    node: ast.AST | None = ast.parse(source)
    for name in attributes:
        node = node and _find(node, name)
    if not isinstance(node, ast.stmt):
        raise NoSource(f"{file} defines no {'.'.join(attributes)}")
    line = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
    text = "\n".join(source.splitlines()[line - 1 : node.end_lineno])
    return Definition(module, tuple(attributes), str(file), line, fingerprint(text))


def fingerprint(text: str) -> str:
    """Hex digits that name a source text, whatever its indentation and its trailing blanks."""
    lines = [line.rstrip() for line in textwrap.dedent(text).strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _inner(path: Path) -> Path | None:
    """The file of a module or a package; Python, too, prefers the package."""
    return next((file for file in (path / "__init__.py", path.with_name(f"{path.name}.py")) if file.is_file()), None)


def _find(node: ast.AST, name: str) -> ast.AST | None:
    """The first statement of a body that binds the name, under its ifs and tries too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            if found := _find(child, name):
                return found
        elif name in _names(child):
            return child
    return None


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
