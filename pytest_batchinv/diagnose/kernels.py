"""Which GPU kernels an operator launched, and on which grid: from torch's profiler."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch


def launched(call: Callable[[], Any]) -> tuple[str, ...]:
    """Runs the call twice and tells the kernels of the second run, in order, as "name <<<grid>>>"."""
    call()  # what is launched once only, a plan or a workspace, is not the operator's
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        events = msgspec.json.decode(file.read_bytes())["traceEvents"]
    kernels = sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"])
    return tuple(f"{event['name']} <<<{', '.join(map(str, event['args']['grid']))}>>>" for event in kernels)
