"""A finding names the operator at which the row's bits part, its line, what it causes and what cures it."""

import warnings
import weakref

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from pytest_batchinv import BatchVarianceError, assert_batch_invariant, batch_invariant_mode, check_batch_invariant
from pytest_batchinv.diagnose import culprits, trace
from pytest_batchinv.mode import stock_torch
from pytest_batchinv.mutants import rows as planted
from pytest_batchinv.mutants.detection import is_located
from pytest_batchinv.mutants.faults import FAULTS, gemv
from pytest_batchinv.report.message import trace_parts
from pytest_batchinv.shapes import BatchShape, Row, Steps
from pytest_batchinv.subjects.rows import RowsSubject
from pytest_batchinv.subjects.transformers import TransformersSubject


def finding_of(fn, *inputs, relations=("R", "S", "I"), **options):
    with pytest.raises(BatchVarianceError) as caught:
        assert_batch_invariant(fn, *inputs, relations=relations, seed=0, **options)
    return caught.value.record


def test_a_trace_is_tested_with_many_faults():
    assert len(FAULTS) >= 40


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_planted_fault_is_caught_by_its_relation_and_located_on_its_line(fault):
    fn, pool = fault.make()
    record = finding_of(fn, pool)
    assert record.relation == fault.relation
    assert is_located(fault, record) == fault.is_located


def test_the_error_names_subject_operator_module_and_cure():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LayerNorm(256), torch.nn.Linear(256, 64))
    with pytest.raises(BatchVarianceError) as caught:
        assert_batch_invariant(model, torch.randn(40, 256))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("Sequential (fp32, eager, cpu), aten::addmm: a row has other bits in a batch")
    assert "  operator    aten::addmm in 1 gave other bits for equal inputs" in lines
    assert "  cure        with the mode's kernel for aten::addmm and nothing else of it the bits are equal" in lines


def test_a_culprit_whose_difference_is_lost_again_is_not_the_cause():
    first, second = (torch.nn.Linear(256, 64) for _ in range(2))

    def fn(x):
        rounded = first(x).round()
        return rounded + second(x)

    torch.manual_seed(0)
    found = finding_of(fn, torch.randn(40, 256), relations=("I",)).finding.trace
    assert [culprit.effect for culprit in found.culprits] == ["does not reach the output", "causes"]
    assert found.cause is found.culprits[1]


def test_every_culprit_shows_though_each_is_in_the_wake_of_the_one_before():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(4)))
    found = finding_of(layers, torch.randn(40, 128), relations=("I",)).finding.trace
    assert sum(op.agreement == "differs" for op in found.ops) == 4


def test_the_sizes_of_the_operator_are_those_of_its_own_rows():
    fn, pool = next(fault for fault in FAULTS if fault.name == "another tile from 17 rows on").make()
    cause = finding_of(fn, pool).finding.trace.cause
    assert cause.sizes.ranges == ((17, cause.sizes.bound),)


def test_a_row_that_stands_twice_in_the_batch_is_not_taken_for_its_twin():
    """The second of two equal rows varies, and the bytes of the first are those of the row alone."""
    fault = next(fault for fault in FAULTS if fault.name == "every second row")
    fn, pool = fault.make()
    record = finding_of(fn, pool)
    assert len(set(record.finding.batch.rows)) < len(record.finding.batch.rows)
    assert is_located(fault, record)


def test_a_model_of_stock_torch_is_traced_to_its_module_and_line():
    model = TransformersSubject("tiny-llama", device="cpu", dtype="fp32")
    with pytest.raises(BatchVarianceError) as caught:
        check_batch_invariant(model, ("I",), max_examples=5)
    found = caught.value.record.finding.trace
    op = found.ops[found.cause.op]
    assert op.overload == "aten::mm" and op.module.startswith("model.layers.0.")
    assert op.source.startswith("transformers/models/llama/modeling_llama.py:") and "proj" in op.line
    assert "bits are equal" in found.cause.cure


def test_experts_are_followed_through_their_permutation_to_the_grouped_product():
    """Which rows an expert gets follows the neighbours; the sort and the gather before it differ by right."""
    model = TransformersSubject("tiny-qwen3-moe", device="cpu", dtype="fp32")
    with stock_torch(), pytest.raises(BatchVarianceError) as caught:
        check_batch_invariant(model, ("S",), max_examples=5)
    found = caught.value.record.finding.trace
    assert {found.ops[culprit.op].overload for culprit in found.culprits} == {"aten::_grouped_mm"}


