"""Samples: torch's operator database, its modules, and what models reach beside them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "c64": torch.complex64,
    "c128": torch.complex128,
    "int": torch.int64,
    "bool": torch.bool,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
MOST_SAMPLES = 6
_READ = 100  # samples of one operator that are looked at, of which MOST_SAMPLES are taken evenly


@dataclass(frozen=True)
class Sample:
    """A function and one set of its arguments. name: of the operator, as its source has it."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    differentiable: bool = False


class MissingPackage(ImportError):
    """torch's operator database cannot be imported."""


def names() -> list[str]:
    """Every source of samples: ``also:`` our own list, ``op:`` torch's operators, ``foreach:``, ``module:`` torch's modules."""
    ops, foreach, modules = _databases()
    counted: dict[str, int] = {}
    out = []
    for prefix, names_in in (
        ("also", list(_ALSO)),
        ("op", [_full_name(op) for op in ops]),
        ("foreach", [op.name for op in foreach]),
        ("module", [info.name for info in modules]),
    ):
        for name in names_in:
            key = f"{prefix}:{name}"
            counted[key] = counted.get(key, 0) + 1
            out.append(key if counted[key] == 1 else f"{key}#{counted[key]}")
    return out


def samples(name: str, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The samples of one source in one dtype; none where it has none. Raises what making a sample raises."""
    torch.manual_seed(0)
    return _SOURCES[name.partition(":")[0]](name, device, dtype)


def _databases() -> tuple[list[Any], list[Any], list[Any]]:
    try:
        from torch.testing._internal import common_methods_invocations as ops
        from torch.testing._internal import common_modules as modules
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"torch's operator database (torch.testing._internal) needs the package {error.name}; "
            "pip install 'pytest-batchinv[scan]' installs what the scan needs"
        ) from None
    foreach = (
        *ops.foreach_unary_op_db,
        *ops.foreach_binary_op_db,
        *ops.foreach_pointwise_op_db,
        *ops.foreach_reduce_op_db,
        *ops.foreach_other_op_db,
    )
    return list(ops.op_db), list(foreach), list(modules.module_db)


def _full_name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def _entry(name: str, entries: list[Any], named: Callable[[Any], str]) -> Any:
    wanted, _, number = name.partition(":")[2].partition("#")
    return [entry for entry in entries if named(entry) == wanted][int(number or 1) - 1]


def _of_operators(name: str, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    op = _entry(name, _databases()[0], _full_name)
    if dtype not in op.supported_dtypes(device):
        return
    differentiable = bool(op.supports_autograd) and dtype in op.supported_backward_dtypes(device)
    for given in _some(op.sample_inputs(device, dtype, requires_grad=False)):
        yield Sample(name, op.op, (given.input, *given.args), given.kwargs, differentiable)


def _of_foreach(name: str, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    op = _entry(name, _databases()[1], lambda op: str(op.name))
    if dtype not in op.supported_dtypes(device):
        return
    for given in itertools.islice(op.sample_inputs(device, dtype, requires_grad=False), 2):
        for function in (op.method_variant, op.inplace_variant):
            if function is not None:
                args = [x[:3] if isinstance(x, list) else x for x in (given.input, *given.args)]
                yield Sample(name, _returning_first(function), tuple(args), _known_to_all(given.kwargs))


def _known_to_all(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what the database says to its own tests."""
    return {key: value for key, value in kwargs.items() if key in ("alpha", "value", "ord", "dtype", "weight")}


def _returning_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """In-place forms over lists return nothing; what they wrote is the result."""

    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        out = function(first, *args, **kwargs)
        return first if out is None else out

    return run


def _of_modules(name: str, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    info = _entry(name, _databases()[2], lambda info: str(info.name))
    if dtype not in info.supported_dtypes(torch.device(device).type):
        return
    made = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=False)
    for given in itertools.islice(made, 4):
        if given.forward_input is None:
            continue
        arguments = given.constructor_input
        kwargs = dict(arguments.kwargs, device=device, dtype=dtype) if _takes_dtype(info.module_cls) else arguments.kwargs
        module = info.module_cls(*arguments.args, **kwargs).to(device).eval()
        yield Sample(name, module, tuple(given.forward_input.args), given.forward_input.kwargs, True)


def _takes_dtype(module: type[nn.Module]) -> bool:
    import inspect

    return {"device", "dtype"} <= set(inspect.signature(module).parameters)


def _some(given: Iterator[Any]) -> list[Any]:
    """MOST_SAMPLES of the first ones, evenly."""
    read = list(itertools.islice(given, _READ))
    step = max(len(read) / MOST_SAMPLES, 1.0)
    return [read[int(i * step)] for i in range(min(len(read), MOST_SAMPLES))]


# --- beyond the database ----------------------------------------------------------------------------------------------

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _normal(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(*shape, dtype=wide).to(dtype).to(device)


def _rnn(kind: Callable[..., nn.Module]) -> Callable[..., Any]:
    def make(device: str, dtype: torch.dtype) -> Any:
        module = kind(64, 64, batch_first=True).eval().to(device, dtype)
        return (lambda x: module(x)[0]), (_normal(device, dtype, 5, 7, 64),)

    return make


def _quantized_linear(device: str, dtype: torch.dtype) -> Any:
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(64, 16)), {nn.Linear})
    return quantized, (_normal(device, dtype, 5, 64),)


