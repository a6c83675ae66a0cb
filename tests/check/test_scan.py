"""The scan: rows are found by trying, states are what was measured, and the data is what the mode reads."""

import json
import sys

import msgspec
import pytest
import torch

from pytest_batchinv import assert_batch_invariant, batch_invariant_mode, context
from pytest_batchinv.check import UnverifiedError
from pytest_batchinv.coverage import report, samples, scan, states
from pytest_batchinv.coverage.__main__ import main
from pytest_batchinv.coverage.calls import Call
from pytest_batchinv.coverage.measure import measure
from pytest_batchinv.diagnose import coverage
from pytest_batchinv.kernels import scanned, table
from pytest_batchinv.kernels.scanned import COVERED, NO_ROWS, REFUSED, ROW_LOCAL, VARIES

THREADS = (1, 2)


def state_of(function, *args):
    return measure(Call("it", function, args), THREADS).state


def walked(name, *dtypes):
    """What the scan finds in this process, in the mode as it is now."""
    with batch_invariant_mode():
        return scan.Walk("cpu", THREADS).source(name, dtypes)


def states_of(found):
    return {(cell.operator, cell.dtype): cell.state for cell in found.cells}


# --- rows and their states --------------------------------------------------------------------------------------------


def by_size(x):
    return x + 1e-6 * (len(x) == 16)


def by_place(x):
    out = x.clone()
    out.view(-1)[-3:] *= 1 + 1e-6
    return out


def by_alignment(x):
    return x * (1 + 1e-6 * (x.data_ptr() % 64 != 0))


def by_threads(x):
    return x * (1 + 1e-6 * (torch.get_num_threads() > 1))


@pytest.mark.parametrize("planted", [by_size, by_place, by_alignment, by_threads])
def test_a_function_whose_rows_follow_their_batch_varies(planted):
    torch.manual_seed(0)
    assert state_of(planted, torch.randn(5, 5)) == VARIES


def test_a_row_that_reads_its_neighbours_is_no_row():
    torch.manual_seed(0)
    assert state_of(lambda x: x.cummax(0).values, torch.randn(5)) == NO_ROWS
    assert state_of(lambda x: x.flip(0), torch.randn(5)) == NO_ROWS
    assert state_of(lambda x: x - x.amax(), torch.randn(5, 5)) == NO_ROWS


def test_a_mask_that_follows_the_position_has_its_rows_in_another_dim():
    torch.manual_seed(0)
    assert state_of(lambda x: x.triu() if x.dim() == 2 else x.sum(), torch.randn(5, 5)) == NO_ROWS
    assert state_of(torch.triu, torch.randn(3, 5, 5)) == ROW_LOCAL


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_whole_numbers_that_are_mixed_are_no_rows(dtype):
    """Of a sample with one row, too, whose row is all that there is to make other rows of."""
    x = torch.tensor([3, 0, 1, 0, 2]).to(dtype)
    assert state_of(lambda x: x.softmax(0, dtype=torch.float64), x) == NO_ROWS
    assert state_of(lambda x: x.cumsum(0).double(), x) == NO_ROWS
    assert state_of(lambda x: x.double().cummax(-1).values, x[None]) == ROW_LOCAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_what_takes_another_part_of_each_row_has_no_rows(dtype):
    torch.manual_seed(0)
    x, mask = torch.randint(-2, 3, (5, 5)).clamp(min=0).to(dtype), torch.randn(5, 5) > 0
    assert state_of(torch.diagonal, x) == NO_ROWS
    assert state_of(torch.Tensor.masked_scatter, x, mask, x.flip(0)) == NO_ROWS


