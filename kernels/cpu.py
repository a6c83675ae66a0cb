"""The kernel set for the CPU: ``reference.py`` in C++, with every sum in one fixed order.

Orders (k, columns, keys ascending; ``fma`` rounds once; "wide" is float64 for float64 and float32, else float32):

=================  ====================================================================================================
gemm               ``acc = fma(a[m, k], b[k, n], acc)`` from 0 in wide, one chain over all k; then ``alpha * acc``, then
                   ``+ (beta * bias)``, each rounded in wide; then once to the dtype. Exact zeros in front or behind add
                   nothing.
row sums           in float64: lane j of 32 sums the columns j, j + 32, j + 64, ...; then lane j += lane j + 16, + 8,
                   + 4, + 2, + 1. So do mean, norm, var (second pass over ``(x - mean) ** 2``), layer_norm, rms_norm.
                   Zeros in front or behind turn the lanes like a wheel, which the tree cannot see: no bit changes.
softmax            ``exp(x - max)`` in float64, summed like a row: columns of -inf in front or behind are zeros there.
                   So do log_softmax and logsumexp.
cumsum             one chain in float64, each partial sum rounded to the dtype.
attention          ``score = scale * chain(q, k) + mask`` in wide; ``weight = wide(exp(score - max))``; the weights are
                   summed like a row; ``acc = fma(weight[j], v[j], acc)`` in wide, keys of weight 0 left
                   out (even if v is NaN there); ``acc / sum`` in float64, rounded once. A key is hidden by False, by
                   -inf, or by is_causal, and then adds nothing, whatever it holds.
index_add          ``acc += alpha * source[i]`` in float64, i ascending, two roundings; then once to the dtype.
pointwise          in float64, rounded once.
=================  ====================================================================================================

The C++ source is compiled at first use, for this machine, into ``$BATCHINV_CACHE_DIR`` (``~/.cache/pytest-batchinv``).
It needs a C++17 compiler: ``$CXX``, or c++, g++ or clang++ on the PATH.

Threads: as many as torch uses, and the same ones: the library needs ``libgomp.so.1``, which torch has already loaded.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .reference import accumulator_dtype

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)

# The kinds of `pointwise`, and the names of their params.
KINDS = {
    "silu": (),
    "sigmoid": (),
    "gelu": (),
    "gelu_tanh": (),
    "softplus": ("beta", "threshold"),
    "log_sigmoid": (),
    "mish": (),
    "elu": ("alpha", "scale", "input_scale"),
    "rsqrt": (),
    "pow": ("exponent",),
    "exp": (),
    "tanh": (),
    "erf": (),
    "expm1": (),
    "log": (),
    "log1p": (),
    "sin": (),
    "cos": (),
}


def gemm(a: Tensor, b: Tensor, bias: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """One chain ``acc = fma(a[m, k], b[k, n], acc)``, k ascending; ``alpha * acc + beta * bias``; rounded once."""
    if a.dim() == 2:
        return gemm(a[None], b[None], None if bias is None else bias[None], alpha, beta)[0]
    out = torch.empty((a.shape[0], a.shape[1], b.shape[2]), dtype=a.dtype)
    _call("gemm", _arg(a), _arg(b), _arg(bias), alpha, beta, _arg(out))
    return out


def grouped_gemm(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """The chain of :func:`gemm` for each row, with the matrix of the row's group."""
    out = torch.empty((a.shape[0], b.shape[2]), dtype=a.dtype)
    offs = offs.to(torch.int32).contiguous()
    _call("grouped_gemm", _arg(a), _arg(b), offs.data_ptr(), offs.numel(), _arg(out))
    return out


