"""The shapes of vLLM's own batch-invariance tests (``tests/v1/determinism``, version 0.33), in this project's mode.

    python -m pytest benchmarks/foreign_shapes.py --batch-invariant --batchinv-report foreign-shapes.json

Each batch that those tests run is run, each row of it compared bit for bit with the row alone; then a search goes on from
there. On the GPU in bf16 if there is one, else on the CPU in fp32, and of products two sizes. Their products of FP8 are
left out.
"""

import pytest
import torch

from pytest_batchinv import BatchShape, assert_batch_invariant, check_batch_invariant
from pytest_batchinv.shapes import Row

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

pytestmark = pytest.mark.batch_invariant


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).to(DEVICE, DTYPE)


def in_their_batches(fn, pool: torch.Tensor, sizes: tuple[int, ...], **words) -> None:
    for size in sizes:
        assert_batch_invariant(fn, pool, case=BatchShape(tuple(Row(i) for i in range(size))), relations=("I",), **words)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["contiguous", "transposed"])
def test_products_of_2048_by_2048(is_transposed):
    b = drawn(2048, 2048).t() if is_transposed else drawn(2048, 2048)
    pool = drawn(2048, 2048)
    in_their_batches(lambda x: x @ b, pool, (8, 32, 256, 2048) if ON_GPU else (8, 256))


@pytest.mark.parametrize("operator", ["mm", "addmm", "bmm"])
def test_compiled_products_of_a_dynamic_size(operator):
    b, bias = drawn(1024, 768), drawn(768)
    stack = b.expand(4, 1024, 768).contiguous()
    forms = {
        "mm": lambda x: torch.mm(x, b),
        "addmm": lambda x: torch.addmm(bias, x, b),
        "bmm": lambda x: torch.bmm(x.unsqueeze(0).expand(4, -1, -1), stack).transpose(0, 1),
    }
    pool = drawn(256, 1024)
    assert_batch_invariant(forms[operator], pool, relations=("I", "X"), compile_mode="dynamic", max_examples=30)
    in_their_batches(forms[operator], pool, (64, 256, 128), compile_mode="dynamic")


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("columns", [512, 1024, 2048, 4096, 8192])
def test_rms_norm(columns, eps, scale):
    weight = drawn(columns)
    pool = drawn(300, columns, scale=scale)
    in_their_batches(lambda x: torch.nn.functional.rms_norm(x, (columns,), weight, eps), pool, (1, 4, 64, 300))


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_shrinking_to_the_rank_of_an_adapter(rank):
    a = drawn(4096, rank)
    in_their_batches(lambda x: x @ a, drawn(129, 4096), (31, 32, 33, 127, 128, 129))


def test_ragged_prompts_in_chunks(batchinv_engine):
    check_batch_invariant(batchinv_engine, relations=("I", "C"))
