"""Whatever the arguments are, the mode gives torch's result or an error of torch's type: a fuzzer over the whole table."""

import math
import os
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytest_batchinv.kernels import overloads, table
from pytest_batchinv.kernels.aten import products
from pytest_batchinv.kernels.aten.common import Refused
from torch._dynamo.exc import BackendCompilerFailed
from torch._ops import OpOverload

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.mode import stock_torch

EXAMPLES = int(os.environ.get("BATCHINV_FUZZ_EXAMPLES", 2))
"""For each entry of the table: lists of `CALLS_AT_ONCE` drawn calls, and good calls with each fault in each tensor.

Leaving and entering the mode costs 5 ms, so calls share it.
"""
CALLS_AT_ONCE = 12

NAMES = (*table.BACKEND_KERNELS, *table.COMPOSITES, *table.POINTWISE)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128)
SPECIALS = (math.nan, math.inf, -math.inf, -0.0)

ran: Counter[str] = Counter()
"""Calls compared, by overload."""
outcomes: Counter[str] = Counter()
"""The same calls, by what the mode gave: torch's result, torch's error, a refusal, or what `is_torchs_accident` lets pass."""


# --- calls as plain data -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A tensor: drawn, shown and shrunk as data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"
    special: float | None = None
    seed: int = 0
    high: int | None = None  # integers from 0 to high - 1, else from -3 to 3
    ends: bool = False  # ascending, from 0 to high
    requires_grad: bool = False
    device: str = ""

    def build(self, device: str, wide: bool = False) -> torch.Tensor:
        x = self._values()
        if wide and x.is_floating_point():
            x = x.double()
        x = x.to(self.device or device)
        return _laid_out(x, self.layout).requires_grad_(self.requires_grad)

    def _values(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            # Numbers in float64 first, so that a tensor's values do not depend on its dtype.
            x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
            if self.special is not None and x.numel():
                x.view(-1)[self.seed % x.numel()] = self.special
            return x.to(self.dtype)
        low, high = (-3, 4) if self.high is None else (0, max(self.high, 1))
        x = torch.randint(low, high + self.ends, self.shape, generator=generator)
        return (x.sort(-1).values if self.ends and x.dim() else x).to(self.dtype)


LAYOUTS = ("contiguous", "transposed", "strided", "shifted", "expanded")


def _laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and x.dim():
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "shifted":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if layout == "expanded" and x.dim() and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


@dataclass(frozen=True)
class Out:
    """An ``out=``: empty, or of the shape that the result has; its dtype is the result's unless given."""

    fits: bool
    dtype: torch.dtype | None
    layout: str
    requires_grad: bool

    def is_odd(self) -> bool:
        return self.dtype is not None or self.requires_grad or self.layout != "contiguous"

    def build(self, like: torch.Tensor | None, wide: bool) -> torch.Tensor:
        like = torch.empty(0) if like is None else like
        dtype = self.dtype or like.dtype
        dtype = torch.float64 if wide and dtype.is_floating_point else dtype
        x = torch.zeros(like.shape if self.fits else (0,), dtype=dtype, device=like.device)
        return _laid_out(x, self.layout).requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Call:
    overload: OpOverload
    functional: OpOverload
    arguments: dict[str, Any] = field(hash=False)
    outs: tuple[Out, ...] = ()
    faults: int = 0  # how many things are wrong with good arguments, at most

    @property
    def packet(self) -> str:
        return self.overload._schema.name.split("::")[1]

    def tensors(self) -> list[Spec]:
        return [v for v in self.arguments.values() if isinstance(v, Spec)]

    def dtypes(self) -> list[torch.dtype]:
        values = [*self.arguments.values(), *self.outs]
        dtypes = [v if isinstance(v, torch.dtype) else getattr(v, "dtype", None) for v in values]
        return [dtype for dtype in dtypes if dtype is not None]

    def grouped_size(self) -> int:
        """The size of the dimension that ``offs`` of _grouped_mm cuts."""
        a, b = self.arguments["self"].shape or (0,), self.arguments["mat2"].shape or (0,)
        return a[-1] if len(a) == len(b) else a[0] if len(a) == 2 else b[-1]

    def run(self, device: str, likes: tuple[torch.Tensor, ...] | None = None, wide: bool = False) -> tuple:
        overload = self.functional if likes is None else self.overload
        built = {n: _built(v, device, wide) for n, v in self.arguments.items()}
        positional = [built.pop(a.name) for a in overload._schema.arguments if a.name in built and not a.kwarg_only]
        if likes is not None:
            names = [a.name for a in overload._schema.arguments if a.is_out and a.kwarg_only]
            padded = [*likes, *[None] * len(names)]
            built |= {n: o.build(like, wide) for n, o, like in zip(names, self.outs, padded, strict=False)}
        result = overload(*positional, **built)
        return result if isinstance(result, tuple) else (result,)


def _built(value: Any, device: str, wide: bool) -> Any:
    if isinstance(value, Spec):
        return value.build(device, wide)
    return torch.float64 if wide and isinstance(value, torch.dtype) and value.is_floating_point else value


# --- good calls ----------------------------------------------------------------------------------------------------------

sizes = st.sampled_from([3, 1, 2, 5, 0, 4, 7, 17, 33])
scalars = st.sampled_from([1, 0, 0.5, -2, 2.5, True, 0.0, False])
flags = st.booleans()


def maybe(strategy):
    return st.none() | strategy


class Draw:
    """Draws the arguments of one call that torch accepts, with one dtype for the floats."""

    def __init__(self, draw, in_place: bool) -> None:
        self.draw, self.in_place = draw, in_place
        self.dtype = draw(st.sampled_from(FLOATS))

    def tensor(self, *shape: int, **options) -> Spec:
        seed, layout = self.draw(st.integers(0, 999)), self.draw(st.sampled_from(LAYOUTS[:-1]))
        special = self.draw(st.sampled_from([None, None, None, *SPECIALS]))
        return Spec(shape, **({"dtype": self.dtype, "layout": layout, "seed": seed, "special": special} | options))

    def integers(self, *shape: int, high: int, **options) -> Spec:
        dtype = options.pop("dtype", None) or self.draw(st.sampled_from([torch.int64, torch.int64, torch.int32]))
        return self.tensor(*shape, dtype=dtype, high=high, special=None, **options)

    def shape(self, least: int = 0, most: int = 4) -> tuple[int, ...]:
        return tuple(self.draw(st.lists(sizes, min_size=least, max_size=most)))

    def dim(self, rank: int) -> int:
        return self.draw(st.integers(-max(rank, 1), max(rank, 1) - 1))

    def dims(self, rank: int) -> list[int] | None:
        chosen = self.draw(maybe(st.lists(st.integers(0, max(rank, 1) - 1), unique=True, max_size=rank)))
        return chosen and [d - max(rank, 1) if self.draw(flags) else d for d in chosen]

    def bias(self, *shape: int) -> Spec:
        """Of a shape that broadcasts."""
        if self.in_place or self.draw(flags):
            return self.tensor(*shape)
        kept = shape[self.draw(st.integers(0, len(shape))) :]
        return self.tensor(*(1 if self.draw(flags) else size for size in kept))

    def bias_and_scale(self, *shape: int) -> dict:
        return {"self": self.bias(*shape), "beta": self.draw(scalars), "alpha": self.draw(scalars)}

    def sizes(self, n: int) -> list[int]:
        return [self.draw(sizes) for _ in range(n)]

    def dtype_or_none(self) -> torch.dtype | None:
        return self.draw(maybe(st.sampled_from(FLOATS)))

    def parameter(self, *shape: int) -> Spec | None:
        return self.tensor(*shape) if self.draw(flags) else None


def _mm(d):
    m, k, n = d.sizes(3)
    return {"self": d.tensor(m, k), "mat2": d.tensor(k, n)}


def _addmm(d):
    m, k, n = d.sizes(3)
    return d.bias_and_scale(m, n) | {"mat1": d.tensor(m, k), "mat2": d.tensor(k, n)}


def _bmm(d):
    b, m, k, n = d.sizes(4)
    return {"self": d.tensor(b, m, k), "mat2": d.tensor(b, k, n)}


def _baddbmm(d, reduced=False):
    b, m, k, n = d.sizes(4)
    shape = (m, n) if reduced else (b, m, n)
    return d.bias_and_scale(*shape) | {"batch1": d.tensor(b, m, k), "batch2": d.tensor(b, k, n)}


def _with_dtype(make):
    def arguments(d):
        d.dtype = d.draw(st.sampled_from([torch.bfloat16, torch.float16]))
        return make(d) | {"out_dtype": d.draw(st.sampled_from([torch.float32, d.dtype]))}

    return arguments


def _mv(d):
    m, k = d.sizes(2)
    return {"self": d.tensor(m, k), "vec": d.tensor(k)}


def _addmv(d):
    m, k = d.sizes(2)
    return d.bias_and_scale(m) | {"mat": d.tensor(m, k), "vec": d.tensor(k)}


def _dot(d, other="tensor"):
    k = d.draw(sizes)
    return {"self": d.tensor(k), other: d.tensor(k)}


def _grouped_mm(d):
    t, k, n, groups = (8 * s for s in d.sizes(2)), None, None, None
    (k, n), t, groups = t, d.draw(sizes), d.draw(st.sampled_from([3, 1, 2, 4, 0]))
    kind = d.draw(st.sampled_from(["2d3d", "2d3d", "3d3d", "2d2d", "3d2d"]))
    offs = d.integers(groups, high={"2d2d": k, "3d2d": n}.get(kind, t), dtype=torch.int32, ends=True, layout="contiguous")
    a = {"2d3d": (t, k), "3d3d": (groups, t, k), "2d2d": (8, k), "3d2d": (groups, t, k)}[kind]
    b = {"2d3d": (groups, k, n), "3d3d": (groups, k, n), "2d2d": (k, n), "3d2d": (k, n)}[kind]
    layout = {"layout": d.draw(st.sampled_from(["contiguous", "transposed"]))}
    return {
        "self": d.tensor(*a, layout="contiguous"),
        "mat2": d.tensor(*b, **(layout if len(b) == 2 else {"layout": "contiguous"})),
        "offs": None if kind == "3d3d" else offs,
    }


def _convolution(d):
    n, length, taps = d.draw(sizes), d.draw(sizes), d.draw(st.sampled_from([1, 2, 3]))
    groups, each, out = d.draw(st.sampled_from([1, 2])), d.draw(st.sampled_from([1, 2])), d.draw(st.sampled_from([1, 3, 2]))
    rank = d.draw(st.sampled_from([1, 1, 1, 2]))
    small = st.lists(st.sampled_from([1, 2]), min_size=rank, max_size=rank)
    return {
        "input": d.tensor(n, groups * each, *[length] * rank),
        "weight": d.tensor(groups * out, each, *[taps] * rank),
        "bias": d.parameter(groups * out),
        "stride": d.draw(small),
        "padding": d.draw(st.lists(st.sampled_from([0, 1, 2]), min_size=rank, max_size=rank)),
        "dilation": d.draw(small),
        "transposed": d.draw(st.sampled_from([False, False, False, True])),
        "output_padding": [0] * rank,
        "groups": groups,
    }


def _whole(d):
    return {"self": d.tensor(*d.shape()), "dtype": d.dtype_or_none()}


def _dims(d, *rest):
    shape = d.shape()
    options = {
        "dtype": d.dtype_or_none,
        "correction": lambda: d.draw(st.sampled_from([None, 0, 1, 2, 0.5, 9])),
        "ord": lambda: d.draw(st.sampled_from([2, 1, 0, 3, 0.5, math.inf, -math.inf, -1, -2])),
        "p": lambda: d.draw(st.sampled_from([2, None, 1, 0, 3, math.inf, -math.inf])),
    }
    named = {name: options[name]() for name in rest}
    return {"self": d.tensor(*shape), "dim": d.dims(len(shape)), "keepdim": d.draw(flags)} | named


def _listed(arguments):
    return arguments | {"dim": arguments["dim"] or []}


def _cumsum(d):
    shape = d.shape()
    return {"self": d.tensor(*shape), "dim": d.dim(len(shape)), "dtype": None if d.in_place else d.dtype_or_none()}


def _softmax(d):
    shape = d.shape()
    return {"self": d.tensor(*shape), "dim": d.dim(len(shape)), "half_to_float": False}


def _topk(d):
    shape = d.shape()
    dim = d.dim(len(shape))
    k = d.draw(st.integers(0, shape[dim] if shape else 1))
    ties = d.draw(flags) and {"dtype": torch.int64}
    return {"self": d.tensor(*shape, **(ties or {})), "k": k, "dim": dim, "largest": d.draw(flags), "sorted": d.draw(flags)}


def _layer_norm(d, stats=True):
    normalized, leading = d.shape(1, 2), d.shape(0, 2)
    bias = {"bias": d.parameter(*normalized)} if stats else {}
    eps = d.draw(st.sampled_from([1e-5, 1e-3])) if stats else d.draw(st.sampled_from([None, 1e-5]))
    shape = {"normalized_shape": list(normalized)}
    return {"input": d.tensor(*leading, *normalized), **shape, "weight": d.parameter(*normalized), **bias, "eps": eps}


def _group_norm(d):
    n, each, length = d.sizes(3)
    group = d.draw(st.sampled_from([1, 2, 3]))
    C = group * each
    parameters = {"weight": d.parameter(C), "bias": d.parameter(C)}
    return {"input": d.tensor(n, C, length), **parameters, "N": n, "C": C, "HxW": length, "group": group, "eps": 1e-5}


def _attention(d, kind):
    b, hkv, sq, sk = d.draw(st.sampled_from([1, 2, 0])), d.draw(st.sampled_from([1, 2])), *d.sizes(2)
    group = d.draw(st.sampled_from([1, 2])) if kind == "composite" else 1
    D = d.draw(st.sampled_from([4, 8, 3, 1, 0]))
    Dv = d.draw(st.sampled_from([D, D, 5])) if kind == "composite" else D
    lead = () if kind == "composite" and d.draw(st.integers(0, 4)) == 0 else (b,)
    q, k, v = d.tensor(*lead, hkv * group, sq, D), d.tensor(*lead, hkv, sk, D), d.tensor(*lead, hkv, sk, Dv)
    mask_shape = d.draw(st.sampled_from([None, None, (sq, sk), (1, sk), (*lead, 1, sq, sk), (*lead, hkv * group, sq, sk)]))
    mask = None
    if mask_shape is not None:
        mask = d.tensor(*mask_shape)
        if kind == "composite" and d.draw(flags):
            mask = d.integers(*mask_shape, high=2, dtype=torch.bool)
    rest = {"is_causal": mask is None and d.draw(flags), "scale": d.draw(st.sampled_from([None, 0.5]))}
    rest |= {"dropout_p": 0.0}
    if kind == "efficient":
        rest |= {"compute_log_sumexp": d.draw(flags)}
    if kind == "composite":
        rest |= {"enable_gqa": group > 1}
    return {"query": q, "key": k, "value": v, {"efficient": "attn_bias"}.get(kind, "attn_mask"): mask, **rest}


def _index_add(d):
    shape, n = d.shape(), d.draw(sizes)
    dim = d.dim(len(shape))
    at = dim % max(len(shape), 1)
    n = (n if shape[dim] else 0) if shape else 1
    source = (*shape[:at], n, *shape[at + 1 :]) if shape else ()
    index = d.integers(n, high=shape[dim] if shape else 1)
    return {"self": d.tensor(*shape), "dim": dim, "index": index, "source": d.tensor(*source), "alpha": d.draw(scalars)}


def _scatter_add(d):
    shape = d.shape()
    dim = d.dim(len(shape))
    index_shape = [d.draw(st.integers(0, size)) for size in shape]
    src_shape = [size + d.draw(st.integers(0, 2)) for size in index_shape]
    index = d.integers(*index_shape, high=shape[dim] if shape else 1, dtype=torch.int64)
    return {"self": d.tensor(*shape), "dim": dim, "index": index, "src": d.tensor(*src_shape)}


def _linear(d):
    k, n = d.sizes(2)
    weight = d.draw(st.sampled_from([(n, k), (n, k), (n, k), (k,)]))
    bias = d.tensor(*d.draw(st.sampled_from([(n,), (n,), ()]))) if d.draw(flags) else None
    return {"input": d.tensor(*d.shape(0, 3), k), "weight": d.tensor(*weight), "bias": bias}


def _pointwise(d, **options):
    return {"self": d.tensor(*d.shape()), **{name: d.draw(strategy) for name, strategy in options.items()}}


GOOD = {
    "mm": _mm,
    "mm.dtype": _with_dtype(_mm),
    "addmm": _addmm,
    "addmm.dtype": _with_dtype(_addmm),
    "_addmm_activation": lambda d: _addmm(d) | {"use_gelu": d.draw(flags)},
    "bmm": _bmm,
    "bmm.dtype": _with_dtype(_bmm),
    "baddbmm": _baddbmm,
    "baddbmm.dtype": _with_dtype(_baddbmm),
    "addbmm": lambda d: _baddbmm(d, reduced=True),
    "mv": _mv,
    "addmv": _addmv,
    "dot": _dot,
    "vdot": lambda d: _dot(d, "other"),
    "_grouped_mm": _grouped_mm,
    "convolution": _convolution,
    "sum": _whole,
    "sum.dim_IntList": lambda d: _dims(d, "dtype"),
    "mean": _whole,
    "mean.dim": lambda d: _dims(d, "dtype"),
    "var.correction": lambda d: _dims(d, "correction"),
    "std.correction": lambda d: _dims(d, "correction"),
    "var_mean.correction": lambda d: _dims(d, "correction"),
    "std_mean.correction": lambda d: _dims(d, "correction"),
    "logsumexp": lambda d: _listed(_dims(d)),
    "linalg_vector_norm": lambda d: _dims(d, "ord", "dtype"),
    "norm.Scalar": lambda d: {"self": d.tensor(*d.shape()), "p": d.draw(st.sampled_from([2, 1, 0, 3, math.inf]))},
    "norm.ScalarOpt_dtype": lambda d: {
        "self": d.tensor(*d.shape()), "p": d.draw(st.sampled_from([2, None, 1, 0, 3])), "dtype": d.draw(st.sampled_from(FLOATS))
    },
    "norm.ScalarOpt_dim": lambda d: _listed(_dims(d, "p")),
    "norm.ScalarOpt_dim_dtype": lambda d: _listed(_dims(d, "p")) | {"dtype": d.draw(st.sampled_from(FLOATS))},
    "cumsum": _cumsum,
    "_softmax": _softmax,
    "_log_softmax": _softmax,
    "topk": _topk,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "_fused_rms_norm": lambda d: _layer_norm(d, stats=False),
    "_scaled_dot_product_flash_attention_for_cpu": lambda d: _attention(d, "flash"),
    "_scaled_dot_product_efficient_attention": lambda d: _attention(d, "efficient"),
    "index_add": _index_add,
    "scatter_add": _scatter_add,
    "linear": _linear,
    "layer_norm": _layer_norm,
    "rms_norm": lambda d: _layer_norm(d, stats=False),
    "scaled_dot_product_attention": lambda d: _attention(d, "composite"),
    **{
        name: _pointwise
        for name in ("silu", "sigmoid", "mish", "rsqrt", "exp", "tanh", "erf", "expm1", "log", "log1p", "sin", "cos")
    },
    "gelu": lambda d: _pointwise(d, approximate=st.sampled_from(["none", "tanh"])),
    "softplus": lambda d: _pointwise(d, beta=st.sampled_from([1, 2.5, True]), threshold=st.sampled_from([20, 1, 0])),
    "elu": lambda d: _pointwise(d, alpha=scalars, scale=scalars, input_scale=scalars),
    "pow.Tensor_Scalar": lambda d: _pointwise(d, exponent=st.sampled_from([2, 3, 0, 0.5, -0.5, -1, 1.7, -2, True])),
}  # fmt: skip


# --- bad calls: a good one with one or two things changed ------------------------------------------------------------------


@st.composite
def mutated_tensor(draw, spec: Spec) -> Spec | None:
    kind = draw(st.sampled_from(["dtype", "size", "rank", "layout", "scalar", "grad", "special", "device", "shape"]))
    if kind == "dtype":
        return replace(spec, dtype=draw(st.sampled_from((*FLOATS, *OTHERS))))
    if kind == "size" and spec.shape:
        at, size = draw(st.integers(0, len(spec.shape) - 1)), draw(sizes)
        return replace(spec, shape=(*spec.shape[:at], size, *spec.shape[at + 1 :]))
    if kind == "rank":
        at = draw(st.integers(0, len(spec.shape)))
        shape = (*spec.shape[:at], 1, *spec.shape[at:]) if draw(flags) else (*spec.shape[:at], *spec.shape[at + 1 :])
        return replace(spec, shape=shape)
    if kind == "layout":
        return replace(spec, layout=draw(st.sampled_from(LAYOUTS)))
    if kind == "scalar":
        return replace(spec, shape=())
    if kind == "shape":
        return replace(spec, shape=tuple(draw(st.lists(sizes, max_size=4))))
    if kind == "grad" and (spec.dtype.is_floating_point or spec.dtype.is_complex):
        return replace(spec, requires_grad=True)
    if kind == "device":
        return replace(spec, device=draw(st.sampled_from(["meta", "cpu"])))
    return replace(spec, special=draw(st.sampled_from(SPECIALS)), high=None)


@st.composite
def mutated(draw, value: Any, schema_type: str) -> Any:
    if isinstance(value, Spec):
        return draw(mutated_tensor(value))
    if schema_type == "Optional[Tensor]":
        return Spec(tuple(draw(st.lists(sizes, max_size=3))), draw(st.sampled_from(FLOATS)))
    if schema_type in ("bool", "str"):
        return draw(flags) if schema_type == "bool" else draw(st.sampled_from(["tanh", "none", "no such form"]))
    if "List[int]" in schema_type:
        return draw(st.lists(st.integers(-5, 5), max_size=4))
    if schema_type == "int" and isinstance(value, torch.dtype) or schema_type == "Optional[int]":
        return draw(st.sampled_from((*FLOATS, *OTHERS)))  # schemas show a dtype as an integer
    if schema_type == "int":
        return draw(st.integers(-6, 6))
    return draw(st.sampled_from([0, 1, -1, 2.5, True, math.nan, math.inf]))


@st.composite
def good_calls(draw, name: str) -> Call:
    """Of the functional overload, or of its ``.out`` or in-place sibling."""
    functional = overloads.overload_of(name)
    siblings = [s for s in overloads.siblings(functional) if name not in table.COMPOSITES]
    sibling = draw(st.sampled_from([None, None, *siblings]))
    in_place = sibling is not None and not sibling.out_names
    outs = tuple(Out(True, None, "contiguous", False) for _ in sibling.out_names) if sibling is not None else ()
    overload = functional if sibling is None else sibling.overload
    return Call(overload, functional, GOOD[name](Draw(draw, in_place)), outs)


@st.composite
def calls(draw, name: str) -> Call:
    """Good ones, and ones with up to two changed arguments or an odd ``out=``."""
    good = draw(good_calls(name))
    arguments, faults = dict(good.arguments), 0
    types = {a.name: str(a.type) for a in good.functional._schema.arguments}
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        changed = draw(st.sampled_from(sorted(arguments)))
        before, arguments[changed] = arguments[changed], draw(mutated(arguments[changed], types[changed]))
        # A list may hold two faults, and a tensor that was not there may be wrong by itself and beside the others.
        faults += 2 if isinstance(arguments[changed], list) or before is None else 1
    outs = tuple(
        Out(
            draw(flags),
            draw(st.sampled_from([None, None, None, *FLOATS, *OTHERS])),
            draw(st.sampled_from(["contiguous", "contiguous", *LAYOUTS])),
            draw(st.sampled_from([False] * 9 + [True])),
        )
        for _ in good.outs
    )
    return replace(good, arguments=arguments, outs=outs, faults=faults + sum(out.is_odd() for out in outs))


SINGLE_FAULTS = {
    "another dtype": lambda x: replace(x, dtype=torch.float32 if x.dtype == torch.float64 else torch.float64),
    "integers": lambda x: replace(x, dtype=torch.int64),
    "complex": lambda x: replace(x, dtype=torch.complex64),
    "no dims": lambda x: replace(x, shape=()),
    "a dim more": lambda x: replace(x, shape=(1, *x.shape)),
    "a dim less": lambda x: replace(x, shape=x.shape[1:]),
    "another size": lambda x: replace(x, shape=(*x.shape[:-1], sum(x.shape[-1:]) + 1)),
    "empty": lambda x: replace(x, shape=(*x.shape[:-1], 0)),
}


def with_each_fault(call: Call) -> list[Call]:
    """The call, and each of the faults in each of its tensors, one at a time."""
    tensors = {name: spec for name, spec in call.arguments.items() if isinstance(spec, Spec)}
    changed = [{name: fault(spec)} for name, spec in tensors.items() for fault in SINGLE_FAULTS.values()]
    return [call, *(replace(call, arguments=call.arguments | change, faults=1) for change in changed)]


def kills_torch(call: Call, device: str) -> bool:
    """Calls that end torch's process, or read what is not theirs.

    torch 2.13.0's flash kernel for the CPU divides by the sizes (SIGFPE), and reads key and value as if they fitted.
    """
    if device == "cuda" and ends_the_device(call):
        return True
    if call.packet != "_scaled_dot_product_flash_attention_for_cpu":
        return False
    shapes = [call.arguments[n].shape for n in ("query", "key", "value")]
    if any(len(shape) != 4 for shape in shapes):
        return False
    (b, h, _, d), key, value = shapes
    fits = key == value and (key[0], key[1], key[3]) == (b, h, d)
    return not fits or any(0 in x.shape for x in call.tensors())


def ends_the_device(call: Call) -> bool:
    """Calls after which torch's own CUDA kernels leave a device on which nothing runs."""
    name, arguments = call.packet, call.arguments
    if arguments.get("index") is not None:  # out of range, it is an assertion of the device
        shape, dim, index = arguments["self"].shape or (1,), arguments["dim"], arguments["index"]
        return not -len(shape) <= dim < len(shape) or index.high is None or index.high > shape[dim]
    if name == "_grouped_mm" and isinstance(arguments["offs"], Spec):
        a, b, offs = arguments["self"], arguments["mat2"], arguments["offs"]
        if offs.high is None or not offs.ends or offs.high > call.grouped_size():
            return True
        if not a.dtype == b.dtype == torch.bfloat16:
            return False
        if 0 in a.shape or 0 in b.shape:
            return True
        # The kernel for bfloat16 divides by the number of groups (SIGFPE), and asserts that each group of columns begins
        # at a multiple of 16 bytes.
        ends = replace(offs, dtype=torch.int64, device="").build("cpu").flatten().tolist()
        number = b.shape[0] if len(b.shape) == 3 else a.shape[0] if len(a.shape) == 3 else len(ends)
        by_rows = len(a.shape) == 2 and len(b.shape) == 3 and a.layout != "transposed"
        return number == 0 or not by_rows and any(end % 8 for end in ends[:-1])
    if name == "_scaled_dot_product_efficient_attention":
        # Reads key and value as if they had the query's dtype, and lines of value as if aligned as those of the query.
        query, key, value = (arguments[n] for n in ("query", "key", "value"))
        line_bytes = math.prod(value.shape[-1:]) * value.dtype.itemsize
        return not query.dtype == key.dtype == value.dtype or query.shape[-1:] != value.shape[-1:] and line_bytes % 16 > 0
    return False


def readable(call: Call, device: str) -> Call:
    """What torch gets instead of a call that it would answer with "misaligned address", and never run again.

    Its CUDA kernels of attention load 16 bytes from wherever a tensor begins. They get the same values at an aligned place.
    """
    if device != "cuda" or call.packet not in ("scaled_dot_product_attention", "_scaled_dot_product_efficient_attention"):
        return call
    shifted = {n: v for n, v in call.arguments.items() if isinstance(v, Spec) and v.layout == "shifted"}
    return replace(call, arguments=call.arguments | {n: replace(v, layout="contiguous") for n, v in shifted.items()})


# --- the comparison ------------------------------------------------------------------------------------------------------


class DeviceEnded(BaseException):
    """A kernel failed, and with it every later call of the process on this device.

    It must not be compared: torch and the mode would agree from then on, in raising the same error. As it is no Exception,
    Hypothesis neither shrinks it nor tries another example.
    """


def outcome(call: Call, device: str, likes=None, wide: bool = False):
    """The tensors that the call gives, or the error that it raises. Raises DeviceEnded if the device did not survive it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = call.run(device, likes, wide)
    except Exception as error:
        result = error
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise DeviceEnded(f"{error}\nat the latest in {call}") from error
    return result


PRODUCTS = ("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "linear")
NORMS = ("layer_norm", "native_layer_norm", "native_group_norm", "var", "std", "var_mean", "std_mean")


def may_be_refused(call: Call) -> bool:
    """What docs/architecture.md lists as refused, and nothing else."""
    name, arguments = call.packet, call.arguments
    if any(dtype.is_complex for dtype in call.dtypes()) and call.packet.rstrip("_") not in table.COMPLEX:
        return True
    if name == "convolution":
        return arguments["transposed"] or len(arguments["input"].shape) != 3
    if name == "_grouped_mm":  # with groups of the summed dimension, a bias, or another dtype
        grouped_sum = len(arguments["self"].shape) == len(arguments["mat2"].shape) == 2
        return grouped_sum or any(arguments.get(n) is not None for n in ("bias", "out_dtype"))
    if name.endswith(("_attention", "_attention_for_cpu")):
        mask = arguments.get("attn_mask") or arguments.get("attn_bias")
        return arguments["dropout_p"] != 0 or (mask is not None and mask.requires_grad)
    return False


def is_torchs_accident(call: Call, expected: "Expected", actual: Any) -> bool:
    """Where torch gives what nobody could want, by chance of its code, and the mode does not follow."""
    name, tensors = call.packet, call.tensors()
    torch_raises, mode_raises = isinstance(expected.stock, Exception), isinstance(actual, Exception)
    cuda = not mode_raises and any(x.is_cuda for x in actual)
    if len({x.device for x in tensors}) > 1 and any(x.device == "meta" for x in tensors):
        return not torch_raises or not mode_raises  # beside a tensor without storage torch reads anything, or raises
    if mode_raises and not torch_raises and any(0 in x.shape for x in tensors) and len(set(call.dtypes())) > 1:
        return True  # where there is nothing to multiply, torch does not look at the dtypes
    if mode_raises and not torch_raises and any(out.layout == "expanded" for out in call.outs):
        return True  # some kernels write several values to one place, others see it
    if cuda and is_cudas_accident(call, expected, actual):
        return True
    if name in ("var", "std") and torch_raises and not mode_raises:
        # A path for all dims that does not know the dtypes which the others know, and complex results by dims and device.
        is_complex = any(out.dtype is not None and out.dtype.is_complex for out in call.outs)
        return is_complex or "std_var_all" in str(expected.stock)
    if call.overload.name() in ("aten::_softmax.out", "aten::_log_softmax.out") and not (torch_raises or mode_raises or cuda):
        return call.outs[0].layout != "contiguous"  # writes as if it were, and leaves some of it as it was
    if call.overload.name() == "aten::addbmm.out":  # converts self, which the others refuse
        return mode_raises and not torch_raises and call.arguments["self"].dtype != call.arguments["batch1"].dtype
    if name == "linalg_vector_norm" and torch_raises and mode_raises:  # of dims that are wrong twice, by its other arguments
        return isinstance(expected.stock, RuntimeError) and isinstance(actual, IndexError) and bool(call.arguments["dim"])
    if name == "logsumexp" and torch_raises and not mode_raises:
        return call.arguments["dim"] == []  # torch trips over its own shapes, where other sums mean "all dims"
    if name == "_grouped_mm" and isinstance(call.arguments["offs"], Spec) and not torch_raises:
        return call.arguments["offs"].high is None or call.arguments["offs"].high > call.grouped_size()
    if name == "linear" and torch_raises and mode_raises and not call.arguments["input"].dtype.is_floating_point:
        return isinstance(expected.stock, NotImplementedError)  # by ranks and strides, it looks for integers or dtypes first
    if name == "linear" and call.arguments["bias"] is not None:
        if len(call.arguments["weight"].shape) == 1 or len(call.arguments["bias"].shape) > 1:
            return torch_raises and not mode_raises  # raises or not by the input's rank and strides
        if not torch_raises:  # of any dtype where, by ranks and strides, product and bias are not fused
            return mode_raises and call.arguments["bias"].dtype != call.arguments["input"].dtype
    if call.overload.name() in ("aten::bmm.dtype_out", "aten::baddbmm.dtype_out"):
        if call.outs[0].dtype not in (None, call.arguments["out_dtype"]):
            return mode_raises and not torch_raises  # looks at the dtype of out alone
    if call.overload.name() in ("aten::mm.dtype_out", "aten::bmm.dtype_out", "aten::baddbmm.dtype_out"):
        if not call.outs[0].fits:  # is not resized: the products of matrices refuse it, bmm leaves it as it was
            return torch_raises and not mode_raises if name != "bmm" else not torch_raises
    if name == "_scaled_dot_product_efficient_attention" and torch_raises and not mode_raises:
        # Its kernels are for some strides; ours take any.
        return any(reason in str(expected.stock) for reason in ("aligned", "contiguous", "no kernel found"))
    mask = call.arguments.get("attn_mask")
    if name == "mean" and torch_raises:  # takes the dtype of out for floats, and with dims also for integers
        return not mode_raises and not call.arguments["self"].dtype.is_floating_point
    if name.endswith("_attention") and mask is not None and call.arguments["is_causal"] and mode_raises and not torch_raises:
        return True  # torch's kernels for the CPU take both, its others do not
    if name == "scaled_dot_product_attention" and mask is not None and len(mask.shape) < 2 and torch_raises:
        return not mode_raises  # or not, by the kernel that it picks
    if name.endswith("_attention") and not torch_raises and any(0 in x.shape for x in tensors):
        return mode_raises or len({x.shape[:-2] for x in tensors}) > 1  # returns before it checks or broadcasts
    if name.endswith("_for_cpu"):  # reads the last dim as if its stride were 1
        return not mode_raises and any(x.layout not in ("contiguous", "shifted") for x in tensors)
    if name.rstrip("_") in ("mv", "addmv") and mode_raises and torch.__version__ < "2.12":
        # torch asks for one dtype since 2.12. Before, it converted self, and told of integers by another error.
        matrix, vector = call.arguments["mat" if "mat" in call.arguments else "self"], call.arguments["vec"]
        if matrix.dtype != vector.dtype and isinstance(expected.stock, NotImplementedError):
            return True
        if matrix.dtype == vector.dtype != call.arguments["self"].dtype and not torch_raises:
            return True
    if name == "addmv" and call.arguments["self"].shape in ((), (1,)):
        if torch_raises:  # it fails while it writes the message
            return mode_raises and isinstance(expected.stock, IndexError)
        return 0 in call.arguments["mat"].shape  # of the shape of self, which was to be broadcast
    if name.startswith("scatter_add") and torch_raises and mode_raises:  # where ranks differ, by which it looks at first
        return isinstance(expected.stock, IndexError) and len(call.arguments["src"].shape) != len(call.arguments["index"].shape)
    if name == "convolution" and torch_raises and any(0 in x.shape for x in tensors):
        return mode_raises  # by whichever kernel it picks for nothing
    if name == "convolution" and len(set(call.dtypes())) > 1 and torch_raises and mode_raises:
        return any(dtype.is_complex for dtype in call.dtypes())  # looks for a kernel before it looks at the other dtype
    if name == "convolution" and call.arguments["bias"] is not None:  # adds a bias of any dtype
        return not torch_raises and mode_raises and call.arguments["bias"].dtype != call.arguments["input"].dtype
    if name == "native_group_norm" and mode_raises and torch.__version__ >= "2.14":
        # An empty batch of an input that is not empty: torch gives a result of the input's shape, and never writes to it.
        return not torch_raises and call.arguments["N"] == 0 and 0 not in call.arguments["input"].shape
    if name == "native_group_norm":  # reads parameters as if they were contiguous
        parameters = (call.arguments[n] for n in ("weight", "bias"))
        return not mode_raises and any(p is not None and p.layout in ("strided", "expanded") for p in parameters)
    if name == "addbmm_":  # not in place at all
        return not torch_raises and call.arguments["self"].shape != expected.stock[0].shape
    return False


def is_cudas_accident(call: Call, expected: "Expected", actual: tuple[torch.Tensor, ...]) -> bool:
    """The same for torch's CUDA kernels where the mode gives a result."""
    name, torch_raises = call.packet, isinstance(expected.stock, Exception)
    if name in ("rms_norm", "_fused_rms_norm") and not torch_raises:  # an infinity makes NaN of its whole row
        nan = expected.stock[0].isnan()
        same = torch.isclose(actual[0].double(), expected.stock[0].double(), rtol=0.02, equal_nan=True)
        return call.arguments["input"].special in (math.inf, -math.inf) and bool((nan | same).all())
    if name in ("_softmax", "_log_softmax") and torch_raises:  # what torch's own fake implementation takes too
        return call.arguments["half_to_float"] and "Half type only" in str(expected.stock)
    if name == "_addmm_activation" and not torch_raises:
        if call.arguments["mat1"].shape[1:] == (0,) or call.arguments["alpha"] == 0:
            return True  # forgets the activation where there is nothing to multiply
        if call.arguments["use_gelu"]:  # cuBLASLt's gelu has sqrt(2 / pi) in eight digits, in float64 too
            return actual[0].dtype == torch.float64 and torch.allclose(actual[0], expected.stock[0], 1e-8, 1e-8, True)
        nan = actual[0].isnan()  # cuBLASLt's relu makes 0 of NaN, torch's own keeps it
        same = torch.isclose(actual[0].double(), expected.stock[0].double(), rtol=0.02, atol=0.02)
        return bool((same | nan & (expected.stock[0] == 0)).all() and nan.any())
    if name == "_fused_rms_norm" and torch_raises:  # takes a weight of the input's dtype alone; on the CPU, of any
        return "expected scalar type" in str(expected.stock)
    if name == "scaled_dot_product_attention" and not torch_raises:  # with heads of no values it is no tensor at all
        return expected.stock[0] is None and call.arguments["query"].shape[-1] == 0
    if name == "native_group_norm" and torch_raises:  # launches a kernel for nothing
        return "invalid argument" in str(expected.stock) and any(0 in x.shape for x in call.tensors())
    return False


@dataclass
class Expected:
    """What torch does: with the arguments as they are, and, where that works, with floats as float64."""

    likes: tuple[torch.Tensor, ...] | None
    stock: Any
    wide: Any


def expect(call: Call, device: str) -> Expected:
    likes, call = None, readable(call, device)
    if call.overload is not call.functional:
        functional = outcome(call, device)
        likes = () if isinstance(functional, Exception) else functional
    return Expected(likes, outcome(call, device, likes), outcome(call, device, likes, wide=True))


def disagreement(call: Call, expected: Expected, actual: Any) -> str | None:
    """In what the mode's outcome differs from torch's, or None."""
    if isinstance(actual, Refused) and may_be_refused(call) or is_torchs_accident(call, expected, actual):
        return None
    if isinstance(expected.stock, Exception) or isinstance(actual, Exception):
        both = (expected.stock, actual)
        # Which of two faults is found first is nobody's promise. Where there is no result, an out= fits nothing.
        same = (call.faults > 1 or expected.likes == ()) and all(isinstance(e, (RuntimeError, IndexError)) for e in both)
        return None if same or type(both[0]) is type(both[1]) else f"torch: {_told(both[0])}; the mode: {_told(both[1])}"
    if call.packet == "topk" and _equal_up_to_ties(call, actual, expected.stock):
        return None
    for i, (a, e) in enumerate(zip(actual, expected.stock, strict=True)):
        if i >= 2 and call.packet == "_scaled_dot_product_efficient_attention" and (a.dtype, a.shape) == (e.dtype, e.shape):
            continue  # the seed of a dropout that is refused: on the CPU and not initialised, or zero on the GPU, by version
        wide = e if isinstance(expected.wide, Exception) else expected.wide[i]
        difference = _different_kind(a, e) or _different_values(call, a, e, wide)
        if difference:
            return f"result {i}: {difference}"
    return None


def _equal_up_to_ties(call: Call, actual: tuple, stock: tuple) -> bool:
    """Which of equal values torch picks, and in which order it hands out what was not to be sorted, is left to it."""
    dim, spec = call.arguments["dim"], call.arguments["self"]
    if any(_different_kind(a, e) for a, e in zip(actual, stock, strict=True)) or spec.device == "meta":
        return False
    values, indices = (x.detach() for x in actual)
    x = spec.build(values.device.type).detach()
    if x.dim() and (indices.sort(dim).values.diff(dim=dim) == 0).any():
        return False
    picked = x.gather(dim, indices.long()) if x.dim() else x
    same = torch.equal(picked.to(values.dtype).nan_to_num(nan=7e4), values.nan_to_num(nan=7e4))
    in_order = (v.detach().sort(dim).values if v.dim() else v.detach() for v in (values, stock[0]))
    return same and all(torch.equal(*pair) for pair in [[v.nan_to_num(nan=7e4) for v in in_order]])


def _kind(call: Call, expected: Expected, actual: Any) -> str:
    if isinstance(actual, Refused):
        return "refused"
    if is_torchs_accident(call, expected, actual):
        return "torch's accident"
    return "error" if isinstance(actual, Exception) else "result"


def _told(result: Any) -> str:
    if isinstance(result, Exception):
        return f"{type(result).__name__}: {str(result).splitlines()[0] if str(result) else ''}"
    return ", ".join(f"{r.dtype} {list(r.shape)} {r.device}" if isinstance(r, torch.Tensor) else repr(r) for r in result)


def _different_kind(a: Any, e: Any) -> str | None:
    if not isinstance(e, torch.Tensor):
        return None if a == e else f"{a!r} is not {e!r}"
    for what in ("dtype", "shape", "device", "requires_grad"):
        if getattr(a, what) != getattr(e, what):
            return f"{what} is {getattr(a, what)}, torch's {getattr(e, what)}"
    if e.is_contiguous() and not a.is_contiguous():
        return f"strides {a.stride()} where torch's are contiguous"
    return None


def _different_values(call: Call, a: Any, e: Any, wide: Any) -> str | None:
    if not isinstance(e, torch.Tensor) or not e.numel() or e.device.type == "meta":
        return None
    if call.packet in NORMS and any(0 in x.shape for x in call.tensors()):
        return None  # so it does for the mean of no values
    if call.packet == "topk" and e.is_cuda and e.dim() == 0 and call.arguments["k"] == 0:
        return None  # none of one value without dims: of the one value's shape, and memory as it was
    a, e, wide = a.detach(), e.detach(), wide.detach()
    if not (e.is_floating_point() or e.is_complex()):
        return None if torch.equal(a, e) else f"{a.tolist()}, torch's {e.tolist()}"
    if wide.shape != e.shape:
        wide = e
    if call.packet == "_grouped_mm" and isinstance(call.arguments["offs"], Spec):  # behind the last group memory is as it was
        offs, by_columns = call.arguments["offs"].build("cpu"), len(call.arguments["self"].shape) == 3
        a, e, wide = (x.narrow(int(by_columns), 0, int(offs[-1]) if len(offs) else 0) for x in (a, e, wide))
    if not _may_differ_beyond_infinity(call, a, e):
        if not torch.equal(a.isnan(), e.isnan()):
            return f"NaN at other places: {a.tolist()}, torch's {e.tolist()}"
        if not torch.equal(a.isinf(), e.isinf()) or not _equal_with_nan(a[a.isinf()], e[e.isinf()]):
            return f"infinities at other places: {a.tolist()}, torch's {e.tolist()}"
    dtype = e.dtype
    known = a.isfinite() & e.isfinite() & wide.isfinite()
    a, e, wide = (x[known].to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, e, wide))
    if not a.numel():
        return None
    eps = max(torch.finfo(d).eps for d in [*call.dtypes(), dtype] if d.is_floating_point or d.is_complex)
    # In another order a sum is about as many roundings away as the square root of its terms.
    roundings = 4 if eps > 1e-4 else max(32, max((math.prod(x.shape) for x in call.tensors()), default=0) ** 0.5)
    bound = roundings * eps * (1 + wide.abs().max()) + 2 * (e - wide).abs().max()
    if (call.arguments.get("eps") or 0) < 0:
        bound *= 2**10  # a norm's variance and a negative eps may cancel
    error = (a - wide).abs().max()
    return None if error <= bound else f"error {float(error):.3g} beyond {float(bound):.3g}"


