"""Compiles the C++ kernels at first use, for this machine, and loads them.

The library goes to ``$BATCHINV_CACHE_DIR`` (``~/.cache/pytest-batchinv``). This needs a C++17 compiler: ``$CXX``, or c++,
g++ or clang++ on the PATH.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "kernels.cpp"
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)

# The arguments of each function marked EXPORT, before the number of threads. A struct Tensor travels as bytes (_P).
_P, _D, _B, _I, _A = ctypes.c_char_p, ctypes.c_double, ctypes.c_bool, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "gemm": (_P, _P, _P, _D, _D, _P),
    "grouped_gemm": (_P, _P, _A, _I, _P),
    "grouped_gemm_over_k": (_P, _P, _A, _I, _P),
    "scaled_gemm": (_P, _P, _P, _P, _P, _P),
    "scaled_grouped_gemm": (_P, _P, _P, _P, _A, _I, _P),
    "scaled_grouped_gemm_over_k": (_P, _P, _P, _P, _A, _I, _P),
    "row_sum": (_P, _P),
    "row_mean": (_P, _P),
    "row_norm": (_P, _D, _P),
    "row_var_mean": (_P, _D, _P, _P),
    "row_logsumexp": (_P, _P),
    "row_softmax": (_P, _B, _P),
    "row_cumsum": (_P, _P),
    "row_layer_norm": (_P, _P, _P, _D, _P, _P, _P),
    "row_rms_norm": (_P, _P, _D, _P, _P),
    "row_softmax_backward": (_P, _P, _B, _P),
    "row_norm_backward": (_P, _P, _P, _P, _P, _P),
    "norm_backward_parameters": (_P, _P, _P, _P, _P, _P),
    "attention": (_P, _P, _P, _P, _B, _D, _I, _I, _D, _P, _P, _P),
    "index_add": (_P, _P, _P, _D, _P),
    "pointwise": (_P, _A, _I, _A, _A, _I),
}
_functions: dict[str, ctypes._CFuncPtr] = {}
_loading = threading.Lock()


def call(name: str, *args: Any) -> None:
    """Calls a C++ function with as many threads as torch uses. Raises ValueError with the sentence that it returns."""
    error = (_functions.get(name) or _load(name))(*args, torch.get_num_threads())
    if error:
        raise ValueError(error.decode())


def _load(name: str) -> ctypes._CFuncPtr:
    with _loading:
        if not _functions:
            library = ctypes.CDLL(str(build()))
            for each, argtypes in _SIGNATURES.items():
                function = getattr(library, each)
                function.argtypes, function.restype = (*argtypes, ctypes.c_int), ctypes.c_char_p
            _functions.update((each, getattr(library, each)) for each in _SIGNATURES)
    return _functions[name]


def build() -> Path:
    """The path of the library, which is compiled unless the cache holds it.

    Processes may race: the last one wins, with the same content.
    """
    compiler = _compiler()
    library = _cache_dir() / f"cpu-{_cache_key(compiler)}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            _compile(compiler, Path(scratch, library.name))
            os.replace(Path(scratch, library.name), library)
    except OSError as error:
        raise RuntimeError(
            f"The CPU kernels cannot be written to {library.parent}: {error}. "
            "Set BATCHINV_CACHE_DIR to a folder that can be written to."
        ) from error
    return library


def _cache_dir() -> Path:
    return Path(os.environ.get("BATCHINV_CACHE_DIR") or Path.home() / ".cache" / "pytest-batchinv")


def _compiler() -> list[str]:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    raise RuntimeError(
        f"The CPU kernels need a C++17 compiler, and none of {', '.join(candidates)} was found. "
        "Install one (Debian and Ubuntu: `apt install g++`) or name one in the environment variable CXX."
    )


def _cache_key(compiler: list[str]) -> str:
    """Changes with whatever changes the machine code: sources, flags, compiler, and the CPU (-march=native)."""
    sources = [f"{path.name}\n{path.read_text()}" for path in sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp")])]
    version = _run([*compiler, "--version"]).stdout
    parts = (*sources, *FLAGS, *compiler, version, _cpu())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    described = sorted({line for line in lines if line.split("\t")[0].split(":")[0].strip() in names})
    return "\n".join(described) or f"{platform.machine()} {platform.processor()}"


def _compile(compiler: list[str], library: Path) -> None:
    """Compiles with OpenMP, or without it where the compiler has none. That costs time and changes no bit."""
    command = [*compiler, *FLAGS, str(SOURCE), "-o", str(library)]
    results = [_run([*command, "-fopenmp"])]
    if results[0].returncode:
        results.append(_run(command))
    if results[-1].returncode:
        raise RuntimeError(
            f"The CPU kernels could not be compiled with `{shlex.join(compiler)}`. They need a C++17 compiler: g++ 9 "
            f"or newer, or clang 10 or newer; CXX names another one. It said:\n{results[-1].stderr[-2000:]}"
        )


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"The C++ compiler `{command[0]}` cannot be run: {error}.") from error
