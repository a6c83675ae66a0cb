"""A finding in compiled code names the kernel at which the bits part, what is in it, and the user's line."""

import importlib.util

import pytest
import torch
from torch._inductor import lowering

from pytest_batchinv import BatchVarianceError, assert_batch_invariant, check_batch_invariant
from pytest_batchinv.diagnose import bisection
from pytest_batchinv.diagnose.generated import UNSEEN, CompiledCode, graphs
from pytest_batchinv.mutants.compiled import COMPILED, contracted, steady
from pytest_batchinv.mutants.detection import is_located
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.rows import RowsSubject

OTHER_WHEN_COMPILED = """
import torch

def fn(x):
    {padding}return torch.cos(x) * 0.5 + (1.0 if torch.compiler.is_compiling() else 2.0)
"""


def finding_of(fn, pool, relations, compile_mode=None):
    with pytest.raises(BatchVarianceError) as caught:
        check_batch_invariant(RowsSubject(fn, [pool], compile_mode=compile_mode), relations, seed=0)
    return caught.value.record


def module_of(file, text):
    file.write_text(text)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fault", COMPILED, ids=[fault.name for fault in COMPILED])
def test_a_fault_of_compiled_code_is_caught_and_located_in_its_kernel_and_line(fault):
    fn, pool = fault.make()
    record = finding_of(fn, pool, fault.relations, fault.compile_mode)
    assert record.relation == fault.relation
    assert is_located(fault, record)
    assert record.finding.trace.cause.effect == "causes"


def test_every_kernel_that_parts_shows_though_each_is_in_the_wake_of_the_one_before():
    fault = next(fault for fault in COMPILED if "wake" in fault.name)
    fn, pool = fault.make()
    trace = finding_of(fn, pool, ("X",), fault.compile_mode).finding.trace
    assert sum(op.agreement == "differs" for op in trace.ops) == 2


def test_the_error_names_the_kernel_and_what_it_is_made_of():
    fault = next(fault for fault in COMPILED if "lowering" in fault.name)
    fn, pool = fault.make()
    with pytest.raises(BatchVarianceError) as caught:
        assert_batch_invariant(fn, pool, relations=("X",), compile_mode="dynamic", seed=0)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("wrong_lowering.layer (fp32, dynamic, cpu), cpp_fused_contracted_")
    assert any(line.startswith("  operator    cpp_fused_contracted_") for line in lines)
    assert any(line.endswith("hidden = contracted(hidden)  # planted") for line in lines)


def test_lines_are_those_of_this_program_and_not_of_another_with_the_same_graph(tmp_path):
    """torch's cache gives one graph to both, with the lines of the first."""
    for name, padding in (("first", ""), ("second", "x = x\n    ")):
        fn = module_of(tmp_path / f"{name}.py", OTHER_WHEN_COMPILED.format(padding=padding)).fn
        trace = finding_of(fn, torch.rand(8, 16), ("X",), "dynamic").finding.trace
        assert f"{name}.py:" in trace.ops[trace.cause.op].source, trace.ops


def test_code_that_runs_without_generated_python_is_said_not_to_have_been_watched():
    def fn(x):
        return x * 0.5 + (1.0 if torch.compiler.is_compiling() else 2.0)

    trace = finding_of(torch.compile(fn, backend="aot_eager"), torch.rand(8, 16), ("X",)).finding.trace
    assert trace.notes[0] == UNSEEN and trace.notes[1].startswith("it cannot be bisected") and not trace.ops


def test_generated_modules_are_as_they_were_after_a_trace_that_failed():
    w = torch.rand(16, 16)
    subject = RowsSubject(lambda x: steady(x * 0.5, w).cos(), [torch.rand(8, 16)], compile_mode="dynamic")
    case = BatchShape((Row(0), Row(1)))
    code = CompiledCode.of(subject, (case,))
    before = [(dict(vars(graph.module)), [x.current_callable for x in graph.compiled]) for graph in graphs().watched]

    def crash(*_):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        subject.run(case, code.observer(crash))
    assert before == [(dict(vars(graph.module)), [x.current_callable for x in graph.compiled]) for graph in graphs().watched]


def test_code_that_cannot_be_watched_is_bisected_to_the_lowering(monkeypatch):
    """Planted: Inductor's ``cos`` of one row is scaled. A C++ wrapper calls nothing from Python."""
    cos, mul = (lowering.lowerings[op] for op in (torch.ops.aten.cos.default, torch.ops.aten.mul.Tensor))

    def planted(x):
        return mul(cos(x), 1.0 + 2.0**-20) if x.get_size()[0] == 1 else cos(x)

    monkeypatch.setitem(lowering.lowerings, torch.ops.aten.cos.default, planted)
    pool = torch.randn(40, 37, generator=torch.Generator().manual_seed(0))
    case = BatchShape((Row(0), Row(4)))
    with torch._inductor.config.patch(cpp_wrapper=True), pytest.raises(BatchVarianceError) as caught:
        assert_batch_invariant(lambda x: (x * 0.5).cos() + 1.0, pool, relations=("I",), compile_mode="default", case=case)
    found = caught.value.finding.trace
    assert not found.culprits
    assert found.notes[1].startswith("what was compiled runs without Python")
    assert found.notes[2].startswith("bisection: the bits part with torch's backend 'inductor', at number ")
    assert found.notes[2].endswith("of its lowerings: cos")


def test_two_graphs_of_the_two_sides_are_set_beside_eager_code():
    """Planted: compiled, a batch of one row is another graph, and a batch of more is scaled."""
    w = torch.rand(16, 16)

    def fn(x):
        if torch.compiler.is_compiling() and x.shape[0] > 1:
            return contracted(steady(x.abs() + 0.5, w)) * 2.0
        return steady(x.abs() + 0.5, w) * 2.0

    found = finding_of(fn, torch.rand(8, 16), ("I",), "default").finding.trace
    assert "contracted" in found.ops[found.cause.op].overload, found
    assert any(note.startswith("the two sides run other graphs") for note in found.notes)


def test_a_bisection_that_fails_leaves_the_rest_of_the_trace(monkeypatch):
    pool = torch.randn(40, 37, generator=torch.Generator().manual_seed(0))

    def crash(*_):
        raise ValueError("planted")

    monkeypatch.setattr(bisection.CompilerBisector, "do_bisect", crash)
    with torch._inductor.config.patch(cpp_wrapper=True), pytest.raises(BatchVarianceError) as caught:
        assert_batch_invariant(
            lambda x: x.std(1), pool, relations=("I",), compile_mode="default", case=BatchShape((Row(0), Row(4)))
        )
    assert caught.value.finding.trace.notes[1:] == (UNSEEN, "bisection failed: ValueError: planted")
