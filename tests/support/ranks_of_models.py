"""What each rank of ``tests/e2e/test_tensor_parallel.py`` does."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from pytest_batchinv.kernels import inductor
from pytest_batchinv.mode import worker_init_fn
from pytest_batchinv.tensor_parallel import rank_invariant

assert inductor  # imported before the launcher forks, as it takes seconds

PLAN = {"up": "colwise", "down": "rowwise"}


def mlp(dtype):
    torch.manual_seed(1)
    model = nn.Sequential()
    model.add_module("up", nn.Linear(24, 64))
    model.add_module("act", nn.GELU())
    model.add_module("down", nn.Linear(64, 40))
    return model.to(dtype)


def rows(dtype):
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def bits(x):
    return x.detach().contiguous().view(torch.uint8).tolist()


def torchs_own_styles(rank, world_size):
    """``parallelize_module``: in the mode with the setting and without, and what is refused: called with a dtype's name."""
    mesh = init_device_mesh("cpu", (world_size,))
    worker_init_fn()

    def call(request):
        name, layout = request
        dtype = getattr(torch, name)
        styles = {"up": ColwiseParallel(), "down": RowwiseParallel(use_local_output=layout == "local")}
        model = parallelize_module(mlp(dtype), mesh, styles)
        with torch.no_grad():
            alone = model(rows(dtype))
            with rank_invariant(model) as names:
                out = model(rows(dtype))
            again = model(rows(dtype))
        whole = [x.full_tensor() if layout != "local" else x for x in (alone, out, again)]
        return names, *map(bits, whole)

    return call


def gradients(rank, world_size):
    """Of the input, and of this rank's part of the weight of the row-parallel layer."""
    mesh = init_device_mesh("cpu", (world_size,))
    worker_init_fn()

    def call(_):
        model = parallelize_module(mlp(torch.float32), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        x = rows(torch.float32).requires_grad_()
        with rank_invariant(model):
            model(x).square().sum().backward()
        return x.grad.tolist(), model.down.weight.grad.full_tensor().tolist()

    return call