def test_a_crash_in_the_trace_leaves_verdict_and_finding_as_they_are(emitted, monkeypatch):
    def crash(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(culprits, "trace", crash)
    fn, pool = planted.from_size(2)
    with pytest.raises(BatchVarianceError, match="trace       could not be told: RuntimeError: planted"):
        check_batch_invariant(RowsSubject(fn, [pool]), ("I",))
    assert [record.verdict for record in emitted] == ["differs"]
    assert emitted[0].finding.trace is None


def test_a_copy_that_one_side_alone_needs_is_no_other_path():
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def fn(x):
        columns = (x * 0.5).t().contiguous()  # those of one row are contiguous as they are
        return gemv(columns.t(), w)

    found = finding_of(fn, torch.rand(40, 64), relations=("I",)).finding.trace
    assert any(op.overload == "aten::clone" and op.badge == "one side" for op in found.ops)
    assert found.culprits and found.control_flow == ()


def test_tensors_of_the_second_side_are_let_go_when_the_subject_lets_them_go():
    kept = set()
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def fn(x):
        hidden = x * 0.5
        seen = weakref.ref(hidden)
        out = gemv(hidden, w)
        del hidden
        if len(x) > 1 and seen() is not None:
            kept.add(len(x))
        return out

    found = finding_of(fn, torch.rand(40, 64), relations=("I",)).finding
    assert found.n_rows == 2 and found.trace.culprits
    assert not kept


def test_noise_is_located_and_is_not_convicted_by_a_run_that_may_be_another():
    fault = next(fault for fault in FAULTS if fault.name == "a flaky operator")
    assert finding_of(*fault.make()).finding.trace.cause.effect == "not told"


def test_a_warning_in_a_diagnosis_is_not_raised_by_the_filter_of_the_test(monkeypatch):
    def warn(*_):
        warnings.warn("planted", stacklevel=1)

    monkeypatch.setattr(culprits, "trace", warn)
    fn, pool = planted.from_size(2)
    assert finding_of(fn, pool, relations=("I",)).finding.sections == ()


def test_memory_is_bounded_and_what_was_not_compared_is_said(monkeypatch):
    monkeypatch.setattr(trace, "KEPT_BYTES", 0)
    torch.manual_seed(0)
    found = finding_of(torch.nn.Linear(256, 64), torch.randn(40, 256), relations=("I",)).finding.trace
    assert trace.CUT in found.notes and not found.culprits


@pytest.mark.parametrize("name", planted.INVARIANT)
def test_an_equal_verdict_has_no_trace(name):
    fn, pool = planted.INVARIANT[name]()
    (record,) = check_batch_invariant(RowsSubject(fn, [pool]), ("I",), max_examples=5)
    assert record.finding is None


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def of_mamba2(folder):
    config = Mamba2Config(
        hidden_size=64, num_hidden_layers=1, num_heads=8, head_dim=16, state_size=8, n_groups=1, chunk_size=16, vocab_size=500
    )
    return saved(Mamba2ForCausalLM(config), folder)


def of_qwen3_next(folder):
    config = Qwen3NextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=500, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
        num_experts=0, layer_types=["linear_attention"],
    )  # fmt: skip
    return saved(Qwen3NextForCausalLM(config), folder)


@pytest.mark.parametrize(
    ("model", "lengths", "columns"), [(of_mamba2, (17, 16), "16 columns"), (of_qwen3_next, (13, 5), "64 columns")]
)
def test_a_recurrence_whose_blocks_are_moved_by_left_padding_is_traced_to_its_cumulated_sum(tmp_path, model, lengths, columns):
    torch.manual_seed(0)
    case = BatchShape(tuple(Row(i, length) for i, length in enumerate(lengths)), "left")
    with batch_invariant_mode():
        subject = TransformersSubject(model(tmp_path), device="cpu", dtype="fp32")
        with pytest.raises(BatchVarianceError) as caught:
            check_batch_invariant(subject, ["I"], case=case)
    found = caught.value.finding.trace
    assert found.ops[found.cause.op].overload == "aten::cumsum"
    assert "cumsum(" in found.ops[found.cause.op].line
    assert any(f"aten::cumsum takes blocks of {columns}: the row begins at column 0" in note for note in found.notes)


def test_a_value_that_the_batch_shares_is_blamed_only_for_what_is_computed_with_it():
    def fn(x):
        shared = x.amax()  # of all rows: other bits by right, and read by nothing
        return x * 2 + 0 * (shared > 1e30)

    assert_batch_invariant(fn, torch.randn(8, 16))

    def other(x):
        x.sum()
        return x / x.amax()

    found = finding_of(other, torch.randn(8, 16), relations=("I",)).finding.trace
    assert [found.ops[culprit.op].overload for culprit in found.culprits] == ["aten::amax"]