def _int8_weights(device: str, dtype: torch.dtype) -> Any:
    weight, scales = torch.randint(-128, 128, (48, 256), dtype=torch.int8).to(device), _normal(device, dtype, 48)
    return (lambda x: torch._weight_int8pack_mm(x, weight, scales)), (_normal(device, dtype, 5, 256),)


def _int4_weights(device: str, dtype: torch.dtype) -> Any:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (64, 256), dtype=torch.int32), 1)
    scales = _normal(device, dtype, 8, 64, 2)
    return (lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)), (_normal(device, dtype, 5, 256),)


def _int4_weights_of_dynamic_rows(device: str, dtype: torch.dtype) -> Any:
    weight, scales = torch.randint(0, 255, (64, 64), dtype=torch.uint8), _normal(device, torch.float32, 64, 4)
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(weight, scales, None, 32, 128, 64)
    return (lambda x: torch.ops.aten._dyn_quant_matmul_4bit(x, packed, 32, 128, 64)), (_normal(device, dtype, 5, 128),)


def _int8_rows_and_weights(device: str, dtype: torch.dtype) -> Any:
    """Each row with a scale of its own, as per-token dynamic quantisation has it."""
    weight, scales = torch.randint(-128, 128, (256, 48), dtype=torch.int8).to(device), _normal(device, dtype, 48)

    def run(x: Tensor) -> Tensor:
        of_rows = x.abs().amax(-1, keepdim=True) / 127
        rows = (x / of_rows.clamp(min=1e-6)).round().clamp(-128, 127).to(torch.int8)
        return torch._int_mm(rows, weight).to(x.dtype) * of_rows * scales

    return run, (_normal(device, dtype, 24, 256),)


