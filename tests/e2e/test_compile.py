"""Compiled code in the mode: a row has one set of bits, those of eager code, whatever was compiled before it.

Few graphs, as each costs seconds: the module is small, and what is compiled twice comes from Inductor's cache.
"""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pytest_batchinv import batch_invariant_mode, check_batch_invariant
from pytest_batchinv.compare import first_difference
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.compiled import COMPILE_MODES
from pytest_batchinv.subjects.transformers import TransformersSubject

HIDDEN, TOKENS, MOST = 64, 5, 17
COMPILED = {f"batchinv::{name}" for name in ("addmm", "attention", "silu", "_log_softmax")}
# Before Dynamo turns the size dynamic, at that moment, and after; from one row up, and from a batch down.
ORDERS = {"bs1 first": (1, 9, 3, MOST), "batch first": (9, 1, MOST, 2)}


class Block(nn.Module):
    """Linear, norm, attention, activation, logprobs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 33)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, HIDDEN // 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        gated = (attended + x) * x - attended  # one piece of generated code, which rounds in between as eager code does
        return F.log_softmax(self.head(F.silu(gated)), -1)


@pytest.fixture(autouse=True)
def _mode():
    """On for the whole test; Dynamo starts from nothing, and may not run eager code in silence."""
    torch._dynamo.reset()
    with (
        batch_invariant_mode(),
        torch.no_grad(),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8),
    ):
        yield


def block_and_rows(dtype=torch.float32):
    torch.manual_seed(0)
    return Block().to(dtype), torch.randn(MOST, TOKENS, HIDDEN).to(dtype)


def assert_rows_have_the_bits_of_eager_code(compiled, block, rows, sizes) -> None:
    """Every row of every batch against the row alone in eager code, and no batch without our operators in its graph."""
    alone = [block(row[None])[0] for row in rows]
    for size in sizes:
        first = compiled(rows[:size])
        with batch_invariant_mode() as mode:  # the second call compiles nothing: what is counted ran
            second = compiled(rows[:size])
        assert COMPILED <= mode.hits.keys()
        assert not any(name.startswith("aten::") for name in mode.hits)  # which eager code would call
        for batch in (first, second):
            for position in range(size):
                difference = first_difference(alone[position], batch[position])
                assert difference is None, f"row {position} of {size}: {difference}"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("compile_mode", ["default", "dynamic", "fullgraph"])
def test_a_row_has_the_bits_of_eager_code_whatever_was_compiled_before(compile_mode, order):
    block, rows = block_and_rows()
    compiled = torch.compile(block, **COMPILE_MODES[compile_mode])
    assert_rows_have_the_bits_of_eager_code(compiled, block, rows, ORDERS[order])


@pytest.mark.parametrize("order", ORDERS)
def test_the_same_holds_in_bf16(order):
    block, rows = block_and_rows(torch.bfloat16)
    assert_rows_have_the_bits_of_eager_code(torch.compile(block, fullgraph=True), block, rows, ORDERS[order])


def test_dynamo_did_turn_the_size_dynamic():
    """So that the orders above are what they say: one graph for bs1, one for all other sizes."""
    block, rows = block_and_rows()
    graphs = []

    def counts(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, backend=counts)
    for size in ORDERS["bs1 first"]:
        compiled(rows[:size])
    assert len(graphs) == 2


def test_a_users_own_compiled_function_has_the_same_bits():
    weight = torch.randn(HIDDEN, 21)
    rows = torch.randn(MOST, HIDDEN)

    def in_eager_code(x):
        return F.gelu(x @ weight).softmax(-1).mean(-1)

    @torch.compile
    def users_function(x):
        return in_eager_code(x)

    alone = [in_eager_code(row[None])[0] for row in rows]
    with batch_invariant_mode() as mode:
        batches = {size: users_function(rows[:size]) for size in (4, 1, MOST, 9)}
    assert {"batchinv::mm", "batchinv::gelu", "batchinv::_softmax", "batchinv::mean.dim"} <= mode.hits.keys()
    for size, batch in batches.items():
        assert first_difference(torch.stack(alone[:size]), batch) is None


def test_code_compiled_in_another_thread_gets_the_rules_too():
    block, rows = block_and_rows(torch.bfloat16)  # whose bits depend on the rules
    failures, ran = [], []

    def work():
        try:
            with torch.no_grad():
                compiled = torch.compile(block, fullgraph=True)
                assert_rows_have_the_bits_of_eager_code(compiled, block, rows, ORDERS["bs1 first"])
            ran.append(True)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert ran


def test_a_compiled_engine_has_our_operators_in_its_graph_and_equal_bits():
    engine = TransformersSubject("tiny-llama", device="cpu", dtype="fp32", compile_mode="default")
    # Alone and together of one width, so that one graph serves the row and one the batch.
    shape = BatchShape((Row(0, 9), Row(1, 9), Row(2, 9)))
    batches, eager = check_batch_invariant(engine, ("I", "X"), case=shape)
    for record in (batches, eager):
        assert (record.verdict, record.counts.examples, record.counts.rows) == ("equal", 1, 3)
        assert {"batchinv::mm", "batchinv::attention", "batchinv::silu", "batchinv::_log_softmax"} <= record.hits.keys()