def test_what_divides_by_the_number_of_rows_has_no_rows():
    torch.manual_seed(0)
    assert state_of(lambda x: x / x.numel(), torch.randn(5, 7)) == NO_ROWS
    assert state_of(lambda x: (100 * x).long() // x.numel(), torch.randn(5, 7)) == NO_ROWS


def test_what_draws_by_place_varies():
    assert state_of(torch.rand_like, torch.randn(5, 7)) == VARIES
    assert state_of(lambda x: torch.nn.functional.dropout(x, 0.5, True), torch.randn(5, 7)) == VARIES


def test_places_that_a_sample_names_once_are_named_once_in_wider_batches():
    """torch says that what is written twice to one place is not determined."""
    sizes = set()

    def write(x, index):
        assert len(index.unique()) == len(index)
        sizes.add(len(index))
        return torch.zeros_like(x).index_copy(1, index, x)

    assert state_of(write, torch.randn(4, 5), torch.tensor([3, 0, 1, 4, 2])) == ROW_LOCAL
    assert sizes >= {5, 37, 64, 256}


def test_rows_of_the_second_operand_alone_are_found():
    """As the right-hand sides of a solver are."""
    torch.manual_seed(0)
    w, x = torch.randn(5, 5), torch.randn(5, 8)
    assert state_of(lambda w, x: w[0, 0] * x.cummax(0).values, w, x) == ROW_LOCAL
    assert state_of(lambda w, x: w[0, 0] * by_size(x.cummax(0).values.t()).t(), w, x) == VARIES
    assert state_of(lambda w, x: w[0, 0] * by_place(x.cummax(0).values.t().contiguous()).t(), w, x) == VARIES


def test_rows_are_found_along_any_dim_and_beside_operands_that_have_none():
    torch.manual_seed(0)
    assert state_of(lambda x, w: x * w, torch.randn(5, 7), torch.randn(7)) == ROW_LOCAL
    assert state_of(lambda x: x.cummax(0).values, torch.randn(5, 7)) == ROW_LOCAL  # rows lie in dim 1
    assert state_of(lambda x, size: x.new_empty(size).copy_(x), torch.randn(5, 7), [5, 7]) == ROW_LOCAL


# --- what the scan says of torch and of the table ---------------------------------------------------------------------


def test_a_stock_kernel_in_the_place_of_an_entry_turns_up(monkeypatch):
    assert states_of(walked("op:atanh", "fp32"))["aten::atanh", "fp32"] == COVERED
    monkeypatch.delitem(table.WHOLE_VECTORS, "atanh")
    assert states_of(walked("op:atanh", "fp32"))["aten::atanh", "fp32"] == VARIES


def test_an_operator_that_the_mode_refuses_is_refused():
    found = walked("also:mkldnn_linear", "fp32")
    assert {function.state for function in found.functions} == {REFUSED}


def test_in_place_and_out_forms_have_cells_of_their_own():
    cells = states_of(walked("op:neg", "fp32"))
    assert cells["aten::neg", "fp32"] == cells["aten::neg_", "fp32"] == cells["aten::neg.out", "fp32"] == ROW_LOCAL


def test_a_sum_with_a_factor_is_another_cell_than_one_without():
    cells = states_of(walked("also:sum_with_a_factor", "bf16"))
    assert cells["aten::add.Tensor with alpha", "bf16"] == VARIES
    assert states_of(walked("op:add", "bf16"))["aten::add.Tensor", "bf16"] == ROW_LOCAL


@pytest.mark.parametrize(
    "source, operators",
    [
        ("quotient_by_a_number", {"aten::div.Scalar", "aten::div_.Scalar"}),
        ("index_copy", {"aten::index_copy", "aten::index_copy_"}),
        ("slices", {"aten::slice_backward"}),
    ],
)
def test_operators_of_models_are_row_local(source, operators):
    """A number that is the number of rows by chance, as 5 in ``x / 5`` of 5 rows, counts none."""
    cells = [cell for cell in walked(f"also:{source}", "bf16").cells if cell.operator in operators]
    assert {cell.operator for cell in cells} == operators and {cell.state for cell in cells} == {ROW_LOCAL}


def test_gradients_have_cells(monkeypatch):
    found = walked("op:nn.functional.softshrink", "fp32")
    assert ("aten::softshrink_backward", "b") in {(cell.operator, cell.direction) for cell in found.cells}


def test_a_sample_that_varies_while_no_operator_in_it_is_unverified_is_silent(monkeypatch):
    for name in ("linalg_multi_dot", "linalg_multi_dot.out"):
        monkeypatch.delitem(table.COMPOSITES, name)
    found = walked("also:multi_dot", "fp32")
    (line,) = scan.data(found, "cpu", THREADS, ("fp32",)).silent
    assert line.startswith("also:multi_dot fp32: rows in dim 0")


def test_no_sample_of_a_product_of_several_matrices_is_silent():
    found = walked("also:multi_dot", "fp32")
    assert {function.state for function in found.functions} == {ROW_LOCAL}
    assert scan.data(found, "cpu", THREADS, ("fp32",)).silent == []


def test_the_same_scan_writes_the_same_bytes():
    once, again = (scan.data(walked("op:neg", "fp32", "bf16"), "cpu", THREADS, ("fp32", "bf16")).to_json() for _ in range(2))
    assert once == again
    assert scanned.Scan.from_json(once).to_json() == once
    assert json.loads(once)["eager"]["aten::neg"][ROW_LOCAL] == "bf16 fp32"


def test_the_worst_that_a_call_showed_is_the_state_of_its_cell():
    cells = [states.Cell("aten::it", "fp32", "f", state, "", "") for state in (NO_ROWS, ROW_LOCAL, VARIES)]
    assert states.merged(cells) == {"aten::it": {VARIES: "fp32"}}
    assert states.merged(cells[:2]) == {"aten::it": {ROW_LOCAL: "fp32"}}


class FakeWorker:
    """In place of a process: what it ``says`` of a source, at once."""

    def __init__(self, *_):
        pass

    @staticmethod
    def ready(workers):
        return workers

    def begin(self, name, account):
        self.begun.append(name)
        self.name = name

    def heard(self):
        return self.says(self.name)

    def end(self):
        pass


def that(source):
    return states.Found(cells=[states.Cell("aten::that", "fp32", "f", ROW_LOCAL, "", source)])


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_process_that_ends_is_a_result_and_the_scan_goes_on(monkeypatch, jobs):
    class Worker(FakeWorker):
        begun = []

        def says(self, name):
            if self.begun.count(name) == 1 and name == "also:rfft":
                raise scan._Ended("it ended the process (exit code -11)", ("aten::it", "fp32", ""))
            return that(name)

    monkeypatch.setattr(scan, "_Worker", Worker)
    found = scan.scan("cpu", ("fp32",), THREADS, ("rfft", "multi_dot"), jobs=jobs)
    assert sorted(Worker.begun) == ["also:multi_dot", "also:rfft", "also:rfft"]
    assert {(cell.operator, cell.state) for cell in found.cells} == {("aten::it", scanned.RAISES), ("aten::that", ROW_LOCAL)}
    assert ("aten::it", "fp32", "") in found.seen


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_scan_says_so_and_goes_on_where_it_was(monkeypatch, tmp_path, jobs):
    """By the file of its calls, as from the command line."""
    wanted = ("rfft", "multi_dot", "neg", "exp")

    class Worker(FakeWorker):
        begun, is_interrupted = [], True

        def says(self, name):
            if self.is_interrupted and len(self.begun) > 2:
                raise KeyboardInterrupt
            return that(name)

    monkeypatch.setattr(scan, "_Worker", Worker)
    cells, out = tmp_path / "cells.json", tmp_path / "scan.json"
    words = ["--only", ",".join(wanted), "--dtypes", "fp32", "--jobs", str(jobs), "--cells", str(cells), "--out", str(out)]
    assert main([*words, "--quiet"]) == 0
    cut = scanned.Scan.from_json(out.read_text())
    done = msgspec.json.decode(cells.read_bytes(), type=states.Found).done
    every = scan.sources(wanted)
    assert 0 < len(done) < len(every)
    assert cut.not_run == [f"interrupted  {len(every) - len(done)} of {len(every)} sources were not run"]
    Worker.is_interrupted, Worker.begun = False, []
    assert main([*words, "--quiet", "--resume"]) == 0
    assert sorted([*Worker.begun, *done]) == sorted(every)
    assert scanned.Scan.from_json(out.read_text()).not_run == []
    kept = msgspec.json.decode(cells.read_bytes(), type=states.Found)
    assert sorted(cell.source for cell in kept.cells) == sorted(every)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--resume"], "--resume needs --cells with the file of an earlier scan"),
        (["--resume", "--cells", "none.json"], "none.json cannot be read"),
        (["--resume", "--cells", "words"], "words holds something else"),
        (["--again", "neg", "--cells", "other.json"], "other.json holds something else"),
        (["--only", "neg,nosuchop"], "there are no samples of nosuchop"),
        (["--compare", "none.json", "words"], "none.json cannot be read"),
        (["--compare", "other.json", "words"], "other.json holds something else"),
    ],
)
def test_what_a_scan_cannot_do_is_said_in_a_sentence_and_no_file_changes(words, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").write_text("hello")
    (tmp_path / "other.json").write_text('{"a": 1}')
    assert main(words) == 2
    assert sentence in capsys.readouterr().err
    assert (tmp_path / "words").read_text() == "hello" and (tmp_path / "other.json").read_text() == '{"a": 1}'


def test_sources_that_are_scanned_again_take_the_place_of_what_they_gave():
    cells = [states.Cell("aten::it", "fp32", "f", VARIES, "", source) for source in ("op:one", "op:other")]
    kept = states.Found(cells=cells, not_run=[("op:one", "fp32", "why")]).without(["op:one"])
    assert kept.cells == cells[1:] and not kept.not_run


def test_the_processes_of_a_scan_find_what_this_one_finds(capsys):
    """Two spawned processes, as with a GPU, which a forked one could not use."""
    found = scan.scan("cpu", ("fp32",), THREADS, ("neg", "exp"), jobs=2)
    cells = states_of(found)
    assert cells["aten::neg", "fp32"] == ROW_LOCAL and cells["aten::exp", "fp32"] == COVERED
    assert found.not_run == []


def test_what_changed_between_two_scans_is_listed_the_worst_first():
    old = scanned.Scan("1", "cpu-a", eager={"aten::a": {ROW_LOCAL: "fp32"}, "aten::b": {VARIES: "fp32"}})
    new = scanned.Scan(
        "2", "cpu-a", eager={"aten::a": {VARIES: "fp32"}, "aten::b": {COVERED: "fp32"}, "aten::c": {ROW_LOCAL: "bf16"}}
    )
    assert report.difference(old, new) == [
        "3 cells changed from torch 1 on cpu-a to torch 2 on cpu-a",
        "  row-local -> varies: 1: aten::a fp32",
        "  never seen -> row-local: 1: aten::c bf16",
        "  varies -> covered: 1: aten::b fp32",
    ]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.delattr(torch.testing._internal, "common_methods_invocations", raising=False)
    monkeypatch.setitem(sys.modules, "torch.testing._internal.common_methods_invocations", None)
    with pytest.raises(samples.MissingPackage, match="pytest-batchinv\\[scan\\]"):
        samples.names()


# --- what the mode makes of it ----------------------------------------------------------------------------------------


def ops_of(function, x):
    with batch_invariant_mode():
        return assert_batch_invariant(function, x, relations=("R",), max_examples=1).ops


def test_an_operator_that_the_scan_never_saw_is_unverified_and_named(monkeypatch):
    assert ops_of(torch.neg, torch.randn(9, 5)).unverified == ()
    without = scanned.Scan.from_json(scanned.scan_of("cpu").to_json())
    del without.eager["aten::neg"]
    monkeypatch.setattr(scanned, "scan_of", lambda device: without)
    assert ops_of(torch.neg, torch.randn(9, 5)).unverified == ("aten::neg",)


def test_without_data_for_this_torch_every_operator_but_views_is_unverified_and_the_record_says_how_to_get_it(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(scanned, "FOLDER", tmp_path)
    scanned.scan_of.cache_clear()
    try:
        ops = ops_of(lambda x: x.exp()[:, :2].neg(), torch.randn(9, 5))
    finally:
        monkeypatch.undo()
        scanned.scan_of.cache_clear()
    assert "aten::exp" in ops.covered and "aten::slice.Tensor" in ops.row_local
    assert "aten::neg" in ops.unverified
    assert "has not been scanned" in ops.not_scanned and "python -m pytest_batchinv.coverage --device cpu" in ops.not_scanned


def test_an_entry_of_the_table_that_the_scan_saw_vary_is_unverified():
    seen = scanned.Scan("1", "cpu-a", eager={"aten::exp": {VARIES: "fp32"}})
    assert coverage.vouched(torch.ops.aten.exp.default, "aten::exp", "cpu", "fp32", seen) is None
    assert coverage.vouched(torch.ops.aten.exp.default, "aten::exp", "cpu", "fp64", seen) == "covered"


def test_an_operator_of_another_library_is_unverified():
    library = torch.library.Library("scan_test", "FRAGMENT")
    try:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x + x, "CPU")
        assert ops_of(torch.ops.scan_test.twice.default, torch.randn(9, 5)).unverified == ("scan_test::twice",)
    finally:
        library._destroy()


def test_what_varies_is_named():
    y = torch.randn(9, 5)
    for function, x, name in (
        (lambda x: x * x, torch.randn(9, 5, dtype=torch.complex64), "aten::mul.Tensor"),
        (lambda x: x * 1j, y, "aten::mul.Tensor"),
        (lambda x: torch.add(x, x, alpha=1.3), y.bfloat16(), "aten::add.Tensor with alpha"),
    ):
        with batch_invariant_mode():
            found = coverage.sort_calls(_calls(function, x), {})
        assert found.unverified == (name,)


def test_strict_makes_an_unverified_operator_an_error_and_the_record_names_it(monkeypatch):
    without = scanned.Scan.from_json(scanned.scan_of("cpu").to_json())
    del without.eager["aten::neg"]
    monkeypatch.setattr(scanned, "scan_of", lambda device: without)
    x, records = torch.randn(9, 5), []
    strict = context.Context(strict=True, emit=records.append)
    with batch_invariant_mode(), context.surrounding(strict):
        assert_batch_invariant(lambda x: x.exp().abs(), x, relations=("R",), max_examples=1)
        with pytest.raises(UnverifiedError, match="aten::neg ran, which are neither in the table nor known"):
            assert_batch_invariant(torch.neg, x, relations=("R",), max_examples=1)
    with context.surrounding(strict):  # with the mode off nothing is vouched for
        assert_batch_invariant(torch.neg, x, relations=("R",), max_examples=1)
    assert [record.verdict for record in records] == ["equal", "error", "equal"]
    assert records[1].ops.unverified == ("aten::neg",)


def _calls(function, x):
    recorder = coverage.Recorder()
    with recorder:
        function(x)
    return recorder.calls
