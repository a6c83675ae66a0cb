"""What the bits of the mode depend on, in named parts, and the fingerprint that stands for them."""

import hashlib
import subprocess
from collections.abc import Iterable
from functools import cache

import torch

from pytest_batchinv import gpu, sources
from pytest_batchinv.kernels import collectives, table
from pytest_batchinv.patches import registry


def receipt() -> dict[str, str]:
    """The state that the mode's code depends on: our sources, the op table, torch, Triton, the machine, the patches."""
    return {**_of_the_process(), "patches": registry.applied_tag() or "none"}


def fingerprint() -> str:
    """Names the receipt in twelve digits. It is part of the cache key of what is compiled in the mode."""
    return _digest(f"{part}={value}" for part, value in receipt().items())


@cache
def _of_the_process() -> dict[str, str]:
    return {
        "sources": sources.of_the_mode(),
        "op table": _digest(_table()),
        "torch": str(torch.__version__),
        "triton": _triton(),
        "vllm": str(registry.vllm_version() or "none"),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": _gpus(),
    }


def _table() -> Iterable[str]:
    sections = (table.BACKEND_KERNELS, table.COMPOSITES, table.POINTWISE, table.WHOLE_VECTORS, table.OF_VLLM)
    for section in (*sections, collectives.COLLECTIVES):
        for name, implementation in section.items():
            yield f"{name}: {implementation.__module__}.{implementation.__qualname__}"
    for name, reason in table.REFUSED.items():
        yield f"{name}: {reason}"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def _gpus() -> str:
    """Model and capability of the visible GPUs. Asks nvidia-smi: it answers the same before and after CUDA is started."""
    visible = gpu.visible() if torch.version.cuda is not None else []
    if not visible:
        return "none"
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader", f"--id={','.join(visible)}"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return "; ".join(line.strip() for line in lines)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
