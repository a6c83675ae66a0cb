"""What each rank of ``tests/check/test_ranks.py`` does: it answers, or fails in the way that it is asked to."""

import os
import signal
import time

import torch
from torch import distributed


def failing(rank, world_size, where=""):
    if where == "at the start" and rank == 1:
        raise ValueError("rank 1 does not like its arguments")

    def handle(request):
        if rank == 1 and request in FAULTS:
            FAULTS[request]()
        if request in FAULTS:
            distributed.barrier()  # where the other ranks wait for it
        if request == "all raise":
            raise ValueError("nobody likes it")
        x = torch.tensor([rank + 1.0])
        distributed.all_reduce(x)
        return rank, x.item(), os.getpid()

    return handle


def _raise():
    raise ValueError("rank 1 does not like it")


FAULTS = {
    "raise": _raise,
    "exit": lambda: os._exit(3),
    "be killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(1000),
}
