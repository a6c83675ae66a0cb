"""Compiled code, kernel by kernel: the modules that Inductor generated, with a watcher around each call in them.

A module of Inductor calls its kernels by names in its globals, and operators through the dispatcher. Both are watched while a
trace runs, and are as they were afterwards. Nothing is compiled again for it: what failed is what is looked at.
"""

from __future__ import annotations

import bisect
import gc
import json
import linecache
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import FrameType, ModuleType, TracebackType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache
from torch._inductor.output_code import CompiledFxGraph

from pytest_batchinv.diagnose.calls import Generated
from pytest_batchinv.diagnose.recorder import Around, Recorder, tensors_of
from pytest_batchinv.diagnose.where import Places, Where, from_a_root
from pytest_batchinv.shapes import BatchShape
from pytest_batchinv.subjects.base import Subject

_KERNEL = re.compile(r"^(\w+) = async_compile\.(\w+)\(", re.MULTILINE)
_PARAMETERS = re.compile(r"(?:\bkernel|^def \w+)\(([^)]*)\)", re.MULTILINE)
_HANDLE = re.compile(r"^ +# \[Provenance debug handles\] (\S+)$")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')
_WHOLE_IN_CPP = "inductor_entry"
"""A name in the modules of Inductor's C++ wrapper."""
_COUNT = re.compile(r"_\d+$")


class Source(NamedTuple):
    """Where a call of generated code comes from. operators: of the graph that was compiled; lines: "file:line: text"."""

    operators: tuple[str, ...]
    lines: tuple[tuple[str, str], ...]


class Kernel:
    """A kernel in a generated module: a C++ function, or what launches one of Triton."""

    is_mutable = True

    def __init__(self, name: str, function: Any, parameters: list[str]) -> None:
        self._name, self._function, self._parameters = name, function, parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = getattr(self._function, "run", self._function)
        return call(*args, **kwargs)

    def name(self) -> str:
        """Without the number that tells two kernels of one module apart: another graph counts in another way."""
        return _COUNT.sub("", self._name)

    def reads(self, args: tuple[Any, ...]) -> list[Tensor]:
        return self._given(args, ("in_ptr", "in_out_ptr"))

    def writes(self, args: tuple[Any, ...], out: Any) -> list[Tensor]:
        return self._given(args, ("out_ptr", "in_out_ptr"))

    def _given(self, args: tuple[Any, ...], kinds: tuple[str, ...]) -> list[Tensor]:
        """A parameter whose name tells nothing, as in a user's own kernel, may be read and written."""
        known = ("in_ptr", "out_ptr", "in_out_ptr", "ws_ptr")
        return [
            x
            for x, name in zip(args, self._parameters, strict=False)
            if isinstance(x, Tensor) and (name.startswith(kinds) or not name.startswith(known))
        ]


class Empty:
    """What gives a generated module memory in which anything may stand."""

    is_mutable = False

    def __init__(self, name: str, function: Any) -> None:
        self._name, self._function = name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def name(self) -> str:
        return f"inductor::{self._name}"

    def reads(self, args: tuple[Any, ...]) -> list[Tensor]:
        return []

    def writes(self, args: tuple[Any, ...], out: Any) -> list[Tensor]:
        return tensors_of(out)


class Graph:
    """A generated module and what runs it: several objects, where Inductor took it from its cache again."""

    def __init__(self, module: ModuleType, compiled: list[CompiledFxGraph]) -> None:
        self.module, self.compiled, self.file = module, compiled, module.__file__
        assert self.file is not None
        with open(self.file, encoding="utf-8") as text:
            source = text.read()
        self._kernels = dict(_kernels(source))
        handles = [(number, m[1]) for number, line in enumerate(source.splitlines(), 1) if (m := _HANDLE.match(line))]
        self._lines, self._handles = [line for line, _ in handles], [handle for _, handle in handles]
        self._sources = _sources(compiled[0])

    def callees(self) -> dict[str, Generated]:
        """What the module calls by names in its globals: its kernels, and what allocates their results."""
        named = vars(self.module)
        kernels = {name: Kernel(name, named[name], given) for name, given in self._kernels.items() if name in named}
        return kernels | {name: Empty(name, named[name]) for name in named if name.startswith("empty_strided_")}

    def source(self, line: int) -> Source:
        """Of the call in this line of the module; empty where the graph was compiled without provenance."""
        before = bisect.bisect_right(self._lines, line) - 1
        return self._sources.get(self._handles[before], Source((), ())) if before >= 0 else Source((), ())


class Graphs(NamedTuple):
    """All that Inductor has compiled in this process and that is still in use. unseen: what has no module in Python."""

    watched: list[Graph]
    unseen: list[CompiledFxGraph]


def graphs() -> Graphs:
    compiled: dict[str, list[CompiledFxGraph]] = defaultdict(list)
    for x in gc.get_objects():
        # By type alone: proxies of other libraries answer isinstance, and may raise.
        if type(x) is CompiledFxGraph and x.current_callable is not None:
            compiled[x.cache_key].append(x)
    modules = {getattr(x, "key", ""): x for x in PyCodeCache.modules if not hasattr(x, _WHOLE_IN_CPP)}
    watched = [Graph(module, compiled[key]) for key, module in modules.items() if key in compiled]
    return Graphs(watched, [x for key, same in compiled.items() if key not in modules for x in same])


