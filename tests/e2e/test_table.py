"""Every entry of the table, through every overload: torch's values, the table's hit, no change with the batch."""

import pytest
import torch
from torch.nn import functional as F

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.compare import first_difference
from pytest_batchinv.kernels import overloads, table

torch.manual_seed(0)
A, B3, V = torch.randn(5, 7), torch.randn(3, 5, 7), torch.randn(7)
ALL_THREE = [True, True, True]
IMAGE = torch.randn(2, 6, 11)
GROUPS = torch.randn(3, 8, 16).bfloat16()
Q = torch.randn(2, 4, 5, 16)
A8, B8, SCALE_A, SCALE_B = A.to(torch.float8_e4m3fn), A.to(torch.float8_e5m2).t(), torch.rand(5, 1), torch.rand(1, 5)

CALLS = {
    "mm": (torch.mm, (A, A.t())),
    "addmm": (torch.addmm, (torch.randn(5), A, A.t()), {"alpha": 0.5, "beta": 1.5}),
    "_addmm_activation": (torch._addmm_activation, (torch.randn(5), A, A.t()), {"use_gelu": True}),
    "bmm": (torch.bmm, (B3, B3.transpose(1, 2))),
    "baddbmm": (torch.baddbmm, (torch.randn(3, 1, 5), B3, B3.transpose(1, 2)), {"alpha": 0.5, "beta": 2}),
    "addbmm": (torch.addbmm, (torch.randn(5, 5), B3, B3.transpose(1, 2)), {}),
    "mv": (torch.mv, (A, V)),
    "addmv": (torch.addmv, (torch.randn(5), A, V), {"alpha": 2}),
    "dot": (torch.dot, (V, V.flip(0))),
    "vdot": (torch.vdot, (V, V.flip(0))),
    "_grouped_mm": (torch._grouped_mm, (GROUPS, torch.randn(3, 16, 16).bfloat16())),
    "_scaled_mm": (torch._scaled_mm, (A8, B8, SCALE_A, SCALE_B, V[:5], None, torch.float32)),
    "_scaled_mm_v2": (torch._scaled_mm_v2, (A8, B8, [SCALE_A], [1], [], [SCALE_B], [1], [], V[:5], torch.float32)),
    "convolution": (
        torch.convolution,
        (IMAGE, torch.randn(4, 3, 3), torch.randn(4), [2], [1], [2], False, [0], 2),
    ),
    "sum": (torch.sum, (A,)),
    "sum.dim_IntList": (torch.sum, (B3, [0, 2]), {"keepdim": True}),
    "mean": (torch.mean, (A,)),
    "mean.dim": (torch.mean, (B3, [1])),
    "var.correction": (torch.var, (B3, 1), {"correction": 0}),
    "std.correction": (torch.std, (B3, -1)),
    "var_mean.correction": (torch.var_mean, (B3, [0, 1])),
    "std_mean.correction": (torch.std_mean, (B3, [2]), {"keepdim": True}),
    "logsumexp": (torch.logsumexp, (B3, [1])),
    "linalg_vector_norm": (torch.linalg.vector_norm, (B3, 3, [1])),
    "norm.Scalar": (torch.ops.aten.norm.Scalar, (A, 2)),
    "norm.ScalarOpt_dtype": (torch.ops.aten.norm.ScalarOpt_dtype, (A, 1), {"dtype": torch.float64}),
    "norm.ScalarOpt_dim": (torch.ops.aten.norm.ScalarOpt_dim, (A, 2, [1])),
    "norm.ScalarOpt_dim_dtype": (torch.ops.aten.norm.ScalarOpt_dim_dtype, (A, 0, [1], True), {"dtype": torch.float64}),
    "cumsum": (torch.cumsum, (B3, 1)),
    "nansum": (torch.nansum, (A.log(), [1])),
    "prod": (torch.prod, (A,)),
    "prod.dim_int": (torch.prod, (B3, 1), {"keepdim": True}),
    "cumprod": (torch.cumprod, (B3, 1)),
    "logcumsumexp": (torch.logcumsumexp, (B3, 1)),
    "_cdist_forward": (torch.ops.aten._cdist_forward, (B3, B3 + 1, 1.0, None)),
    "_fft_r2c": (torch.ops.aten._fft_r2c, (A, [1], 0, True)),
    "_fft_c2c": (torch.ops.aten._fft_c2c, (A + 0j, [0, 1], 1, False)),
    "_fft_c2r": (torch.ops.aten._fft_c2r, (A + 0j, [1], 2, 12)),
    "_weight_norm_interface": (torch.ops.aten._weight_norm_interface, (IMAGE, torch.randn(2, 1, 1))),
    "addr": (torch.addr, (A, A[:, 0], V), {"beta": 0.5, "alpha": 2}),
    "cdist": (torch.cdist, (B3, B3 + 1)),
    "_embedding_bag": (torch.ops.aten._embedding_bag, (A, torch.tensor([3, 0, 3, 1]), torch.tensor([0, 2, 2]))),
    "_embedding_bag_forward_only": (
        torch.ops.aten._embedding_bag_forward_only, (A, torch.tensor([3, 0, 3, 1]), torch.tensor([0, 2, 2])),
    ),
    "batch_norm": (F.batch_norm, (IMAGE, torch.randn(6), torch.rand(6) + 0.5)),
    "linalg_multi_dot": (torch.linalg.multi_dot, ([A, A.t(), A],)),
    "chain_matmul": (torch.chain_matmul, (A, A.t(), A)),
    "cross": (torch.cross, (A[:, :3], A[:, 3:6], 1)),
    "lstm_cell": (torch.lstm_cell, (A, (A, A), torch.randn(28, 7), torch.randn(28, 7), torch.randn(28), torch.randn(28))),
    "gru_cell": (torch.gru_cell, (A, A, torch.randn(21, 7), torch.randn(21, 7), torch.randn(21), torch.randn(21))),
    "_softmax": (torch.softmax, (B3, 1)),
    "_log_softmax": (torch.log_softmax, (B3, 0)),
    "topk": (torch.topk, (A, 3), {"dim": 1}),
    "native_layer_norm": (torch.native_layer_norm, (B3, [7], V, V, 1e-5)),
    "native_group_norm": (torch.native_group_norm, (IMAGE, torch.randn(6), torch.randn(6), 2, 6, 11, 3, 1e-5)),
    "_scaled_dot_product_flash_attention_for_cpu": (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, (Q, Q, Q, 0.0, True),
    ),
    "index_add": (torch.index_add, (A, 1, torch.tensor([3, 0, 3]), torch.randn(5, 3)), {"alpha": 2}),
    "scatter_reduce.two": (torch.scatter_reduce, (A, 1, torch.tensor([[3, 0, 3], [1, 1, 1]]), torch.randn(5, 3), "prod")),
    "scatter.reduce": (torch.scatter, (A, 1, torch.tensor([[3, 0, 3], [1, 1, 1]]), torch.randn(5, 3)), {"reduce": "add"}),
    "scatter.value_reduce": (torch.scatter, (A, 1, torch.tensor([[3, 0, 3], [1, 1, 1]]), 1.5), {"reduce": "multiply"}),
    "index_reduce": (torch.index_reduce, (A, 0, torch.tensor([3, 0, 3]), torch.randn(3, 7), "mean")),
    "scatter_add": (torch.scatter_add, (A, 1, torch.tensor([[3, 0, 3], [1, 1, 1]]), torch.randn(5, 3))),
    "nll_loss_forward": (torch.ops.aten.nll_loss_forward, (A, torch.tensor([1, 0, -100, 6, 2]), V.abs(), 1, -100)),
    "nll_loss2d_forward": (
        torch.ops.aten.nll_loss2d_forward, (B3[:, :, None], torch.randint(0, 5, (3, 1, 7)), None, 2, -100),
    ),
    "_softmax_backward_data": (torch.ops.aten._softmax_backward_data, (B3, B3.softmax(1), 1, torch.float32)),
    "_log_softmax_backward_data": (torch.ops.aten._log_softmax_backward_data, (B3, B3.log_softmax(0), 0, torch.float32)),
    "native_layer_norm_backward": (
        torch.ops.aten.native_layer_norm_backward,
        (B3.cos(), B3, [7], *torch.native_layer_norm(B3, [7], V, V, 1e-5)[1:], V, V, [True, True, True]),
    ),
    "native_group_norm_backward": (
        torch.ops.aten.native_group_norm_backward,
        (IMAGE.cos(), IMAGE, torch.randn(2, 3), torch.rand(2, 3), V[:6], 2, 6, 11, 3, ALL_THREE),
    ),
    "convolution_backward": (
        torch.ops.aten.convolution_backward,
        (torch.randn(2, 4, 6), IMAGE, torch.randn(4, 3, 3), [4], [2], [1], [1], False, [0], 2, [True, True, True]),
    ),
    "embedding_dense_backward": (torch.ops.aten.embedding_dense_backward, (A, torch.tensor([3, 0, 3, 1, 3]), 6, 1, False)),
    "index_put": (torch.ops.aten.index_put, (A, [torch.tensor([3, 0, 3])], torch.randn(3, 7), True)),
    "_index_put_impl": (torch.ops.aten._index_put_impl, (A, [None, torch.tensor([3, -7, 3])], torch.randn(5, 3), True)),
    "_unsafe_index_put": (torch.ops.aten._unsafe_index_put, (A, [A > 0], torch.randn(()).expand(int((A > 0).sum())), True)),
    "linear": (F.linear, (B3, torch.randn(4, 7), torch.randn(4))),
    "layer_norm": (F.layer_norm, (B3, (7,), V, V)),
    "rms_norm": (F.rms_norm, (B3, (7,), V)),
    "scaled_dot_product_attention": (
        F.scaled_dot_product_attention, (Q, Q[:, :2], Q[:, :2]), {"is_causal": True, "enable_gqa": True},
    ),
    "silu": (F.silu, (A,)),
    "sigmoid": (torch.sigmoid, (A,)),
    "gelu": (F.gelu, (A,), {"approximate": "tanh"}),
    "softplus": (F.softplus, (A, 2, 1)),
    "mish": (F.mish, (A,)),
    "elu": (F.elu, (A, 0.7)),
    "rsqrt": (torch.rsqrt, (A.abs(),)),
    "pow.Tensor_Scalar": (torch.pow, (A.abs(), 1.7)),
    "exp": (torch.exp, (A,)),
    "tanh": (torch.tanh, (A,)),
    "erf": (torch.erf, (A,)),
    "expm1": (torch.expm1, (A,)),
    "log": (torch.log, (A.abs(),)),
    "log1p": (torch.log1p, (A.abs(),)),
    "sin": (torch.sin, (A,)),
    "cos": (torch.cos, (A,)),
}  # fmt: skip

