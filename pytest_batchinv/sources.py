"""Digests of source files: what a record was made with, told again where it is judged. Imports no torch."""

import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

_SUFFIXES = {".py", ".cpp", ".h", ".json"}


def digest(*folders: str | Path) -> str:
    """Of all sources in these folders and below, in twelve digits. What Python or a compiler makes of them is none."""
    found = hashlib.sha256()
    for folder in map(Path, folders):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES):
            _add(found, path, path.relative_to(folder))
    return found.hexdigest()[:12]


def digest_of_files(path: Path) -> str:
    """Of a file, or of all files in a folder and below but hidden ones and caches. Raises ValueError where there is none."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file() and _is_source(one, path))
    if not files:
        raise ValueError(f"{path} is no file, and no folder that holds one")
    found = hashlib.sha256()
    for one in files:
        _add(found, one, one.relative_to(path) if one != path else Path(one.name))
    return found.hexdigest()[:12]


def of_the_mode() -> str:
    """The sources of kernels and patches, as a record's receipt has them."""
    return digest(*(folder for name in ("kernels", "patches") for folder in _folders(f"pytest_batchinv.{name}")))


def _folders(package: str) -> Iterable[str]:
    spec = find_spec(package)
    assert spec is not None
    return spec.submodule_search_locations or ()


def _is_source(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)


def _add(found: "hashlib._Hash", path: Path, name: Path) -> None:
    found.update(f"{name.as_posix()} {path.stat().st_size}\n".encode())
    found.update(path.read_bytes())