def _equal_with_nan(a: torch.Tensor, e: torch.Tensor) -> bool:
    """Of complex numbers, an infinite part may stand beside NaN."""
    a, e = (torch.view_as_real(x) if x.is_complex() else x for x in (a, e))
    return torch.allclose(a, e, rtol=0.0, atol=0.0, equal_nan=True)


def _may_differ_beyond_infinity(call: Call, a: torch.Tensor, e: torch.Tensor) -> bool:
    """Where NaN and infinities are an accident of torch's formula, and other dtypes or devices of torch give others."""
    arguments = call.arguments
    infinite = any(x.special in (math.inf, -math.inf) for x in call.tensors())
    if call.packet.rstrip("_") in PRODUCTS:
        alpha, beta = arguments.get("alpha", 1), arguments.get("beta", 1)
        # 0 * NaN is NaN in float16 and bfloat16; BLAS does not read the matrices in float32 and float64.
        if alpha == 0 or not (math.isfinite(alpha) and math.isfinite(beta)):
            return True
    if call.packet.rstrip("_") in ("gelu", "_addmm_activation") and infinite:
        return True  # torch's vector code and the code for the vector's tail disagree
    if any(isinstance(arguments.get(n), float) and math.isnan(arguments[n]) for n in ("p", "ord")):
        return True
    if call.packet.endswith(("_attention", "_attention_for_cpu")):
        # A hidden key adds nothing here, whatever it holds, and a query that sees none gives 0. torch adds 0 * NaN.
        if any(x.special is not None and not math.isfinite(x.special) for x in call.tensors()):
            return True  # torch's flash kernel takes a maximum of NaN for "sees no key", and gives 0
        known = a.isfinite() | (a == -math.inf) if call.packet.endswith("_for_cpu") else a.isfinite()
        return bool((known | ~e.isfinite()).all())
    if call.packet == "convolution":  # torch multiplies infinity by zeros of its own padding, by backend
        return any(x.special is not None and not math.isfinite(x.special) for x in call.tensors())
    if call.packet.rstrip("_") in ("elu", "pow"):
        odd = any(isinstance(v, float) and not math.isfinite(v) for v in arguments.values())
        # By pow at -0 and -inf in float16 alone.
        return odd or (arguments.get("exponent") in (0.5, -0.5) and arguments["self"].dtype == torch.float16)
    if call.packet == "mean" and a.is_complex():  # torch multiplies by a complex 1 / n, of which inf makes NaN
        return infinite and torch.equal(a.isfinite(), e.isfinite())
    if call.packet in NORMS:  # torch's running mean turns inf into NaN, and the division by no degree of freedom into either
        return (infinite or "correction" in arguments) and torch.equal(a.isfinite(), e.isfinite())
    return False


