"""The last passes over each graph that Inductor compiles in the mode: the user's own, the fusions, the guard."""

from collections.abc import Callable, Sequence
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from pytest_batchinv.kernels.inductor import fusions, guard

Pass = Callable[[Graph], Any]

OURS: tuple[Pass, ...] = (fusions.fuse_mean_of_squares, fusions.fuse_chosen_logprobs, guard.refuse_leftovers)


class Passes(CustomGraphPass):
    """Runs passes over a graph, one after the other."""

    def __init__(self, passes: tuple[Pass, ...], fingerprint: str) -> None:
        self._passes = passes
        self._fingerprint = fingerprint

    def __call__(self, graph: Graph) -> None:
        for run in self._passes:
            run(graph)

    def uuid(self) -> Any:
        """Names the passes in Inductor's cache key; the fingerprint covers the source of ours."""
        return "batchinv", self._fingerprint, *(_uuid(run) for run in self._passes if run not in OURS)


def passes(users: Pass | Sequence[Pass] | None, fingerprint: str) -> Passes:
    """The user's passes first, so that the guard sees what they leave. Inductor takes one, or several."""
    if isinstance(users, Passes):  # a compilation within a compilation
        return users
    if users is None:
        return Passes(OURS, fingerprint)
    return Passes((*(users if isinstance(users, Sequence) else [users]), *OURS), fingerprint)


def _uuid(run: Pass) -> Any:
    return run.uuid() if isinstance(run, CustomGraphPass) else repr(run)
