"""Defines operators with the names and arguments of vLLM's."""

import torch

from pytest_batchinv.kernels import vllm

library = torch.library.Library("_C", "FRAGMENT")
for name, arguments in vllm.SCHEMAS.items():
    library.define(f"{name.removeprefix('_C::')}({arguments}")