UNSEEN = "what was compiled runs without Python (a C++ wrapper, another backend), so that no kernel of it could be watched"


class CompiledCode:
    """How a trace watches a run of compiled code. parameters: names of weights by memory.

    has_unseen: whether code ran that cannot be watched; then no operator can be told.
    """

    def __init__(self, graphs: Graphs, parameters: dict[int, str]) -> None:
        self._graphs, self._parameters = graphs, parameters
        self.has_unseen = False

    @classmethod
    def of(cls, subject: Subject, cases: Iterable[BatchShape]) -> CompiledCode:
        """Runs the subject on these cases, so that their graphs exist; once more in eager code, which names the weights."""
        places = Places()
        for case in cases:
            subject.run(case)
            with places:
                subject.in_eager_mode().run(case)
        return cls(graphs(), places.parameters)

    def places(self) -> Places:
        return _GeneratedPlaces(self._graphs.watched, self._parameters)

    def observer(self, around: Around) -> _Watched:
        return _Watched(self, self._graphs, around)


class _GeneratedPlaces(Places):
    """Of calls in generated modules. Modules of the user are not entered there: their weights name them."""

    def __init__(self, graphs: list[Graph], parameters: dict[int, str]) -> None:
        super().__init__()
        self._by_file = {graph.file: graph for graph in graphs}
        self.parameters = parameters

    def __enter__(self) -> Places:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def here(self) -> Where:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename not in self._by_file:
            frame = frame.f_back
        if frame is None:
            return Where("", "", "")
        found = self._by_file[frame.f_code.co_filename].source(frame.f_lineno)
        source, line = (*found.lines, ("", ""))[0]
        lines = tuple(f"{source}: {line}" for source, line in found.lines)
        return Where("", source, line, (", ".join(found.operators), *lines) if found.operators else lines)


class _Watched:
    """Entered around a run: ``around`` gets the calls of all generated modules."""

    def __init__(self, code: CompiledCode, graphs: Graphs, around: Around) -> None:
        self._code, self._graphs, self._around = code, graphs, around

    def __enter__(self) -> None:
        self._stack = ExitStack()
        for compiled in self._graphs.unseen:
            self._stack.enter_context(mock.patch.object(compiled, "current_callable", self._unseen(compiled.current_callable)))
        for graph in self._graphs.watched:
            wrapped = {name: _Wrapped(callee, self._around) for name, callee in graph.callees().items()}
            self._stack.enter_context(mock.patch.dict(vars(graph.module), wrapped))
            runner = getattr(graph.module, "runner", None)
            if runner is not None and runner.partitions:
                plain = [vars(graph.module)[f"partition_{i}"] for i in range(len(runner.partitions))]
                self._stack.enter_context(mock.patch.object(runner, "partitions", plain))
            for compiled in graph.compiled:
                # A CUDA graph calls no kernel when it is replayed: the module's own code does.
                run = graph.module.call if compiled.fx_kwargs.get("cudagraphs") else compiled.current_callable
                inside = _Inside(run, self._around)
                self._stack.enter_context(mock.patch.object(compiled, "current_callable", inside))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _unseen(self, run: Any) -> Any:
        def noted(inputs: Any) -> Any:
            self._code.has_unseen = True
            return run(inputs)

        return noted


class _Wrapped:
    """In the place of what a module calls: C++ is called, Triton is ``run``."""

    def __init__(self, callee: Generated, around: Around) -> None:
        self._callee, self._around = callee, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return self._around(self._callee, args, kwargs)

    run = __call__


class _Inside:
    """A graph's code with a dispatch mode in it: around it the mode would keep Dynamo from taking the graph at all."""

    def __init__(self, run: Any, around: Around) -> None:
        self._run, self._around = run, around

    def __call__(self, inputs: Any) -> Any:
        with Recorder(around=self._around):
            return self._run(inputs)


def _kernels(source: str) -> Iterator[tuple[str, list[str]]]:
    """The kernels of a generated module with the names of their parameters."""
    starts = [(match[1], match.end()) for match in _KERNEL.finditer(source)]
    for name, start in starts:
        parameters = _PARAMETERS.search(source, start)
        names = parameters[1].split(",") if parameters else []
        yield name, [re.split(r"[\s*&]+", text.partition(":")[0].strip())[-1] for text in names]


def _sources(compiled: CompiledFxGraph) -> dict[str, Source]:
    """By handle: Inductor keeps them where it compiles with provenance tracking."""
    nodes = json.loads(compiled.inductor_provenance_mapping_str or "{}").get("cppCodeToPost", {})
    traces = json.loads(compiled.inductor_provenance_stack_traces_str or "{}")
    return {
        handle: Source(
            tuple(dict.fromkeys(_COUNT.sub("", node) for node in reversed(nodes.get(handle, [])))),
            tuple(dict.fromkeys(filter(None, map(_users_line, traces.get(handle, []))))),
        )
        for handle in {*nodes, *traces}
    }


def _users_line(trace: str) -> tuple[str, str] | None:
    """The innermost frame of a stack trace in which Dynamo was: file and line, and the text."""
    frames = _FRAME.findall(trace)
    if not frames:
        return None
    file, line, text = frames[-1]
    if linecache.getline(file, int(line)).strip() != text.strip():
        return None  # of a cache, and the file is another one since
    return f"{from_a_root(file)}:{line}", text
