"""Compile modes: their names, and what they are to ``torch.compile``."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

COMPILE_MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "dynamic": {"dynamic": True},
    "fullgraph": {"fullgraph": True},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
}
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def compiled(fn: Callable[..., Any], compile_mode: str) -> Callable[..., Any]:
    """``torch.compile`` of fn in this mode; fn itself for "eager". Raises ValueError."""
    if compile_mode == "eager":
        return fn
    if compile_mode not in COMPILE_MODES:
        raise ValueError(f"there is no compile mode {compile_mode!r}; use one of eager, {', '.join(COMPILE_MODES)}")
    return torch.compile(fn, **COMPILE_MODES[compile_mode])


def eager_of(fn: Callable[..., Any]) -> Callable[..., Any]:
    """What was compiled, for a module or function that ``torch.compile`` made; fn itself otherwise."""
    if isinstance(fn, torch._dynamo.eval_frame.OptimizedModule):
        return fn._orig_mod
    return getattr(fn, "_torchdynamo_orig_callable", fn)


@contextlib.contextmanager
def compiling(compile_mode: str, origin: str) -> Iterator[None]:
    """Entered around a run of a subject: how what it compiles there is compiled. Nothing for a subject in eager mode.

    One graph for each new combination of shapes is wanted; past the limit Dynamo would run eager without a word. Inductor notes
    which lines each kernel comes from, for a trace: at this level compilation takes no longer. origin: the file and line that
    is compiled; torch's caches would else give the lines of another program with the same graph.
    """
    if compile_mode == "eager":
        yield
        return
    limits = {"recompile_limit": 64, "accumulated_recompile_limit": 1024, "fail_on_recompile_limit_hit": True}
    with (
        torch._dynamo.config.patch(limits if compile_mode in COMPILE_MODES else {}),
        torch._inductor.config.patch({"trace.provenance_tracking_level": 2}),
        torch.compiler.config.patch(cache_key_tag=origin),
    ):
        yield


def origin_of(fn: Callable[..., Any]) -> str:
    """ "file:line" of a function, or of a module's class; its name where it has no source."""
    try:
        code = inspect.unwrap(fn) if not isinstance(fn, torch.nn.Module) else type(fn)
        return f"{inspect.getsourcefile(code)}:{inspect.getsourcelines(code)[1]}"
    except (TypeError, OSError):
        return getattr(fn, "__qualname__", type(fn).__qualname__)


def short_dtype(dtype: torch.dtype) -> str:
    """ "bf16" for torch.bfloat16, and so on; torch's own name where there is no short one."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    return names.get(dtype, str(dtype).removeprefix("torch."))