def row_sum(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """32 lanes in float64, then a tree (see above)."""
    out = torch.empty(x.shape[0], dtype=out_dtype)
    _call("row_sum", _arg(x), _arg(out))
    return out


def row_mean(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The sum of :func:`row_sum` before its rounding, divided by ``n_cols``."""
    out = torch.empty(x.shape[0], dtype=out_dtype)
    _call("row_mean", _arg(x), _arg(out))
    return out


def row_mean_of_squares(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``row_mean`` of the squares."""
    wide = x.to(out_dtype)
    return row_mean(wide * wide, out_dtype)


def row_norm(x: Tensor, p: float, out_dtype: torch.dtype) -> Tensor:
    """``|x|`` (p = 1) or ``x * x`` (p = 2), summed as in :func:`row_sum`; the root for p = 2."""
    out = torch.empty(x.shape[0], dtype=out_dtype)
    _call("row_norm", _arg(x), p, _arg(out))
    return out


def row_var_mean(x: Tensor, correction: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean in float64, then ``(x - mean) ** 2``, both summed as in :func:`row_sum`."""
    var, mean = torch.empty(x.shape[0], dtype=out_dtype), torch.empty(x.shape[0], dtype=out_dtype)
    _call("row_var_mean", _arg(x), correction, _arg(var), _arg(mean))
    return var, mean


def row_logsumexp(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``max + log(sum)``, ``exp(x - max)`` being summed as in :func:`row_sum`."""
    out = torch.empty(x.shape[0], dtype=out_dtype)
    _call("row_logsumexp", _arg(x), _arg(out))
    return out


def row_softmax(x: Tensor, log: bool, out_dtype: torch.dtype) -> Tensor:
    """``exp(x - max) / sum``, or ``(x - max) - log(sum)``, the sum as in :func:`row_sum`."""
    out = torch.empty(x.shape, dtype=out_dtype)
    _call("row_softmax", _arg(x), log, _arg(out))
    return out


def row_logprobs(x: Tensor, index: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Of ``row_softmax``; this device has the memory for all columns."""
    return row_softmax(x, True, out_dtype).gather(1, index)


def row_cumsum(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """One chain over the columns; each partial sum is rounded on its own."""
    out = torch.empty(x.shape, dtype=out_dtype)
    _call("row_cumsum", _arg(x), _arg(out))
    return out


def row_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) * rstd * weight + bias``, each step rounded in float64; the sums as in :func:`row_var_mean`."""
    y = torch.empty(x.shape, dtype=x.dtype)
    mean, rstd = (torch.empty(x.shape[0], dtype=accumulator_dtype(x.dtype)) for _ in range(2))
    _call("row_layer_norm", _arg(x), _arg(weight), _arg(bias), eps, _arg(y), _arg(mean), _arg(rstd))
    return y, mean, rstd


def row_rms_norm(x: Tensor, weight: Tensor | None, eps: float, with_rstd: bool = True) -> tuple[Tensor, Tensor | None]:
    """``x * rstd * weight``, each step rounded in float64; ``x * x`` is summed as in :func:`row_sum`."""
    y, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[0], dtype=accumulator_dtype(x.dtype))
    _call("row_rms_norm", _arg(x), _arg(weight), eps, _arg(y), _arg(rstd))
    return y, rstd if with_rstd else None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    *,
    causal_offset: int = 0,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Chains over d and over the keys, divided by the sum of the weights at the end (see above)."""
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    options = (is_causal, scale, causal_offset, window or 0, soft_cap or 0.0, _arg(sinks))
    _call("attention", _arg(q), _arg(k), _arg(v), _arg(mask, _WITH_BOOL), *options, _arg(out), _arg(lse))
    return out, lse if with_lse else None


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_queries: int,
    scale: float,
    *,
    is_causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``attention`` row by row."""
    out = torch.empty((*q.shape[:2], v.shape[-1]), dtype=q.dtype)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=accumulator_dtype(q.dtype))
    ends = q_starts.tolist()
    keys_of = _slices(k_starts.tolist(), k, v) if pages is None else _gathered(k_starts.tolist(), pages, k, v)
    for start, end, (keys, values) in zip(ends[:-1], ends[1:], keys_of, strict=True):
        mine = (x.transpose(0, 1)[None] for x in (q[start:end], keys, values))
        offset = len(keys) - (end - start)
        options = {"causal_offset": offset, "window": window, "soft_cap": soft_cap, "sinks": sinks}
        row_out, row_lse = attention(*mine, None, is_causal, scale, **options)
        out[start:end], lse[:, start:end] = row_out[0].transpose(0, 1), row_lse[0]
    return out, lse


def _slices(starts: list[int], *stores: Tensor) -> Iterator[list[Tensor]]:
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        yield [store[start:end] for store in stores]


def _gathered(lengths: list[int], pages: Tensor, *stores: Tensor) -> Iterator[list[Tensor]]:
    for length, mine in zip(lengths, pages.long(), strict=True):
        yield [store[mine].flatten(0, 1)[:length] for store in stores]


def index_add(self: Tensor, index: Tensor, source: Tensor, alpha: float) -> Tensor:
    """``acc[index[i]] += alpha * source[i]`` in float64, i ascending; rounded once."""
    out = torch.empty(self.shape, dtype=self.dtype)
    index = index.to(torch.int64)
    _call("index_add", _arg(self), _arg(index, _INDEX), _arg(source), alpha, _arg(out))
    return out


def pointwise(x: Tensor, kind: str, params: Sequence[float] = ()) -> Tensor:
    """One of `KINDS` for each element, in float64, rounded once. The strides are those of ``torch.empty_like(x)``."""
    if len(params) != len(KINDS.get(kind, params)):
        raise ValueError(f"pointwise {kind} needs the params {KINDS[kind]}, not {tuple(params)}.")
    dtype, out = _DTYPES[x.dtype], torch.empty_like(x)
    if x.stride() != out.stride():
        x = out.copy_(x)
    values = (ctypes.c_double * 3)(*params)
    _call("pointwise", kind.encode(), values, dtype, x.data_ptr(), out.data_ptr(), x.numel())
    return out


class _Dtypes(dict):
    def __missing__(self, dtype: torch.dtype):
        raise TypeError(f"The CPU kernels know float64, float32, float16 and bfloat16, not {dtype}.")


# enum Dtype in cpu.cpp
_DTYPES = _Dtypes({torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3})
_WITH_BOOL = _Dtypes(_DTYPES | {torch.bool: 4})
_INDEX = _Dtypes({torch.int64: 5})
_PACK = [struct.Struct(f"{2 + 2 * n_dims}q").pack for n_dims in range(5)]


def _arg(x: Tensor | None, dtypes: _Dtypes = _DTYPES) -> bytes | None:
    """x as the struct Tensor of cpu.cpp: data, dtype, sizes, strides."""
    return None if x is None else _PACK[x.dim()](x.data_ptr(), dtypes[x.dtype], *x.shape, *x.stride())


_P, _D, _B, _I, _A = ctypes.c_char_p, ctypes.c_double, ctypes.c_bool, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "gemm": (_P, _P, _P, _D, _D, _P),
    "grouped_gemm": (_P, _P, _A, _I, _P),
    "row_sum": (_P, _P),
    "row_mean": (_P, _P),
    "row_norm": (_P, _D, _P),
    "row_var_mean": (_P, _D, _P, _P),
    "row_logsumexp": (_P, _P),
    "row_softmax": (_P, _B, _P),
    "row_cumsum": (_P, _P),
    "row_layer_norm": (_P, _P, _P, _D, _P, _P, _P),
    "row_rms_norm": (_P, _P, _D, _P, _P),
    "attention": (_P, _P, _P, _P, _B, _D, _I, _I, _D, _P, _P, _P),
    "index_add": (_P, _P, _P, _D, _P),
    "pointwise": (_P, _A, _I, _A, _A, _I),
}
_functions: dict[str, ctypes._CFuncPtr] = {}
_loading = threading.Lock()


def _call(name: str, *args) -> None:
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
    """Compiles the kernels unless the cache holds them; processes may race, the last one wins with the same content."""
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
    """Changes with whatever changes the machine code: source, flags, compiler, and the CPU (-march=native)."""
    version = _run([*compiler, "--version"]).stdout
    parts = (SOURCE.read_text(), *FLAGS, *compiler, version, _cpu())
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
    """With OpenMP, or without where the compiler has none: that costs time, and no bit."""
    command = [*compiler, *FLAGS, str(SOURCE), "-o", str(library)]
    results = [_run([*command, "-fopenmp"])]
    if results[0].returncode:
        results.append(_run(command))
    if results[-1].returncode:
        raise RuntimeError(
            f"The CPU kernels could not be compiled with `{shlex.join(compiler)}`. They need a C++17 compiler: g++ 9 "
            f"or newer, or clang 10 or newer; CXX names another one. It said:\n{results[-1].stderr[-2000:]}"
        )


def _run(command: list[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"The C++ compiler `{command[0]}` cannot be run: {error}.") from error