def disagreements(many: list[Call], device: str) -> list[str]:
    """What the mode does differently from torch, in the mode, for each of the calls."""
    with stock_torch():
        expected = [expect(call, device) for call in many]
    found = []
    for call, e in zip(many, expected, strict=True):
        ran[call.overload.name()] += 1
        actual = outcome(call, device, e.likes)
        outcomes[_kind(call, e, actual)] += 1
        difference = disagreement(call, e, actual)
        if difference:
            found.append(f"{call.overload.name()}: {difference}\n    {call}")
    return found


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES, scope="module")
def device(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def the_mode():
    with batch_invariant_mode():
        yield


def settings_of(examples: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


def search(name: str, device: str, examples: int) -> None:
    """Raises an AssertionError with the smallest calls that torch and the mode answer differently."""

    @settings_of(examples)
    @given(st.lists(calls(name), min_size=CALLS_AT_ONCE, max_size=CALLS_AT_ONCE))
    def run(many):
        check(many, device)

    @settings_of(examples)
    @given(good_calls(name))
    def run_each_fault(call):
        check(with_each_fault(call), device)

    run()
    run_each_fault()


def check(many: list[Call], device: str) -> None:
    found = disagreements([call for call in many if not kills_torch(call, device)], device)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", NAMES)
def test_a_call_gives_torchs_result_or_torchs_error(name, device):
    search(name, device, EXAMPLES)


def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("product", "operands", "out_dtype", "error"),
    [
        (products.mm_dtype, (of(HALF), of(HALF, 3, 3)), SINGLE, IndexError),
        (products.mm_dtype, (of(HALF, 3), of(HALF, 3, 3)), SINGLE, RuntimeError),
        (products.mm_dtype, (of(HALF, 3, 3), of(HALF, 3)), SINGLE, IndexError),
        (products.mm_dtype, (of(HALF, 3, 3), of(HALF, 1, 3, 3)), SINGLE, RuntimeError),
        (products.mm_dtype, (of(HALF, 3, 3), of(HALF, 2, 3)), SINGLE, RuntimeError),
        (products.mm_dtype, (of(HALF, 3, 3), of(DOUBLE, 3, 3)), SINGLE, RuntimeError),
        (products.mm_dtype, (of(HALF, 3, 3), of(SINGLE, 3, 3)), SINGLE, RuntimeError),
        (products.mm_dtype, (of(HALF, 3, 3), of(HALF, 3, 3)), DOUBLE, RuntimeError),
        (products.addmm_dtype, (of(HALF), of(HALF), of(HALF, 3, 3)), SINGLE, RuntimeError),
        (products.addmm_dtype, (of(DOUBLE), of(HALF, 3, 3), of(HALF, 3, 3)), SINGLE, RuntimeError),
        (products.addmm_dtype, (of(HALF), of(HALF, 3, 3), of(torch.int64, 3, 3)), SINGLE, RuntimeError),
        (products.addmm_dtype, (of(HALF, 2), of(HALF, 3, 3), of(HALF, 3, 3)), SINGLE, RuntimeError),
        (products.bmm_dtype, (of(HALF, 3), of(HALF, 3, 3, 3)), SINGLE, IndexError),
        (products.bmm_dtype, (of(HALF, 3, 3), of(HALF, 3, 3, 3)), SINGLE, RuntimeError),
        (products.bmm_dtype, (of(HALF, 3, 3, 3), of(HALF, 3, 3)), SINGLE, IndexError),
        (products.bmm_dtype, (of(HALF, 3, 3, 3), of(DOUBLE, 3, 3, 3)), SINGLE, RuntimeError),
        (products.bmm_dtype, (of(HALF, 3, 3, 3), of(HALF, 3, 3, 3)), torch.int64, RuntimeError),
        (products.baddbmm_dtype, (of(HALF, 3), of(HALF, 3), of(HALF, 3, 3, 3)), SINGLE, IndexError),
        (products.baddbmm_dtype, (of(DOUBLE, 3), of(HALF, 3, 3, 3), of(HALF, 3, 3, 3)), SINGLE, RuntimeError),
        (products.baddbmm_dtype, (of(HALF, 3), of(HALF, 3, 3, 3), of(DOUBLE, 3, 3, 3)), SINGLE, RuntimeError),
    ],
)
def test_products_into_another_dtype_raise_the_errors_of_torchs_cuda_kernels(product, operands, out_dtype, error):
    """torch has these overloads on CUDA alone; what it checks needs no GPU."""
    with pytest.raises(error) as caught:
        product(*operands, out_dtype)
    assert caught.type is error


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_products_into_another_dtype_are_products_in_that_dtype(dtype):
    a, b = (torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(seed)).to(HALF) for seed in range(2))
    bias = of(dtype, 3)
    assert torch.equal(products.mm_dtype(a[0], b[0], SINGLE), a[0].float() @ b[0].float())
    assert torch.equal(products.addmm_dtype(bias, a[0], b[0], SINGLE), torch.addmm(bias.float(), a[0].float(), b[0].float()))
    assert torch.equal(products.bmm_dtype(a, b, SINGLE), a.float() @ b.float())
    expected = torch.baddbmm(bias.float(), a.float(), b.float())
    assert torch.equal(products.baddbmm_dtype(bias, a, b, SINGLE), expected)


