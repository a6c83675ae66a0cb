"""pytest-xdist: a GPU and a share of the cores for each worker. Records travel on the tests' own reports."""

import itertools
import os
import sys
from collections.abc import MutableMapping
from typing import Any

import pytest

from pytest_batchinv import gpu

_SLOT = "batchinv_slot"


class WorkerSlots:
    """On the controller: numbers the workers from 0 on. One that replaces a dead worker gets the dead one's number."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        slot = next(i for i in itertools.count() if i not in self._taken.values())
        self._taken[node.gateway.id] = node.workerinput[_SLOT] = slot

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._taken.pop(node.gateway.id, None)


def hand_out_tests_one_by_one(config: Any) -> None:
    """Unless --maxschedchunk says otherwise: a check takes seconds to minutes, and no worker should sit on several."""
    if config.option.maxschedchunk is None:
        config.option.maxschedchunk = 1


class Refusal:
    """On a worker that cannot work: one collection error with the reason, for a usage error would look like a crash."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def pytest_make_collect_report(self, collector: Any) -> pytest.CollectReport:
        return pytest.CollectReport(collector.nodeid, "failed", self._reason, [])


def is_worker(config: Any) -> bool:
    return hasattr(config, "workerinput")


def take_gpu(config: Any, environ: MutableMapping[str, str] = os.environ) -> str:
    """On a worker: leaves one GPU visible, by the worker's number. Returns why that cannot be, or nothing.

    Where there are more workers than GPUs several share one, and each takes its share of the memory.
    """
    gpus = gpu.visible(environ)
    if not gpus:
        return ""
    if gpu.started():
        return (
            "This worker cannot be given a GPU of its own, because CUDA has started in it already. "
            "Let no conftest.py and no plugin use CUDA while it is imported, or run without -n."
        )
    slot, workers = config.workerinput[_SLOT], config.workerinput["workercount"]
    environ["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    gpu.SHARE.workers = len(range(slot % len(gpus), max(workers, slot + 1), len(gpus)))
    return ""


def share_cores(config: Any, environ: MutableMapping[str, str] = os.environ) -> None:
    """On a worker: as many threads as its share of the cores, unless OMP_NUM_THREADS says otherwise.

    Threads that wait for work spin: with more of them than cores a run takes ten times as long.
    """
    if "OMP_NUM_THREADS" not in environ:
        threads = max(1, len(os.sched_getaffinity(0)) // config.workerinput["workercount"])
        environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