class OfGemv(torch.autograd.Function):
    """What is planted here is in the backward alone."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        return gemv(grad, w), None


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(64, 64), requires_grad=False)

    def forward(self, x):
        return OfGemv.apply(x, self.w)


def test_a_gradient_is_traced_to_the_operator_in_the_backward_of_its_module():
    torch.manual_seed(0)
    record = finding_of(torch.nn.Sequential(torch.nn.Tanh(), Layer(), torch.nn.Tanh()), torch.randn(8, 64), relations=("G",))
    found = record.finding.trace
    op = found.ops[found.cause.op]
    assert (op.overload, op.module, op.line) == (
        "batchinv_mutants::gemv", "the backward of 1", "return gemv(grad, w), None",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("relation", "steps"),
    [
        ("D", Steps((3, 4, 9))),
        ("L", Steps((4, 5), "static", spare=3)),
        ("C", Steps((6, 7), rejected=2)),
        ("C", Steps((7,), prefix=4)),
    ],
    ids=["decoded", "static", "rejected", "prefix"],
)
def test_a_run_in_steps_is_traced_to_the_operator_of_the_step(relation, steps, monkeypatch):
    """Planted: a factor where few columns are computed at once, as those of a decoded token are."""
    rows = tuple(Row(i, length) for i, length in enumerate((9, 12, 11)))
    shape = BatchShape(rows, "right" if steps.prefix else "left").in_steps(steps)
    with batch_invariant_mode():
        subject = TransformersSubject("tiny-qwen3", device="cpu", dtype="fp32")
        layer = subject.model.model.layers[1].mlp
        stock = layer.forward

        def forward(x):
            return stock(x) * (1.0 + 3e-7 * (x.shape[1] < 4))

        monkeypatch.setattr(layer, "forward", forward)
        with pytest.raises(BatchVarianceError) as caught:
            check_batch_invariant(subject, [relation], case=shape)
    found = caught.value.finding.trace
    op = found.ops[found.cause.op]
    assert (op.overload, op.module) == ("aten::mul.Tensor", "model.layers.1.mlp"), found
    assert [culprit.effect for culprit in found.culprits] == ["causes"]
    assert not found.notes or found.notes == ("",)


class Lazy(torch.nn.Module):
    """Its table is zeros until the first call fills it: what a run captures at start-up is no run like the others."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(64, 64), requires_grad=False)
        self.register_buffer("table", torch.zeros(64))

    def forward(self, x):
        if not self.table.any():
            self.table += torch.arange(64.0)
        return gemv(x + self.table, self.w)


@torch.library.custom_op("batchinv_tests::two_results", mutates_args=())
def two_results(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * 1.0, x * (2.0 + 3e-7 * (len(x) > 1))


def with_residual(x):
    """Alone hidden and residual are added before the norm, in a batch within one operator more: one is the sum, one is not."""
    hidden = torch.nn.functional.silu(x)
    if len(x) == 1:
        total = hidden + x
        return torch.nn.functional.layer_norm(total, (64,)).exp()
    hidden = hidden * (1 + 3e-7)
    total = torch.add(hidden, x)
    return torch.nn.functional.layer_norm(total, (64,)).exp()


def test_values_of_the_start_up_are_not_blamed():
    torch.manual_seed(0)
    found = finding_of(Lazy(), torch.randn(8, 64), relations=("I",)).finding.trace
    assert [found.ops[culprit.op].overload for culprit in found.culprits] == ["batchinv_mutants::gemv"]


@pytest.mark.parametrize(
    ("function", "operator", "numbers"),
    [
        (lambda x: x * (1 + 1e-6 * (len(x) == 7)), "aten::mul.Tensor", ("other=1.0", "other=1.000001")),
        (lambda x: x + (2 if len(x) > 5 else 1), "aten::add.Tensor", ("other=1", "other=2")),
        (
            lambda x: torch.nn.functional.layer_norm(x, (16,), eps=1e-5 if len(x) < 5 else 1e-3),
            "aten::native_layer_norm",
            ("eps=1e-05", "eps=0.001"),
        ),
    ],
)
def test_an_operator_that_is_called_with_another_number_is_not_said_to_vary(function, operator, numbers):
    """Nor is there a script of it: the code that computes the number makes the difference."""
    found = finding_of(function, torch.randn(16, 16), relations=("I",)).finding.trace
    assert found.ops[found.cause.op].overload == operator
    assert found.cause.numbers == numbers and found.script == ""
    words = dict(trace_parts(found, ("alone", "in the batch")))["operator"]
    assert words == f"{operator} is called with {numbers[0]} alone, {numbers[1]} in the batch"


def test_an_operator_is_blamed_for_its_second_result_and_not_the_one_that_reads_it():
    found = finding_of(lambda x: sum(y.exp() for y in two_results(x)), torch.randn(8, 64), relations=("I",)).finding.trace
    assert [found.ops[culprit.op].overload for culprit in found.culprits] == ["batchinv_tests::two_results"]


def test_a_sum_is_not_compared_with_its_parts():
    found = finding_of(with_residual, torch.randn(8, 64), relations=("I",)).finding.trace
    blamed = [found.ops[culprit.op].overload for culprit in found.culprits]
    assert not {"aten::native_layer_norm", "aten::exp", "aten::silu"} & set(blamed), blamed
    assert any("only the second side calls aten::mul" in line for line in found.control_flow)