# --- NaN and infinity stay in their row ------------------------------------------------------------------------------------

WIDTH = 40


def row_functions(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Functions of [rows, WIDTH] whose results have one entry a row."""

    def randn(*shape, seed):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)

    weight, bias, scale = randn(24, WIDTH, seed=1), randn(24, seed=2), randn(WIDTH, seed=3)
    experts = randn(2, WIDTH, 24, seed=4)

    def grouped(x):
        ends = torch.tensor([len(x) // 2, len(x)], dtype=torch.int32, device=device)
        return torch.nn.functional.grouped_mm(x.contiguous(), experts, offs=ends)

    def attention(x):
        q, k, v = x.unflatten(1, (1, 5, 8)), x.flip(1).unflatten(1, (1, 5, 8)), x.roll(3, 1).unflatten(1, (1, 5, 8))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def index_added(x):
        places = torch.arange(len(x), device=device).flip(0)
        return torch.index_add(x.flip(0), 0, places, x, alpha=2).flip(0)

    F, aten_ops = torch.nn.functional, torch.ops.aten
    functions = {
        "mm": lambda x: x @ weight.t(),
        "addmm": lambda x: torch.addmm(bias, x, weight.t(), beta=2, alpha=0.5),
        "_addmm_activation": lambda x: torch._addmm_activation(bias, x, weight.t(), use_gelu=True),
        "linear": lambda x: F.linear(x, weight, bias),
        "bmm": lambda x: torch.bmm(x[:, None], weight.t().expand(len(x), -1, -1)),
        "bmm with a shared left operand": lambda x: torch.bmm(weight.expand(len(x), -1, -1), x[:, :, None]),
        "baddbmm": lambda x: torch.baddbmm(bias.expand(len(x), 1, 24), x[:, None], weight.t().expand(len(x), -1, -1)),
        "mv": lambda x: torch.mv(x, scale),
        "addmv": lambda x: torch.addmv(bias[:1], x, scale),
        "_grouped_mm": grouped,
        "convolution": lambda x: F.conv1d(x[:, None], weight[:4, None, :3], bias[:4], padding=1),
        "sum": lambda x: x.sum(1),
        "mean": lambda x: x.mean(1),
        "var_mean": lambda x: torch.var_mean(x, 1),
        "std_mean": lambda x: torch.std_mean(x, 1),
        "logsumexp": lambda x: torch.logsumexp(x, 1),
        "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, 3, 1),
        "norm": lambda x: aten_ops.norm.ScalarOpt_dim(x, 2, [1]),
        "cumsum": lambda x: x.cumsum(1),
        "_softmax": lambda x: x.softmax(1),
        "_log_softmax": lambda x: x.log_softmax(1),
        "topk": lambda x: torch.topk(x, 5),
        "native_layer_norm": lambda x: F.layer_norm(x, (WIDTH,), scale, scale),
        "native_group_norm": lambda x: F.group_norm(x.unflatten(1, (8, 5)), 2),
        "rms_norm": lambda x: F.rms_norm(x, (WIDTH,), scale),
        "scaled_dot_product_attention": attention,
        "index_add": index_added,
        "scatter_add": lambda x: torch.scatter_add(x, 1, torch.arange(WIDTH, device=device).flip(0).expand(len(x), -1), x),
    }
    pointwise = {"softplus": F.softplus, "gelu": F.gelu, "mish": F.mish, "silu": F.silu, "elu": F.elu}
    for name in table.POINTWISE:
        functions[name] = pointwise.get(name) or getattr(torch, name.split(".")[0])
    functions["pow.Tensor_Scalar"] = lambda x: torch.pow(x, 1.7)
    return functions


def bits(result: Any) -> list[torch.Tensor]:
    tensors = result if isinstance(result, tuple) else (result,)
    of_size = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return [x.detach().contiguous().view(of_size[x.element_size()]) for x in tensors]


ROW_FUNCTIONS = tuple(row_functions("cpu", torch.float32))


@pytest.mark.parametrize("name", ROW_FUNCTIONS)
def test_nan_and_infinity_in_one_row_leave_the_bits_of_the_others(name, device):
    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(
        rows=st.integers(2, 70),
        seed=st.integers(0, 999),
        bad=st.sampled_from([math.nan, math.inf, -math.inf]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    )
    def search(rows, seed, bad, dtype):
        function = row_functions(device, dtype)[name]
        clean = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        dirty, row = clean.clone(), seed % rows
        dirty[row, seed % WIDTH :: 7] = bad
        others = torch.arange(rows, device=device) != row
        for a, e in zip(bits(function(dirty)), bits(function(clean)), strict=True):
            assert torch.equal(a[others], e[others])

    search()


def test_addmm_refuses_a_bias_that_beta_leaves_out_where_torch_does(device):
    """On the CPU it must have a shape that broadcasts. On CUDA torch does not look at it."""
    a, b = torch.randn(3, 4, device=device), torch.randn(4, 5, device=device)
    bias = torch.ones(2, 7, device=device)

    def outcomes_of(function, *arguments, **options):
        try:
            return function(*arguments, **options).shape
        except RuntimeError as error:
            return type(error)

    for function in (torch.addmm, torch._addmm_activation):
        for beta in (0, 1):
            with stock_torch():
                stock = outcomes_of(function, bias, a, b, beta=beta)
            assert outcomes_of(function, bias, a, b, beta=beta) == stock
    assert outcomes_of(torch.addbmm, bias, a[None], b[None], beta=0) is RuntimeError
    assert outcomes_of(torch.baddbmm, bias, a[None], b[None], beta=0) is RuntimeError


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bias_that_beta_leaves_out_is_not_read(bad, device):
    a, b = torch.randn(2, 3, 4, device=device), torch.randn(2, 4, 5, device=device)
    bias = torch.full((3, 5), bad, device=device)
    assert torch.equal(torch.addmm(bias, a[0], b[0], beta=0), a[0] @ b[0])
    assert torch.equal(torch.baddbmm(bias.expand(2, 3, 5), a, b, beta=0), a @ b)
    assert torch.addbmm(bias, a, b, beta=0).isfinite().all()
    assert torch.addmv(bias[0, :3], a[0], b[0, :, 0], beta=0).isfinite().all()


# --- compiled code -------------------------------------------------------------------------------------------------------


def many_operators(x, weight, bias):
    y = torch.addmm(bias, x, weight, beta=0)
    return (
        y, x.softmax(1), x.sum(0), x.mean(), x.cumsum(1), torch.var(x, 1), torch.topk(x, 2).values,
        torch.nn.functional.layer_norm(x, (x.shape[1],)), torch.nn.functional.silu(x), (x[:, :0] @ weight[:0]),
    )  # fmt: skip


def flat(result: Any) -> list[torch.Tensor]:
    return [y for x in result for y in (x if isinstance(x, tuple) else (x,))]


@pytest.mark.parametrize("rows", [3, 0])
def test_compiled_code_gives_torchs_result_for_odd_input(rows, device):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(device) for shape in ((rows, 7), (7, 5)))
    x[1:2, 2] = math.nan
    x[2:3, 4] = -math.inf
    bias = torch.full((5,), math.nan, device=device)
    eager = flat(many_operators(x, weight, bias))
    compiled = flat(torch.compile(many_operators)(x, weight, bias))
    with stock_torch():
        stock = flat(many_operators(x, weight, bias))
    for a, c, e in zip(eager, compiled, stock, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True, rtol=1e-5, atol=1e-5)
        assert torch.equal(bits(a)[0], bits(c)[0])


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x @ x, lambda x: x.sum(5), lambda x: x.sum((0, 0)), lambda x: x.softmax(-3), lambda x: torch.topk(x, 9),
        lambda x: torch.nn.functional.layer_norm(x, (4,)), lambda x: torch.nn.functional.linear(x, x.double()),
        lambda x: torch.bmm(x, x), lambda x: torch.addmm(x, x, x.t().to(torch.bfloat16)),
    ],
)  # fmt: skip
def test_compiled_code_raises_an_error_of_torchs_type(bad, device):
    def error_of():
        torch._dynamo.reset()
        with pytest.raises(Exception) as caught:  # noqa: B017
            torch.compile(bad)(torch.ones(3, 7, device=device))
        return caught.value

    in_the_mode = error_of()
    with stock_torch():
        stock = error_of()
    if isinstance(stock, BackendCompilerFailed):
        # By version and device, torch finds the fault while it compiles, and wraps the error. The mode's operators find it
        # when they run, and raise what they raise in eager code.
        stock = stock.inner_exception
    assert type(in_the_mode) is type(stock)


# --- more than 2^31 elements ---------------------------------------------------------------------------------------------

FAR = 2**31 + 256


@pytest.fixture(scope="module")
def far_apart(device):
    """Two rows, 2^31 + 256 elements apart. The memory between them (4 GiB) is never touched, so a CPU does not provide it."""
    memory = torch.empty(FAR + WIDTH, dtype=torch.bfloat16, device=device)
    rows = memory.as_strided((2, WIDTH), (FAR, 1))
    rows.copy_(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0)))
    return rows


@pytest.mark.parametrize("name", ROW_FUNCTIONS)
def test_rows_2_31_elements_apart_have_the_bits_of_neighbours(name, device, far_apart):
    function = row_functions(device, torch.bfloat16)[name]
    for a, e in zip(bits(function(far_apart)), bits(function(far_apart.contiguous())), strict=True):
        assert torch.equal(a, e)


def test_columns_2_31_elements_apart_have_the_bits_of_neighbours(device, far_apart):
    x, near = far_apart.t(), far_apart.t().contiguous()
    for function in (torch.mm, torch.Tensor.matmul):
        assert torch.equal(bits(function(near.t(), x))[0], bits(function(near.t(), near))[0])
    for function in (lambda y: y.sum(1), lambda y: y.softmax(1), lambda y: y.cumsum(1), lambda y: y.logsumexp(1)):
        assert torch.equal(bits(function(x))[0], bits(function(near))[0])


def test_a_sum_of_more_than_2_31_values(device):
    x = torch.ones((), device=device).expand(FAR)
    assert x.sum().item() == FAR and x.mean().item() == 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="input and result of 4 GiB each: too much for a CPU machine's 20 s")
@pytest.mark.parametrize("function", [lambda x: x.softmax(1), lambda x: x @ torch.eye(512).to(x), lambda x: x.cumsum(1)])
def test_the_last_of_more_than_2_31_elements(function):
    rows = FAR // 512 + 1
    x = torch.randn(rows // 1024 + 1, 512, device="cuda", dtype=torch.bfloat16).repeat(1024, 1)[-rows:]
    assert x.numel() > 2**31
    whole = function(x)
    assert torch.equal(bits(whole[-3:])[0], bits(function(x[-3:].clone()))[0])
