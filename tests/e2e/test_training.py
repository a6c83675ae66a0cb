"""Training in the mode: what torch offers around a backward changes none of its bits, and none is less accurate than stock."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pytest_batchinv import assert_batch_invariant, batch_invariant_mode
from pytest_batchinv.compare import first_difference


class Block(nn.Module):
    """A layer of a transformer: norm, attention, norm, gated products."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.RMSNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        gate, up = self.up(self.second(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


def rows(n=6, length=5, width=32):
    return torch.randn(n, length, width, generator=torch.Generator().manual_seed(1))


def gradients(module, x, run=None):
    """Of the input and of each weight."""
    x = x.clone().requires_grad_()
    out = (run or module)(x)
    return torch.autograd.grad(out, [x, *module.parameters()], out.detach().float().cos().to(out.dtype))


def assert_same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert first_difference(b, a) is None


def test_activation_checkpointing_changes_no_bit(block):
    with batch_invariant_mode():
        plain = gradients(block, rows())
        assert_same(gradients(block, rows(), lambda x: checkpoint(block, x, use_reentrant=False)), plain)


def test_the_input_gradients_of_a_block_are_those_of_each_row_alone_under_autocast_and_without(block):
    def lower(x):
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    with batch_invariant_mode():
        for fn in (block, lower):
            assert assert_batch_invariant(fn, rows(), relations=("G",), max_examples=10).verdict == "equal"


def test_gradients_of_weights_have_the_same_bits_on_any_number_of_threads(block):
    threads = torch.get_num_threads()
    found = []
    try:
        with batch_invariant_mode():
            for n in (1, 2):
                torch.set_num_threads(n)
                found.append(gradients(block, rows(64)))
    finally:
        torch.set_num_threads(threads)
    assert_same(*found)


def test_accumulated_steps_of_an_optimizer_with_clipping_are_the_same_run_to_run(block):
    def trained():
        model = copy.deepcopy(block)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
        for _ in range(2):
            for part in rows(8).split(2):
                model(part).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    with batch_invariant_mode():
        one, other = trained(), trained()
    assert_same([x.detach() for x in one], [x.detach() for x in other])
    assert first_difference(one[2].detach(), list(block.parameters())[2].detach()) is not None


def test_an_operand_that_is_changed_between_forward_and_backward_is_torchs_own_error():
    x = [torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3)]
    weight = torch.ones(8, requires_grad=True)
    functions = (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: F.rms_norm(q, (8,), weight),
        lambda q, k, v: F.layer_norm(q, (8,), weight),
    )
    with batch_invariant_mode():
        for fn in functions:
            q, k, v = (t * 1 for t in x)
            out = fn(q, k, v)
            q.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()


def test_a_frozen_weight_has_no_gradient_and_changes_no_bit_of_the_others(block):
    with batch_invariant_mode():
        every = gradients(block, rows())
        for parameter in block.parameters():
            parameter.requires_grad_(False)
        x = rows().requires_grad_()
        out = block(x)
        (alone,) = torch.autograd.grad(out, x, out.detach().cos())
    assert first_difference(every[0], alone) is None


IDS = torch.tensor([[0, 3, 3], [1, 3, 0]])
CHECKED = {
    "softmax": (lambda x: x.softmax(1), (3, 4, 2)),
    "log_softmax": (lambda x: x.log_softmax(-1), (3, 7)),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.tensor([1, 0, -100])), (3, 7)),
    "group_norm": (lambda x, w: F.group_norm(x, 2, w, w), (2, 4, 3), (4,)),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1, groups=2), (2, 4, 7), (6, 2, 3), (6,)),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, stride=2, output_padding=1), (1, 2, 3, 3), (2, 3, 2, 2)),
    "embedding": (lambda w: F.embedding(IDS, w), (5, 3)),
    "index": (lambda x: x[:, IDS, :, IDS[0, 0]], (2, 5, 3, 4)),
    "linear": (lambda x, w, b: F.linear(x, w, b), (2, 3, 5), (4, 5), (4,)),
    "silu": (F.silu, (9,)),
    "gelu": (F.gelu, (9,)),
    "mish": (F.mish, (9,)),
    "elu": (F.elu, (9,)),
}


@pytest.mark.parametrize("name", CHECKED)
def test_gradients_and_their_gradients_are_those_of_the_function(name):
    torch.manual_seed(0)
    fn, *shapes = CHECKED[name]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with batch_invariant_mode():
        assert torch.autograd.gradcheck(fn, inputs)
        assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("compiled", [False, True])
def test_queries_alone_may_need_a_gradient(compiled):
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))

    def fn(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    run = torch.compile(fn) if compiled else fn
    with batch_invariant_mode():
        (alone,) = torch.autograd.grad(run(q.requires_grad_(), k, v).sum(), q)
        (beside, _) = torch.autograd.grad(fn(q, k.requires_grad_(), v).sum(), (q, k))
    assert first_difference(beside, alone) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "layer_norm", "rms_norm", "attention", "silu", "gelu", "linear"])
def test_gradients_are_no_less_accurate_than_stock_torchs(name, dtype):
    torch.manual_seed(0)
    weight = torch.randn(96).to(dtype)
    matrix = (torch.randn(40, 96) / 10).to(dtype)
    functions = {
        "softmax": lambda x, w, m: x.softmax(-1),
        "log_softmax": lambda x, w, m: x.log_softmax(-1),
        "layer_norm": lambda x, w, m: F.layer_norm(x, (96,), w),
        "rms_norm": lambda x, w, m: F.rms_norm(x, (96,), w, 1e-6),
        "attention": lambda x, w, m: F.scaled_dot_product_attention(
            *[x.view(2, 32, 4, 24).transpose(1, 2)] * 3, is_causal=True
        ),
        "silu": lambda x, w, m: F.silu(x),
        "gelu": lambda x, w, m: F.gelu(x),
        "linear": lambda x, w, m: F.linear(x, m),
    }
    x = (2 * torch.randn(64, 96)).to(dtype)
    fn = functions[name]

    def gradient(dtype):
        leaf = x.to(dtype).requires_grad_()
        out = fn(leaf, weight.to(dtype), matrix.to(dtype))
        given = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(torch.bfloat16).to(dtype)
        return torch.autograd.grad(out, leaf, given)[0].double()

    exact, stock = gradient(torch.float64), gradient(dtype)
    with batch_invariant_mode():
        mine = gradient(dtype)
    error, of_stock = ((found - exact).square().mean().sqrt() for found in (mine, stock))
    assert error <= 1.05 * of_stock + 1e-3 * torch.finfo(dtype).eps * exact.abs().max()
