"""One GPU for each worker, and a worker's death."""

import sys
from types import SimpleNamespace

import pytest

from pytest_batchinv import gpu
from pytest_batchinv.plugin import xdist

SHOW = """
import os
import time
import pytest

@pytest.mark.parametrize("i", range(8))
def test_it(i, worker_id):
    time.sleep(0.05)  # both workers get some
    open(f"saw-{worker_id}-{os.environ.get('CUDA_VISIBLE_DEVICES')}", "w").close()
"""


def seen(pytester):
    return sorted(path.name for path in pytester.path.glob("saw-*"))


def test_worker_i_sees_gpu_i(pytester, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-abc")
    pytester.makepyfile(SHOW)
    pytester.runpytest_inprocess("--batch-invariant", "-n2").assert_outcomes(passed=8)
    assert seen(pytester) == ["saw-gw0-4", "saw-gw1-GPU-abc"]


@pytest.mark.parametrize("options", [["--batch-invariant", "--batchinv-device=cpu"], []])
def test_the_gpus_are_left_alone_where_they_are_not_used(pytester, monkeypatch, options):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    pytester.makepyfile(SHOW)
    pytester.runpytest_inprocess(*options, "-n2").assert_outcomes(passed=8)
    assert seen(pytester) == ["saw-gw0-4,5", "saw-gw1-4,5"]


def test_no_worker_sits_on_tests_that_another_could_run(pytester):
    pytester.makepyfile(
        """
        import pathlib
        import time
        import pytest

        @pytest.mark.parametrize("i", range(40))
        def test_it(i):
            others = set(range(2, 40))  # 1 waits behind 0: xdist gives a worker two tests at least
            pathlib.Path(f"ran-{i}").touch()
            deadline = time.monotonic() + 60
            while i == 0 and not all(pathlib.Path(f"ran-{n}").exists() for n in others):
                assert time.monotonic() < deadline, "tests wait behind this one"
                time.sleep(0.05)
        """
    )
    pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu", "-n2").assert_outcomes(passed=40)


def test_a_worker_that_dies_takes_nothing_with_it(pytester):
    pytester.makepyfile(
        """
        import os
        import pytest
        from conftest import emit

        @pytest.mark.parametrize("i", range(6))
        def test_it(i):
            if i == 3:
                os._exit(1)
            emit("R")
        """
    )
    result = pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu", "-n2")
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(["  eager *R equal *100 batches *1,500 rows *25.0 MB*"])


def test_a_new_worker_takes_the_number_of_the_dead_one():
    slots = xdist.WorkerSlots()
    nodes = [SimpleNamespace(gateway=SimpleNamespace(id=f"gw{i}"), workerinput={}) for i in range(3)]
    slots.pytest_configure_node(nodes[0])
    slots.pytest_configure_node(nodes[1])
    slots.pytest_testnodedown(nodes[0])
    slots.pytest_configure_node(nodes[2])
    assert [node.workerinput["batchinv_slot"] for node in nodes] == [0, 1, 0]


def worker(slot, workers=2):
    return SimpleNamespace(workerinput={"batchinv_slot": slot, "workercount": workers})


@pytest.mark.parametrize("slot, workers, device, share", [(0, 2, "6", 1), (5, 6, "7", 3), (4, 5, "6", 3), (3, 5, "7", 2)])
def test_more_workers_than_gpus_share_them_and_their_memory(monkeypatch, slot, workers, device, share):
    monkeypatch.setattr(gpu, "started", lambda: False)
    monkeypatch.setattr(gpu, "SHARE", gpu.Share())
    environ = {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert xdist.take_gpu(worker(slot, workers), environ) == ""
    assert environ == {"CUDA_VISIBLE_DEVICES": device}
    assert gpu.SHARE.workers == share


def test_a_gpu_cannot_be_given_once_cuda_has_started(monkeypatch):
    torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", torch)
    environ = {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert "because CUDA has started in it already" in xdist.take_gpu(worker(0), environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert xdist.take_gpu(worker(0), {"CUDA_VISIBLE_DEVICES": ""}) == ""


def test_cuda_that_started_too_early_ends_the_run_with_the_reason(pytester, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    pytester.makeconftest(
        """
        import os, sys, types

        if "PYTEST_XDIST_WORKER" in os.environ:
            sys.modules["torch"] = types.ModuleType("torch")
            sys.modules["torch"].manual_seed = sys.modules["torch"].set_num_threads = id
            sys.modules["torch"].cuda = types.SimpleNamespace(is_initialized=lambda: True)
        """
    )
    pytester.makepyfile("def test_it(): pass")
    result = pytester.runpytest_inprocess("--batch-invariant", "-n2")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["This worker cannot be given a GPU of its own, because CUDA has started in it already.*"])
    result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.parametrize(
    "variable, gpus",
    [("", []), ("-1", []), ("3", ["3"]), ("0,2", ["0", "2"]), ("0,-1,2", ["0"]), ("MIG-a,MIG-b", ["MIG-a", "MIG-b"])],
)
def test_the_variable_of_cuda_is_read_as_cuda_reads_it(variable, gpus):
    assert gpu.visible({"CUDA_VISIBLE_DEVICES": variable}) == gpus


def test_gpus_are_counted_without_starting_cuda(monkeypatch):
    monkeypatch.setattr(gpu, "_device_files", lambda: 3)
    assert gpu.visible({}) == ["0", "1", "2"]
    monkeypatch.setattr(gpu, "_device_files", lambda: 0)
    listing = "GPU 0: NVIDIA H200 (UUID: GPU-1)\n  MIG 1g.18gb Device 0: (UUID: MIG-2)\nGPU 1: NVIDIA H200 (UUID: GPU-3)\n"
    monkeypatch.setattr("subprocess.run", lambda *a, **k: SimpleNamespace(stdout=listing))
    assert gpu.visible({}) == ["0", "1"]