WITH_A_TEST_OF_THEIR_OWN = {  # tests/e2e/test_layers.py
    *(f"{kind}.{form}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for form in ("input", "data")),
    *("linalg_multi_dot.out", "chain_matmul.out", "cross.out"),
}
NOT_ON_THE_CPU = {
    "mm.dtype", "addmm.dtype", "bmm.dtype", "baddbmm.dtype", "_fused_rms_norm", "_fused_rms_norm_backward",
    "_scaled_dot_product_efficient_attention", "_scaled_grouped_mm", "_scaled_grouped_mm_v2",
}  # fmt: skip


def as_tuple(out) -> tuple[torch.Tensor, ...]:
    return tuple(o for o in out if isinstance(o, torch.Tensor)) if isinstance(out, (tuple, list)) else (out,)


def call(name: str):
    fn, args, *rest = CALLS[name]
    return fn(*args, **(rest[0] if rest else {}))


def test_every_entry_is_tested_here():
    entries = {*table.BACKEND_KERNELS, *table.POINTWISE, *table.COMPOSITES}
    assert entries - CALLS.keys() == NOT_ON_THE_CPU | WITH_A_TEST_OF_THEIR_OWN


@pytest.mark.filterwarnings(
    "ignore:torch.chain_matmul is deprecated", "ignore:index_reduce.. is in beta", "ignore:The reduce argument of torch.scatter"
)
@pytest.mark.parametrize("name", CALLS)
def test_the_entry_gives_torchs_values_and_is_counted(name):
    expected = as_tuple(call(name))
    with batch_invariant_mode() as mode:
        actual = as_tuple(call(name))
        hits = mode.hits
    assert hits.get(overloads.overload_of(name).name(), 0) >= 1
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


FLOATS_OF_INTEGERS = {
    **{
        name: getattr(torch, name) for name in ("sigmoid", "rsqrt", "exp", "tanh", "erf", "expm1", "log", "log1p", "sin", "cos")
    },
    "pow": lambda x: torch.pow(x, 0.3),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", FLOATS_OF_INTEGERS)
def test_integers_that_become_floats_have_the_bits_of_those_floats(name, compiled):
    """torch's own kernels take the tail of a vector another way than its body, integers too."""
    function = torch.compile(FLOATS_OF_INTEGERS[name], dynamic=False) if compiled else FLOATS_OF_INTEGERS[name]
    if not compiled:  # torch writes them into complex numbers, too
        out = torch.empty(5, 7, dtype=torch.complex64)
        with batch_invariant_mode():
            assert torch.equal(torch.exp(torch.arange(35).view(5, 7), out=out).real, torch.exp(torch.arange(35.0).view(5, 7)))
    for x in (torch.arange(1, 38).expand(3, 37), torch.tensor([[True, False, True]])):
        with batch_invariant_mode():
            got, of_floats = function(x), FLOATS_OF_INTEGERS[name](x.float())
        assert got.dtype == torch.float32
        assert first_difference(got, of_floats) is None


@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta", "ignore:The reduce argument of torch.scatter")
@pytest.mark.parametrize("name", [n for n in CALLS if n in table.BACKEND_KERNELS or n in table.POINTWISE])
def test_out_and_in_place_forms_are_the_same_entry(name):
    overload = overloads.overload_of(name)
    fn, args, *rest = CALLS[name]
    kwargs = rest[0] if rest else {}
    with batch_invariant_mode() as mode:
        expected = as_tuple(fn(*args, **kwargs))
        positional, named = _schema_arguments(overload, args, kwargs)
        for sibling in overloads.siblings(overload):
            if sibling.out_names:
                outs = {n: torch.empty(0, dtype=e.dtype) for n, e in zip(sibling.out_names, expected, strict=True)}
                actual = as_tuple(sibling.overload(*positional, **named, **outs))
            elif positional[0].shape == expected[0].shape:
                target = positional[0].clone()
                actual = as_tuple(sibling.overload(target, *positional[1:], **named))
                assert actual[0] is target
            else:
                continue
            assert mode.hits.get(sibling.overload.name(), 0) >= 1
            for a, e in zip(actual, expected, strict=True):
                assert first_difference(e, a) is None


def _schema_arguments(overload, args, kwargs):
    """The arguments as the overload's schema wants them: what torch's Python functions rename or fill in."""
    arguments = overload._schema.arguments
    if overload.name() == "aten::linalg_vector_norm" or overload.name().startswith("aten::norm"):
        return args, kwargs
    if overload.name() == "aten::_softmax" or overload.name() == "aten::_log_softmax":
        return (*args, False), {}
    if overload.name() == "aten::std.correction" and "correction" not in kwargs:
        kwargs = {"correction": 1, **kwargs}
    wrapped = [
        [a] if isinstance(a, int) and not isinstance(a, bool) and "int[]" in str(s.type).lower() else a
        for a, s in zip(args, arguments, strict=False)
    ]
    return tuple(wrapped), kwargs


def test_out_with_a_dtype_that_cannot_hold_the_result_raises():
    with batch_invariant_mode(), pytest.raises(RuntimeError, match="can't be cast|to have dtype"):
        torch.mm(A, A.t(), out=torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("shapes", [((2, 3), (4, 5)), ((2, 3), (3,)), ((2, 3, 4), (4, 5))])
def test_mismatched_products_raise_as_torch_does(shapes):
    a, b = (torch.randn(s) for s in shapes)
    with pytest.raises(RuntimeError):
        torch.mm(a, b)
    with batch_invariant_mode(), pytest.raises(RuntimeError):
        torch.mm(a, b)


@pytest.mark.parametrize("shape", [(0, 7), (5, 0)])
def test_empty_tensors_give_what_torch_gives(shape):
    x = torch.randn(shape)
    calls = (
        lambda: x @ torch.randn(shape[1], 3).fill_(1), lambda: x.sum(-1), lambda: x.sum(), lambda: x.softmax(-1),
        lambda: x.mean(-1), lambda: x.cumsum(-1), lambda: F.linear(x, torch.ones(2, shape[1]), torch.ones(2)),
    )  # fmt: skip
    for fn in calls:
        expected = fn()
        with batch_invariant_mode():
            actual = fn()
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_an_index_out_of_range_is_an_index_error():
    with batch_invariant_mode(), pytest.raises(IndexError, match="from 0 to 4"):
        torch.index_add(A, 0, torch.tensor([9]), torch.randn(1, 7))


# --- operators with a gradient of their own --------------------------------------------------------------------------

ROWS = torch.randn(3, 4, 7, dtype=torch.float64)
QUERY, KEY = torch.randn(2, 4, 5, 8, dtype=torch.float64), torch.randn(2, 2, 5, 8, dtype=torch.float64)


def attended(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


DIFFERENTIABLE = {
    "rms_norm": (lambda x, w: F.rms_norm(x, (7,), w, 1e-3), (ROWS, V.double())),
    "rms_norm of two dims": (lambda x: F.rms_norm(x, (4, 7)), (ROWS,)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (7,), w, b), (ROWS, V.double(), V.double() + 1)),
    "attention": (attended, (QUERY, KEY, KEY + 1)),
    "logsumexp of attention": (lambda *qkv: torch.ops.batchinv.attention(*qkv, None, True, 0.3)[1], (QUERY, KEY, KEY + 1)),
}
each_differentiable = pytest.mark.parametrize(("fn", "inputs"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)


def leaves(inputs):
    return [x.clone().requires_grad_() for x in inputs]


@each_differentiable
def test_gradients_and_their_gradients_are_those_of_the_function(fn, inputs):
    with batch_invariant_mode():
        assert torch.autograd.gradcheck(fn, leaves(inputs))
        assert torch.autograd.gradgradcheck(fn, leaves(inputs))


@each_differentiable
def test_function_transforms_give_the_gradients_of_autograd(fn, inputs):
    def loss(*inputs):
        return fn(*inputs).sin().sum()

    pairs = [torch.stack([x, x + 1]) for x in inputs]
    with batch_invariant_mode():
        expected = torch.autograd.grad(loss(*(first := leaves(inputs))), first[0])[0]
        torch.testing.assert_close(torch.func.grad(loss)(*inputs), expected)
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(*pairs)[0], expected)
        hessian = torch.autograd.functional.hessian(lambda x: loss(x, *inputs[1:]), inputs[0])
        torch.testing.assert_close(torch.func.jacrev(torch.func.grad(loss))(*inputs), hessian)


@each_differentiable
def test_forward_mode_gives_the_derivative_or_says_that_there_is_none(fn, inputs):
    tangents = tuple(x.cos() for x in inputs)
    with batch_invariant_mode():
        if not {"rms_norm", "layer_norm"} & {*fn.__code__.co_names}:
            with pytest.raises(NotImplementedError, match="forward mode"):
                torch.func.jvp(fn, inputs, tangents)
            return
        _, derivative = torch.func.jvp(fn, inputs, tangents)
        ahead, behind = (fn(*(x + h * t for x, t in zip(inputs, tangents, strict=True))) for h in (1e-6, -1e-6))
    torch.testing.assert_close(derivative, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["rms_norm", "attention"])
def test_bits_do_not_follow_gradients_modes_lazy_bits_or_compilation(name, dtype):
    fn, inputs = DIFFERENTIABLE[name]
    inputs = [x.to(dtype) for x in inputs]
    with batch_invariant_mode():
        expected = fn(*inputs)
        with torch.inference_mode():
            assert first_difference(expected, fn(*inputs)) is None
        with Seen():
            assert first_difference(expected, fn(*inputs)) is None
        assert first_difference(expected, fn(*leaves(inputs)).detach()) is None
        assert first_difference(expected, fn(torch._neg_view(-inputs[0]), *inputs[1:])) is None
        torch._dynamo.reset()
        compiled = torch.compile(fn, fullgraph=True)
        assert first_difference(expected, compiled(*inputs)) is None
        for eager, other in zip(gradients(fn, inputs), gradients(compiled, inputs), strict=True):
            assert first_difference(eager, other) is None


def gradients(fn, inputs):
    inputs = leaves(inputs)
    return torch.autograd.grad(fn(*inputs).square().sum(), inputs)


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """A mode that only looks on."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "operator"), [("rms_norm", "_fused_rms_norm"), ("attention", "attention")])
def test_dispatch_modes_and_traces_see_the_operator(name, operator):
    fn, inputs = DIFFERENTIABLE[name]
    with batch_invariant_mode():
        with Seen() as seen:
            fn(*inputs)
        assert seen.names[0] == f"batchinv::{operator}"
        graph = torch.fx.experimental.proxy_tensor.make_fx(fn)(*inputs).graph
        assert getattr(torch.ops.batchinv, operator).default in {node.target for node in graph.nodes}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["_fused_rms_norm", "attention"])
def test_operators_pass_torchs_own_checks_of_operators(name, requires_grad):
    inputs = (ROWS, [7], V.double(), 1e-3) if name == "_fused_rms_norm" else (QUERY, KEY, KEY + 1, None, True, 0.3)
    inputs = [x.clone().requires_grad_(requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs]
    with batch_invariant_mode():
        torch.library.opcheck(getattr(torch.ops.batchinv, name).default, tuple(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_rms_norm_are_near_torchs(dtype):
    fn = DIFFERENTIABLE["rms_norm"][0]
    inputs = [x.to(dtype) for x in DIFFERENTIABLE["rms_norm"][1]]
    expected = gradients(fn, inputs)
    with batch_invariant_mode():
        actual = gradients(fn, inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_group_norm_takes_any_strides():
    x = torch.randn(2, 5, 7, 6).permute(0, 3, 2, 1)
    with batch_invariant_mode():
        assert first_difference(F.group_norm(x.contiguous(), 3), F.group_norm(x, 3)) is None


@pytest.mark.parametrize("name", ["native_layer_norm", "_fused_rms_norm"])
def test_parameters_of_norms_on_another_device_are_an_error(name):
    parameters = (V.to("meta"), None) if name == "native_layer_norm" else (V.to("meta"),)
    with pytest.raises(RuntimeError, match="on cpu, but got one on meta"):
        table.BACKEND_KERNELS[name](A, [7], *parameters, 1e-5)
