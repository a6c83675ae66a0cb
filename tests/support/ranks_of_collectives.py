"""What each rank of ``tests/kernels/test_collectives.py`` does: calls that add over ranks, by name, in the mode."""

import torch
from torch import distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh

from pytest_batchinv.kernels import collectives, counters, inductor
from pytest_batchinv.mode import worker_init_fn

assert inductor  # imported before the launcher forks, as it takes seconds
torch._inductor.config.compile_threads = 1

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "c64": torch.complex64,
    "int": torch.int64,
}
SIZES = (1, 2, 3, 4, 8)


def part(rank, dtype, n):
    """Values of many sizes, some of them zeros of either sign: any other order of their sum has other bits."""
    draw = torch.Generator().manual_seed(1000 * n + rank)
    x = torch.randn(n, generator=draw, dtype=torch.float64) * 2.0 ** torch.randint(-8, 8, (n,), generator=draw)
    x = torch.where(torch.rand(n, generator=draw) < 0.1, -0.0, x)
    if dtype == "c64":
        return torch.complex(x, x.flip(0)).to(torch.complex64)
    return x.mul(100 if dtype == "int" else 1).to(DTYPES[dtype])


def bits(x):
    return x.contiguous().view(torch.uint8).tolist() if x.numel() else []


class Group:
    """One rank's view of a group of the first ``size`` ranks."""

    def __init__(self, rank, size, group, mesh):
        self.rank, self.size, self.group, self.mesh = rank, size, group, mesh

    def all_reduce(self, x, op):
        dist.all_reduce(x, op, self.group)
        return x

    def all_reduce_async(self, x, op):
        work = dist.all_reduce(x, op, self.group, async_op=True)
        work.wait()
        assert work.is_completed()
        return x

    def all_reduce_of_a_view(self, x, op):
        wide = torch.stack((x, x), 1)
        dist.all_reduce(wide[:, 0], op, self.group)
        return wide[:, 0]

    def functional_all_reduce(self, x, op):
        return functional.all_reduce(x, "sum", self.group).view(x.shape)

    def all_reduce_compiled(self, x, op):
        run = torch.compile(lambda x: functional.all_reduce(x * 1.0, "sum", self.group) * 1.0, fullgraph=True)
        return run(x)

    def gradients_of_ddp(self, x, op):
        """Its reducer calls the collectives from C++."""
        torch.manual_seed(0)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 3), process_group=self.group)
        model(x.view(8, 8)).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def coalesced(self, x, op):
        parts = list(x.clone().chunk(2))
        with dist._coalescing_manager(self.group):
            for each in parts:
                dist.all_reduce(each, op, self.group)
        return torch.cat(parts)

    def reduce_to_everyone(self, x, op):
        out = []
        for root in range(self.size):
            mine = x.clone()
            dist.reduce(mine, root, op, self.group)
            if root == self.rank:
                out.append(mine)
            else:
                assert bits(mine) == bits(x), "a rank that is not the root lost what it had"
        return out[0]

    def reduce_scatter(self, x, op):
        out = torch.empty(len(x) // self.size, dtype=x.dtype)
        dist.reduce_scatter_tensor(out, x, op, self.group)
        return self._whole(out)

    def reduce_scatter_of_a_list(self, x, op):
        parts = [part.clone() for part in x.tensor_split(self.size)]
        out = torch.empty_like(parts[self.rank])
        if len({len(p) for p in parts}) > 1:  # torch asks for equal sizes in this call on gloo
            return x.new_empty(0)
        dist.reduce_scatter(out, parts, op, self.group)
        return self._whole(out)

    def functional_reduce_scatter(self, x, op):
        return self._whole(functional.reduce_scatter_tensor(x, "sum", 0, self.group).clone())

    def dtensor_all_reduce(self, x, op):
        return DTensor.from_local(x, self.mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local().view(x.shape)

    def dtensor_reduce_scatter(self, x, op):
        scattered = DTensor.from_local(x, self.mesh, [Partial()]).redistribute(placements=[Shard(0)])
        return scattered.full_tensor().clone()

    def _whole(self, chunk):
        """Gathered, which adds nothing."""
        chunks = [torch.empty_like(chunk) for _ in range(self.size)]
        dist.all_gather(chunks, chunk.contiguous(), self.group)
        return torch.cat(chunks)


def calls(rank, world_size):
    groups = {size: dist.new_group(range(size)) for size in SIZES}
    worker_init_fn()  # in the mode from here on
    meshes = {size: init_device_mesh("cpu", (size,)) for size in SIZES if size == world_size}

    def call(request):
        """The bits of the result, and which operators of ours were called; None outside of the group."""
        name, size, dtype, n, op, extra_bytes = request
        if rank >= size:
            return None
        group = Group(rank, size, groups[size], meshes.get(size))
        before = collectives.EXTRA_BYTES_FOR_TWO_SHOTS
        collectives.EXTRA_BYTES_FOR_TWO_SHOTS = before if extra_bytes is None else extra_bytes
        try:
            with counters.counting_apart() as hits:
                out = getattr(group, name)(part(rank, dtype, n), getattr(dist.ReduceOp, op))
                return bits(out), sorted(hit for hit in hits if hit.startswith("c10d"))
        finally:
            collectives.EXTRA_BYTES_FOR_TWO_SHOTS = before

    return call