def _mkldnn_linear(device: str, dtype: torch.dtype) -> Any:
    weight = _normal(device, dtype, 48, 256)

    def run(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten.mkldnn_linear(x.to_mkldnn(), weight.to_mkldnn(), None).to_dense()
        return out

    return run, (_normal(device, dtype, 5, 256),)


def _mkldnn_linear_pointwise(device: str, dtype: torch.dtype) -> Any:
    weight = _normal(device, dtype, 48, 256)
    return (lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")), (_normal(device, dtype, 5, 256),)


def _onednn_lstm_cell(device: str, dtype: torch.dtype) -> Any:
    cell = nn.LSTMCell(64, 32).to(device, dtype)
    return (lambda x: cell(x)[0]), (_normal(device, dtype, 5, 64),)


def _scaled_mm(device: str, dtype: torch.dtype) -> Any:
    weight, one = _normal(device, dtype, 32, 64).t(), torch.ones((), device=device)

    def run(x: Tensor) -> Tensor:
        return torch._scaled_mm(x, weight, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return run, (_normal(device, dtype, 16, 64),)


def _with_duplicates(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def make(device: str, dtype: torch.dtype) -> Any:
        index = torch.randint(0, 5, (5, 300)).to(device)
        return function, (_normal(device, dtype, 5, 40), index, _normal(device, dtype, 5, 300))

    return make


def _index_put(x: Tensor, index: Tensor, source: Tensor) -> Tensor:
    rows = torch.arange(len(x), device=x.device)[:, None].expand_as(index)
    return x.index_put((rows, index), source, accumulate=True)


def _index_copy(device: str, dtype: torch.dtype) -> Any:
    """As a static cache writes its new keys."""
    cache, new = (torch.randn(5, 2, n, 8).to(dtype).to(device) for n in (16, 2))
    place = torch.tensor([3, 7], device=device)
    return (lambda cache, new: cache.index_copy(2, place, new)), (cache, new)


def _index(device: str, dtype: torch.dtype) -> Any:
    """As a table of embeddings, or of positions, is read."""
    table, places = torch.randn(30, 8).to(dtype).to(device), torch.randint(0, 30, (5, 7), device=device)
    return (lambda places: table[places]), (places,)


def _function(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[..., Any]:
    return lambda device, dtype: (function, tuple(_normal(device, dtype, *shape) for shape in shapes))


def _module(kind: Callable[[], nn.Module], *shape: int) -> Callable[..., Any]:
    def make(device: str, dtype: torch.dtype) -> Any:
        return kind().eval().to(device, dtype), (_normal(device, dtype, *shape),)

    return make


def _many(function: Callable[..., Any], n_tensors: int) -> Callable[..., Any]:
    """A function of lists: here each list has one tensor of rows."""

    def make(device: str, dtype: torch.dtype) -> Any:
        return (lambda *xs: function(*([x] for x in xs))), tuple(_normal(device, dtype, 5, 40) for _ in range(n_tensors))

    return make


_ALSO: dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...]]] = {
    "LSTM": (_rnn(nn.LSTM), _FLOATS),
    "GRU": (_rnn(nn.GRU), _FLOATS),
    "RNN": (_rnn(nn.RNN), _FLOATS),
    "LSTMCell": (_onednn_lstm_cell, _FLOATS),
    "GRUCell": (_module(lambda: nn.GRUCell(64, 32), 5, 64), _FLOATS),
    "quantized_linear": (_quantized_linear, (torch.float32,)),
    "int8_weights": (_int8_weights, (torch.float32, torch.bfloat16, torch.float16)),
    "int4_weights": (_int4_weights, (torch.float32, torch.bfloat16, torch.float16)),
    "int4_weights_of_dynamic_rows": (_int4_weights_of_dynamic_rows, (torch.float32,)),
    "int8_rows_and_weights": (_int8_rows_and_weights, _FLOATS),
    "mkldnn_linear": (_mkldnn_linear, (torch.float32, torch.bfloat16)),
    "mkldnn_linear_pointwise": (_mkldnn_linear_pointwise, (torch.float32, torch.bfloat16)),
    "scaled_mm": (_scaled_mm, _FLOAT8),
    "to_float8": (_function(lambda x: x.to(torch.float8_e4m3fn), (5, 40)), _FLOATS),
    "of_float8": (_function(lambda x: x.to(torch.float32), (5, 40)), _FLOAT8),
    "copy_of_float8": (_function(lambda x: x.clone(), (5, 40)), _FLOAT8),
    "rfft": (_function(torch.fft.rfft, (8, 64)), (torch.float32, torch.float64)),
    "fft": (_function(torch.fft.fft, (8, 64)), _COMPLEX),
    "multi_dot": (_function(lambda a, b, c: torch.linalg.multi_dot([a, b, c]), (5, 40), (40, 30), (30, 20)), _FLOATS),
    "einsum": (_function(lambda a, b, c: torch.einsum("ni,ij,nj->n", a, b, c), (5, 40), (40, 30), (5, 30)), _FLOATS),
    "scatter_add": (_with_duplicates(lambda x, i, s: x.scatter_add(1, i, s)), _FLOATS),
    "index_add": (_with_duplicates(lambda x, i, s: x.index_add(1, i[0], s)), (*_FLOATS, *_COMPLEX)),
    "scatter_reduce": (_with_duplicates(lambda x, i, s: x.scatter_reduce(1, i, s, "sum")), _FLOATS),
    "scatter": (_with_duplicates(lambda x, i, s: x.scatter(1, i, s)), _FLOATS),
    "index_put": (_with_duplicates(_index_put), _FLOATS),
    "sort_of_ties": (_function(lambda x: x.round().sort(-1), (5, 300)), _FLOATS),
    "index": (_index, (*_FLOATS, torch.int64, torch.bool)),
    "max_pool2d": (_function(lambda x: nn.functional.max_pool2d(x, 3, 2, 1), (5, 3, 9, 8)), _FLOATS),
    "repeat": (_function(lambda x: x.repeat(1, 3), (5, 40)), (*_FLOATS, torch.int64)),
    "histc": (_function(lambda x: torch.stack([row.histc(7, -3, 3) for row in x]), (5, 40)), (torch.float32, torch.float64)),
    "index_copy": (_index_copy, (*_FLOATS, torch.int64)),
    "quotient_by_a_number": (_function(lambda x: torch.ops.aten.div.Scalar(x, 5), (5, 40)), (*_FLOATS, *_COMPLEX)),
    "slices": (_function(lambda x: x[:, 3:17:2] + x[:, -7:], (5, 40)), (*_FLOATS, *_COMPLEX)),
    "slices_of_heads": (_function(lambda x: x[..., :4] * x[..., 4:], (5, 7, 3, 8)), (*_FLOATS, *_COMPLEX)),
    "sum_with_a_factor": (_function(lambda x, y: torch.add(x, y, alpha=1.3), (5, 40), (5, 40)), (*_FLOATS, *_COMPLEX)),
    "difference_with_a_factor": (_function(lambda x, y: torch.sub(x, y, alpha=1.3), (5, 40), (5, 40)), (*_FLOATS, *_COMPLEX)),
    "batch_norm_of_images": (_module(lambda: nn.BatchNorm2d(6), 5, 6, 9, 8), _FLOATS),
    "bilinear": (_function(lambda x: nn.functional.interpolate(x, scale_factor=1.7, mode="bilinear"), (5, 3, 8, 9)), _FLOATS),
    "cdist": (_function(torch.cdist, (5, 40), (30, 40)), (torch.float32, torch.float64)),
    "prod": (_function(lambda x: x.prod(-1), (5, 40)), (*_FLOATS, *_COMPLEX)),
    "irfft": (_function(torch.fft.irfft, (8, 33)), _COMPLEX),
    "stft": (_function(lambda x: torch.stft(x, 16, return_complex=True), (5, 80)), (torch.float32, torch.float64)),
    "conv1d": (_module(lambda: nn.Conv1d(16, 24, 3), 5, 16, 40), _FLOATS),
    "conv2d": (_module(lambda: nn.Conv2d(16, 24, 3), 5, 16, 12, 12), _FLOATS),
    "patch_embedding": (_module(lambda: nn.Conv2d(3, 24, 4, 4), 5, 3, 12, 16), _FLOATS),
    "conv_transpose1d": (_module(lambda: nn.ConvTranspose1d(16, 24, 3), 5, 16, 40), _FLOATS),
    "encoder_layer": (_module(lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0), 5, 7, 32), _FLOATS),
    "multihead_attention": (_module(lambda: _SelfAttention(), 5, 7, 32), _FLOATS),
    "batch_norm": (_module(lambda: nn.BatchNorm1d(40), 5, 40), _FLOATS),
    "instance_norm": (_module(lambda: nn.InstanceNorm1d(16), 5, 16, 40), _FLOATS),
    "foreach_lerp": (_many(lambda a, b: torch._foreach_lerp(a, b, 0.3), 2), _FLOATS),
    "foreach_norm": (_many(torch._foreach_norm, 1), _FLOATS),
    "dropout": (_function(lambda x: nn.functional.dropout(x, 0.5, True), (5, 40)), _FLOATS),
}
"""name -> how to make a function and its arguments, and the dtypes. One that torch cannot make here has no samples here."""


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)[0]


def _of_our_list(name: str, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    make, dtypes = _ALSO[name.partition(":")[2]]
    if dtype in dtypes:
        with contextlib.suppress(RuntimeError, NotImplementedError):
            function, args = make(device, dtype)
            yield Sample(name, function, args, {}, dtype not in _FLOAT8)


_SOURCES = {"op": _of_operators, "foreach": _of_foreach, "module": _of_modules, "also": _of_our_list}
