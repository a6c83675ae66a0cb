"""Which GPUs there are. Nothing here starts CUDA."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LOWEST_CAPABILITY = 80  # A100
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass
class Share:
    """How many processes of this run use the GPU of this one."""

    workers: int = 1

    @property
    def fraction(self) -> float:
        """Of the GPU's memory, with some left for what each process takes before its first tensor."""
        return 1.0 if self.workers == 1 else 0.9 / self.workers


SHARE = Share()


def take_share() -> None:
    """Limits this process to its share of the GPU's memory. Starts CUDA."""
    import torch

    if SHARE.workers > 1:
        torch.cuda.set_per_process_memory_fraction(SHARE.fraction)


def visible(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that this process may use, as words for CUDA_VISIBLE_DEVICES."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        names = [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",")]
        # CUDA itself stops reading the list at the first name that is none.
        return names[: next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))]
    return [str(i) for i in range(_device_files() or _listed_by_nvidia_smi())]


def started() -> bool:
    """Whether torch has started CUDA in this process."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def missing() -> str:
    """Why torch cannot use a GPU here, as a sentence; empty where it can."""
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch finds no CUDA GPU on this machine"


@cache
def capability() -> int | None:
    """The compute capability of the first visible GPU, 90 for an H100; None without a GPU.

    Asks the driver, not torch: torch would start CUDA, and what has to be set before that would come too late.
    """
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device),
    )
    if any(call() != 0 for call in calls):
        return None
    return 10 * major.value + minor.value


def resolve_device(device: str) -> str:
    """ "auto" -> "cuda" or "cpu". Raises ValueError for a GPU that is older than what the kernels are made for."""
    if device == "cpu" or (device == "auto" and missing()):
        return "cpu"
    has = capability()
    if has is not None and has < LOWEST_CAPABILITY:
        raise ValueError(
            f"the GPU here is sm_{has}; batch-invariant mode needs sm_{LOWEST_CAPABILITY} (A100) or later. "
            "Use --batchinv-device cpu."
        )
    return "cuda"


def _device_files() -> int:
    return sum(1 for _ in Path("/dev").glob("nvidia[0-9]*"))


def _listed_by_nvidia_smi() -> int:
    import subprocess

    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())
