"""Whatever the arguments are, the mode never crashes, never gives a wrong value and never writes beside its destination.

Calls of every entry of the table are drawn as plain data and run in a child process, so that the parent can name the call
that ends it. Each runs under stock torch, under stock torch in float64, and in the mode, and must keep these promises:

1. Where torch gives a value, the mode gives the same: integers exactly, floats within some roundings of float64.
   For a good call it gives one, unless it refuses the call (`Refused`). For a bad one it may be stricter than torch.
2. Where torch raises, the mode raises (of any type), or gives a result for a reason of `EXTENSIONS`.
3. Only the destination of an ``out=`` or of an in-place call changes: each tensor lies in a larger buffer of guard values.
"""

import json
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch._ops import OpOverload

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.kernels import overloads, table
from pytest_batchinv.kernels.aten import products
from pytest_batchinv.kernels.aten.common import Refused
from pytest_batchinv.mode import stock_torch

EXAMPLES = 40  # calls of each entry
# Their tests are in tests/e2e/test_layers.py and tests/kernels/test_scaled.py: they take lists, running statistics, scales of
# certain shapes, or what torch's own kernel checks.
TESTED_AS_LAYERS = (
    "_scaled_mm",
    "_scaled_grouped_mm",
    "batch_norm",
    "_embedding_bag",
    "_fft",
    "linalg_multi_dot",
    "chain_matmul",
    "cross",
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
    "addr",
    "_weight",
)
NAMES = tuple(
    name for name in (*table.BACKEND_KERNELS, *table.COMPOSITES, *table.POINTWISE) if not name.startswith(TESTED_AS_LAYERS)
)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)
ANY_DTYPE = (*FLOATS, *COMPLEX, torch.int64, torch.int32, torch.uint8, torch.bool)
GUARD = 64  # elements before and after each tensor
# "overlapping" and "expanded" (a stride of 0) hold one element at several places.
LAYOUTS = ("contiguous", "transposed", "strided", "shifted", "expanded", "overlapping")

# --- good calls -----------------------------------------------------------------------------------------------------------

# The tensors of an entry: a letter is a size, "1" is one, "?" may be None. Several forms are divided by "|". Tensors that are
# not named have one shape, whatever it is.
TENSORS = {
    "mm": "self:mk mat2:kn",
    "addmm": "self:mn mat1:mk mat2:kn|self:n mat1:mk mat2:kn",
    "bmm": "self:bmk mat2:bkn",
    "baddbmm": "self:bmn batch1:bmk batch2:bkn",
    "addbmm": "self:mn batch1:bmk batch2:bkn",
    "mv": "self:mk vec:k",
    "addmv": "self:m mat:mk vec:k",
    "dot": "self:k tensor:k",
    "vdot": "self:k other:k",
    "_grouped_mm": "self:tK mat2:gKN offs:g|self:gKN mat2:gNK",
    "convolution": "input:bcl weight:oct bias?:o",
    "layer_norm": "input:xyz weight?:z bias?:z|input:z weight?:z bias?:z",
    "rms_norm": "input:xyz weight?:z|input:z weight?:z",
    "native_group_norm": "input:bcl weight?:c bias?:c",
    "native_layer_norm_backward": "grad_out:xyz input:xyz mean:xy1 rstd:xy1 weight?:z bias?:z",
    "_fused_rms_norm_backward": "grad_out:xyz input:xyz rstd:xy1 weight?:z",
    "native_group_norm_backward": "grad_out:bcl input:bcl mean:b1 rstd:b1 weight?:c",
    "_scaled_dot_product_flash_attention_for_cpu": "query:bhsd key:bhkd value:bhkd attn_mask?:bhsk",
    "_scaled_dot_product_efficient_attention": "query:bhsd key:bhkd value:bhkd attn_bias?:bhsk",
    "scaled_dot_product_attention": "query:bhsd key:bhkd value:bhkv attn_mask?:sk",
    "index_add": "self:mn index:i source:in|self:mn index:i source:mi",
    "scatter_add": "self:mn index:mn src:mn|self:m index:i src:i",
    "scatter_reduce": "self:mn index:mn src:mn|self:m index:i src:i",
    "scatter": "self:mn index:mn src:mn|self:m index:i src:i",
    "index_reduce": "self:mn index:i source:in|self:mn index:i source:mi",
    "cdist": "x1:pm x2:rm|x1:bpm x2:bpm",
    "linear": "input:bmk weight:nk bias?:n|input:mk weight:nk bias?:n|input:k weight:k",
}
SAME = {
    "_addmm_activation": "addmm",
    "native_layer_norm": "layer_norm",
    "_fused_rms_norm": "rms_norm",
    "_cdist_forward": "cdist",
}

sizes = st.sampled_from([3, 1, 2, 5, 0, 4, 17])
scalars = st.sampled_from([1, 0, 0.5, -2, 2.5, True, 0.0])
flags = st.booleans()
orders = st.sampled_from([2, 1, 0, 3, 0.5, math.inf, -math.inf])
# The other arguments by name: a strategy, or a function of the sizes by letter.
OTHERS = {
    **dict.fromkeys(("alpha", "beta", "input_scale", "elu.scale"), scalars),
    **dict.fromkeys(("keepdim", "largest", "sorted", "use_gelu", "compute_log_sumexp"), flags),
    "half_to_float": st.just(False),
    "dtype": st.sampled_from([None, *FLOATS]),
    "norm.dtype": st.sampled_from(FLOATS),
    "out_dtype": st.sampled_from([torch.float32]),
    "_grouped_mm.out_dtype": st.none(),
    "correction": st.sampled_from([None, 0, 1, 0.5]),
    "ord": orders,
    "scatter_reduce.reduce": st.sampled_from(["sum", "prod", "mean", "amax", "amin"]),
    "index_reduce.reduce": st.sampled_from(["prod", "mean", "amax", "amin"]),
    "scatter.reduce": st.sampled_from(["add", "multiply"]),
    "include_self": flags,
    "value": scalars,
    "p": orders,
    "eps": st.sampled_from([1e-5, 1e-3]),
    "exponent": st.sampled_from([2, 3, 0, 0.5, -0.5, -1, 1.7]),
    "softplus.beta": st.sampled_from([1, 2.5]),
    "threshold": st.sampled_from([20, 1]),
    "approximate": st.sampled_from(["none", "tanh"]),
    "scale": st.sampled_from([None, 0.5]),
    "dropout_p": st.just(0.0),
    "is_causal": st.just(False),
    "enable_gqa": st.just(False),
    "stride": st.sampled_from([[1], [2]]),
    "padding": st.sampled_from([[0], [2]]),
    "dilation": st.sampled_from([[1], [2]]),
    "transposed": st.just(False),
    "output_padding": st.just([0]),
    "groups": st.just(1),
    "group": st.just(1),
    "normalized_shape": lambda size: [size["z"]],
    "N": lambda size: size["b"],
    "C": lambda size: size["c"],
    "HxW": lambda size: size["l"],
    "output_mask": st.lists(flags, min_size=3, max_size=3),
    "_fused_rms_norm_backward.output_mask": st.lists(flags, min_size=2, max_size=2),
}


@dataclass(frozen=True)
class Spec:
    """A tensor as data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"
    seed: int = 0
    special: float | None = None
    high: int | None = None  # integers from 0 to high - 1; else from -3 to 3
    ends: bool = False  # ascending, and the last is high
    device: str = ""

    def __repr__(self) -> str:
        named = {"seed": self.seed, "special": self.special, "high": self.high, "ends": self.ends, "device": self.device}
        rest = "".join(f", {name}={value}" for name, value in named.items() if value)
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)} {self.layout}{rest}"

    def build(self, device: str, wide: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffer, and the tensor in it."""
        values = _wide(self._values()) if wide else self._values()
        return embedded(values.to(self.device or device), self.layout)

    def _values(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
            if self.special is not None and x.numel():
                x.view(-1)[self.seed % x.numel()] = self.special
            return x.to(self.dtype)
        low, high = (-3, 4) if self.high is None else (0, max(self.high, 1))
        x = torch.randint(low, high, self.shape, generator=generator)
        if self.ends and self.high is not None and x.dim() and x.numel():
            x = x.sort(-1).values
            x[..., -1] = self.high
        return x.to(self.dtype)


def embedded(values: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of guard values, and the values in it as a view with the strides of the layout."""
    shape = list(values.shape)
    strides = list(torch.empty(shape, device="meta").stride())
    if layout == "transposed":
        strides = list(torch.empty(shape[::-1], device="meta").stride())[::-1]
    elif layout == "strided":
        strides = [2 * stride for stride in strides]
    elif layout == "expanded" and shape:
        strides[0] = 0
    elif layout == "overlapping":
        strides = [1] * len(shape)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
    guard = math.nan if values.is_floating_point() or values.is_complex() else 1
    buffer = torch.full((extent + 2 * GUARD + 1,), guard, dtype=values.dtype, device=values.device)
    view = buffer.as_strided(shape, strides, GUARD + (layout == "shifted"))
    if layout in ("expanded", "overlapping"):
        buffer[GUARD : GUARD + extent] = values.reshape(-1)[:extent]
    else:
        view.copy_(values)
    return buffer, view


def _wide(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return torch.float64 if x.is_floating_point else x
    return x.double() if x.is_floating_point() else x.to(torch.complex128) if x.is_complex() else x


@dataclass(frozen=True)
class Out:
    """An ``out=``: of the result's shape or empty, of the result's dtype unless given, or an input's own memory."""

    fits: bool = True
    dtype: torch.dtype | None = None
    layout: str = "contiguous"
    aliases: bool = False


@dataclass(frozen=True)
class Call:
    overload: OpOverload
    functional: OpOverload
    arguments: dict[str, Any] = field(hash=False)
    outs: tuple[Out, ...] = ()
    is_good: bool = True

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}=<{value}>" for name, value in self.arguments.items())
        return f"{self.overload.name()}({arguments}){' into ' if self.outs else ''}{', '.join(map(str, self.outs))}"

    @property
    def name(self) -> str:
        return self.overload._schema.name.removeprefix("aten::").rstrip("_")

    @property
    def is_in_place(self) -> bool:
        return self.overload is not self.functional and not self.outs

    def specs(self) -> list[Spec]:
        return [value for value in self.arguments.values() if isinstance(value, Spec)]


@st.composite
def good_calls(draw, name: str) -> Call:
    """Of the functional overload, or of its ``.out`` or in-place sibling."""
    functional, packet = overloads.overload_of(name), name.split(".")[0]
    siblings = overloads.siblings(functional) if name not in table.COMPOSITES else ()
    sibling = draw(st.sampled_from([None, None, *siblings]))
    form = draw(st.sampled_from(TENSORS.get(SAME.get(packet, packet), "").split("|")))
    shapes = dict(part.split(":") for part in form.split())
    size = {c: 1 if c == "1" else draw(sizes) * (8 if c.isupper() else 1) for c in sorted({*"".join(shapes.values())})}
    any_shape = tuple(draw(st.lists(sizes, max_size=4)))
    dtypes = (*FLOATS, *(COMPLEX if packet in table.COMPLEX else ()))
    if name.endswith(".dtype") or packet == "_grouped_mm":
        dtypes = (torch.bfloat16, torch.float16)
    dtype, arguments = draw(st.sampled_from(dtypes)), {}
    for a in functional._schema.arguments:
        if "Tensor" in str(a.type):
            letters = shapes.get(a.name, shapes.get(f"{a.name}?"))
            absent = letters is None and "Optional" in str(a.type) or f"{a.name}?" in shapes and draw(flags)
            shape = any_shape if letters is None else tuple(size[c] for c in letters)
            arguments[a.name] = None if absent else draw(good_tensors(a.name, shape, dtype, packet, arguments))
        elif a.name == "dim":
            rank = len(next(iter(arguments.values())).shape) or 1
            dims = range(-rank, rank)
            which = [0] if form.endswith("source:in") else [1] if form.endswith("source:mi") else dims
            many = st.lists(st.sampled_from(which[: len(dims) // 2]), max_size=2, unique=True)
            arguments["dim"] = draw(many if "List" in str(a.type) else st.sampled_from(which))
        elif a.name == "input_dtype":
            arguments["input_dtype"] = dtype
        elif a.name == "k":
            arguments["k"] = draw(st.integers(0, min(any_shape, default=1)))
        else:
            other = OTHERS.get(f"{packet}.{a.name}", OTHERS.get(a.name))
            if other is not None:  # else the schema's default
                arguments[a.name] = draw(other) if isinstance(other, st.SearchStrategy) else other(size)
    outs = tuple(Out(layout=draw(st.sampled_from(LAYOUTS[:4]))) for _ in sibling.out_names) if sibling else ()
    is_good = all(spec.high != 0 or 0 in spec.shape for spec in arguments.values() if isinstance(spec, Spec))
    is_good &= sibling is None or bool(outs) or arguments["self"].layout in LAYOUTS[:4]  # in place, but one place for many
    is_good &= packet != "convolution" or 0 not in size.values()  # torch and the mode refuse some of these
    return Call(sibling.overload if sibling else functional, functional, arguments, outs, is_good=is_good)


@st.composite
def good_tensors(draw, name: str, shape: tuple[int, ...], dtype: torch.dtype, packet: str, before: dict[str, Any]) -> Spec:
    spec = Spec(shape, dtype, draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 999)))
    if name == "offs":
        return replace(spec, dtype=torch.int32, layout="contiguous", high=before["self"].shape[0], ends=True)
    if name == "index":
        high = (*before["self"].shape, 1)[before["dim"]] if before["self"].shape else 1
        return replace(spec, dtype=torch.int64, high=high)
    if name == "attn_mask" and packet == "scaled_dot_product_attention" and draw(flags):
        return replace(spec, dtype=torch.bool, high=2)
    if packet == "_grouped_mm":  # takes operands whose lines begin at multiples of 16 bytes
        return replace(spec, layout="contiguous")
    if name == "self" and packet == "topk" and draw(flags):
        return replace(spec, dtype=torch.int64)
    return replace(spec, special=draw(st.sampled_from([None, None, None, math.nan, math.inf, -math.inf])))


# --- bad calls: good ones with one or two arguments changed ---------------------------------------------------------------


@st.composite
def changed_tensors(draw, spec: Spec) -> Spec:
    kinds = ["range"] * 6 * (spec.high is not None) + ["dtype", "shape", "empty", "size", "more", "less", "meta"]
    kind, shape = draw(st.sampled_from(kinds)), spec.shape
    at = draw(st.integers(0, max(0, len(shape) - 1)))
    if kind == "dtype":
        return replace(spec, dtype=draw(st.sampled_from(ANY_DTYPE)))
    if kind == "meta":
        return replace(spec, device="meta")
    if kind == "range":
        return replace(spec, high=draw(st.sampled_from([None, 40, 2**31 - 1])), ends=draw(flags))
    one_shape = {
        "empty": (*shape[:at], 0, *shape[at + 1 :]),
        "size": (*shape[:at], draw(sizes), *shape[at + 1 :]),
        "more": (*shape[:at], 1, *shape[at:]),
        "less": (*shape[:at], *shape[at + 1 :]),
    }
    return replace(spec, shape=one_shape.get(kind) or tuple(draw(st.lists(sizes, max_size=4))))


@st.composite
def changed(draw, value: Any, schema_type: str) -> Any:
    if isinstance(value, Spec):
        return draw(changed_tensors(value))
    if "Tensor" in schema_type:
        return Spec(tuple(draw(st.lists(sizes, max_size=3))), draw(st.sampled_from(ANY_DTYPE)))
    if "List[int]" in schema_type:
        return draw(st.lists(st.integers(-5, 5), max_size=4))
    if isinstance(value, torch.dtype) or "Optional[int]" in schema_type:  # schemas show a dtype as an integer
        return draw(st.sampled_from(ANY_DTYPE))
    kinds = {"bool": flags, "str": st.sampled_from(["tanh", "no such form"]), "int": st.integers(-6, 6)}
    return draw(kinds.get(schema_type, st.sampled_from([0, -1, 2.5, True, math.nan, math.inf, 1j])))


@st.composite
def calls(draw, name: str) -> Call:
    call = draw(good_calls(name))
    if draw(flags):
        return call
    arguments, types = dict(call.arguments), {a.name: str(a.type) for a in call.functional._schema.arguments}
    for argument in draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2)):
        arguments[argument] = draw(changed(arguments[argument], types[argument]))
    outs = call.outs
    if outs and draw(flags):
        dtype, layout = draw(st.sampled_from([None, *ANY_DTYPE])), draw(st.sampled_from(LAYOUTS))
        outs = tuple(Out(draw(flags), dtype, layout, draw(st.integers(0, 4)) == 4) for _ in outs)
    return replace(call, arguments=arguments, outs=outs, is_good=False)


def ends_torch(call: Call, device: str) -> bool:
    """Whether torch itself crashes, reads memory that is not its own, or loses the GPU: such calls run in the mode alone."""
    if call.name == "_scaled_dot_product_flash_attention_for_cpu":  # divides by sizes, reads key and value as if they fitted
        q, k, v = (call.arguments[name].shape for name in ("query", "key", "value"))
        fits = len(q) == 4 and k == v and k[:2] == q[:2] and k[3:] == q[3:]
        return not fits or any(0 in spec.shape for spec in call.specs())
    if device == "cuda" and "attention" in call.name:  # loads 16 bytes from wherever a tensor begins
        return not call.is_good or any(spec.layout == "shifted" for spec in call.specs())
    return device == "cuda" and call.name == "_grouped_mm" and not call.is_good


def ends_the_gpu(call: Call, device: str) -> bool:
    """Whether an index may be out of range: this fails an assertion of the GPU, and nothing runs on it afterwards."""
    return device == "cuda" and not call.is_good and "index" in call.arguments


# --- what a call gives ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The results of a call, or its error; and what it wrote where it must not."""

    results: tuple[Any, ...] = ()
    error: Exception | None = None
    corrupted: str = ""


def run(call: Call, device: str, likes: tuple[torch.Tensor, ...] | None, wide: bool = False) -> Outcome:
    """likes: the results of the functional overload, by which an ``out=`` is made. None runs the functional overload."""
    overload, written = call.functional if likes is None else call.overload, set()
    memory, built = {}, {}
    for name, value in call.arguments.items():
        if isinstance(value, Spec):
            memory[name] = value.build(device, wide)
            built[name] = memory[name][1]
        else:
            built[name] = _wide(value) if wide and isinstance(value, torch.dtype) else value
    if likes is not None and call.is_in_place:
        written.add("self")
    elif likes is not None and call.outs:
        names = [a.name for a in overload._schema.arguments if a.is_out]
        for name, out, like in zip(names, call.outs, [*likes, *[None] * len(names)], strict=False):
            memory[name] = _out(out, torch.empty(0) if like is None else like, memory)
            built[name] = memory[name][1]
            written.add(name)
    before = {name: (buffer.clone(), _places(buffer, view)) for name, (buffer, view) in memory.items()}
    shapes = {name: view.shape for name, (_, view) in memory.items()}
    aliased = {buffer.data_ptr() for name, (buffer, _) in memory.items() if name in written}
    positional = [built.pop(a.name) for a in overload._schema.arguments if a.name in built and not a.kwarg_only]
    outcome = Outcome()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = overload(*positional, **built)
        outcome.results = result if isinstance(result, tuple) else (result,)
    except Exception as error:
        outcome.error = error
    if device == "cuda":
        torch.cuda.synchronize()  # where the GPU is lost, the process ends, and the parent names the call
    for name, (buffer, view) in memory.items():
        if buffer.device.type == "meta" or view.shape != shapes[name]:
            continue  # a destination that had to grow
        old, places = before[name]
        if name in written:
            buffer, old = buffer.clone(), old.clone()
            buffer[places] = old[places] = 0
        elif buffer.data_ptr() in aliased:
            continue
        if not torch.equal(buffer.view(torch.uint8), old.view(torch.uint8)):
            outcome.corrupted = f"memory of or beside `{name}` has changed"
    return outcome


def _out(out: Out, like: torch.Tensor, memory: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple:
    if out.aliases:
        buffer, view = next(iter(memory.values()))
        if buffer.device == like.device and view.dtype == like.dtype and buffer.numel() > like.numel() + GUARD:
            return buffer, buffer[GUARD - 1 :][: like.numel()].view(like.shape)
    values = torch.zeros(like.shape if out.fits else (0,), dtype=out.dtype or like.dtype, device=like.device)
    return embedded(values, out.layout)


def _places(buffer: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    index = torch.arange(buffer.numel(), device=buffer.device)
    return index.as_strided(view.shape, view.stride(), view.storage_offset()).reshape(-1)


# --- the comparison -------------------------------------------------------------------------------------------------------

# Where torch raises and the mode gives a result: the entry, what torch's message says, the reason.
EXTENSIONS = [
    ("logsumexp", "doesn't match the broadcast shape", "no dims mean all dims, as for the other sums"),
    ("mean", "can't be cast to the desired output type", "a real dtype= takes the real part of complex numbers"),
    ("mean", "could not infer output dtype", "the dtype of an out= is that of the sum, as in torch with dims"),
    ("linear", "must match the existing size", "a bias broadcasts to the result, whatever the rank and strides of input"),
    ("norm", "Expected out tensor to have dtype", "dtype= may be complex, and gives the real dtype of its parts"),
    ("cdist", "not implemented for", "distances of 16 bits, as of any float"),
    ("native_layer_norm_backward", "does not have a device", "a gradient may be asked of a weight that is not given"),
    ("native_group_norm_backward", "does not have a device", "a gradient may be asked of a weight that is not given"),
    ("convolution", "not implemented for 'Complex", "complex numbers do not depend on the strides"),
]


def _leaves_rows(call: "Call") -> bool:
    return call.name == "_grouped_mm" and (not call.is_good or call.arguments["mat2"].shape[0] == 0)


def _reads_beside(call: "Call") -> bool:
    names = {"_scaled_dot_product_flash_attention_for_cpu": ("query", "key", "value"), "native_group_norm": ("weight", "bias")}
    specs = [call.arguments[name] for name in names.get(call.name, ())]
    return any(spec is not None and spec.layout not in ("contiguous", "shifted") for spec in specs)


# Where torch's value depends on the dtype, the strides or the device, is memory that it never wrote, or has another shape.
QUIRKS: list[tuple[str, Callable[["Call"], bool]]] = [
    ("whether a factor of 0 is multiplied by NaN", lambda call: _has_special(call) and call.arguments.get("alpha") == 0),
    ("what an infinite factor makes of nothing", lambda call: not math.isfinite(abs(call.arguments.get("alpha", 1)))),
    ("rows after the last group, which torch leaves as they were", _leaves_rows),
    ("one bias for no rows", lambda call: call.name == "addmv" and 0 in call.arguments["mat"].shape),
    ("the statistics of no values", lambda call: "_norm" in call.name and any(0 in spec.shape for spec in call.specs())),
    ("what strided operands hold, which these read as if they were contiguous", _reads_beside),
    ("what a query sees that has a NaN score", lambda call: "attention" in call.name and _has_special(call)),
    ("the root of a variance with an eps that is not positive", lambda call: not (call.arguments.get("eps", 1) or 1) > 0),
    ("whether the largest of distances is NaN", lambda call: call.name in ("cdist", "_cdist_forward") and _has_special(call)),
    ("norms of the order NaN", lambda call: any(call.arguments.get(n) != call.arguments.get(n) for n in ("p", "ord"))),
]


def fault_of(call: Call, stock: Outcome, wide: Outcome, actual: Outcome) -> str | None:
    """The promise that the mode broke, or None."""
    if actual.corrupted:
        return actual.corrupted
    if actual.error is not None:
        is_allowed = stock.error is not None or not call.is_good or isinstance(actual.error, Refused)
        return None if is_allowed else f"the mode raises {actual.error!r}, and torch gives a value"
    if any(spec.device for spec in call.specs()):
        return None  # beside a tensor without storage torch reads anything
    if stock.error is not None:
        return None if _is_extension(call, stock.error) else f"torch raises {stock.error!r}, and the mode gives a value"
    written = call.outs or ([call.arguments["self"]] if call.is_in_place else [])
    if any(x.layout in LAYOUTS[4:] or x in call.outs and x.aliases for x in written):
        return None  # torch computes while it overwrites its own input, or writes several values to one place
    if call.name == "topk":
        actual, stock, wide = (_without_ties(call, outcome) for outcome in (actual, stock, wide))
    if any(applies(call) for _, applies in QUIRKS):
        return None
    for i, (a, e) in enumerate(zip(actual.results, stock.results, strict=True)):
        if not isinstance(e, torch.Tensor):
            continue
        if (a.dtype, a.shape, a.device) != (e.dtype, e.shape, e.device):
            return f"result {i} is {a.dtype} {list(a.shape)} on {a.device}, torch's {e.dtype} {list(e.shape)} on {e.device}"
        exact = wide.results[i] if i < len(wide.results) else e
        difference = _difference(call, a, e, exact) if e.numel() else None
        if difference:
            return f"result {i}: {difference}"
    return None


def _is_extension(call: Call, error: Exception) -> bool:
    return any(call.name == name and text in str(error) for name, text, _ in EXTENSIONS)


def _difference(call: Call, a: torch.Tensor, e: torch.Tensor, exact: torch.Tensor) -> str | None:
    """Integers must be equal. A float may be as far from the float64 result as torch's, and some roundings more.

    In another order a sum is about as many roundings away as the square root of its terms. NaN and infinity must be where
    torch has them, unless an argument is not finite: then values are compared where torch's are finite.
    """
    if not (e.is_floating_point() or e.is_complex()):
        return None if torch.equal(a, e) else f"{a.tolist()}, torch's {e.tolist()}"
    exact = exact if exact.shape == e.shape else e
    a, e, exact = (x.to(torch.complex128 if e.is_complex() else torch.float64) for x in (a, e, exact))
    known = e.isfinite() & exact.isfinite()
    if not torch.equal(a.isfinite(), e.isfinite()) and not (known & ~a.isfinite()).any() and not _has_special(call):
        return f"NaN or infinity where torch has none, or none where torch has: {(a - e).isnan().nonzero().tolist()[:3]}"
    if not known.any():
        return None
    dtypes = [x.dtype for x in (*call.specs(), *call.outs) if x.dtype is not None] + list(call.arguments.values())
    dtypes = [d for d in dtypes if isinstance(d, torch.dtype) and (d.is_floating_point or d.is_complex)]
    eps = max([torch.finfo(d).eps for d in dtypes], default=torch.finfo(torch.float32).eps)
    terms = max(math.prod(spec.shape) for spec in call.specs())
    roundings = 4 if eps > 1e-4 else max(32, terms**0.5)
    bound = roundings * eps * (1 + exact[known].abs().max()) + 2 * (e - exact)[known].abs().max()
    if "_norm" in call.name and "eps" in call.arguments:
        bound /= min(call.arguments["eps"] or 1, 1) ** 0.5  # a rounding of the mean is divided by at least this
    error = (a - exact)[known].abs().max()
    return None if error <= bound else f"error {float(error):.3g}, beyond {float(bound):.3g}"


def _without_ties(call: Call, outcome: Outcome) -> Outcome:
    """topk's values, and what its indices pick: which of equal values torch picks, and in which order, is left to it."""
    if not outcome.results:
        return outcome
    (values, indices), dim = outcome.results, call.arguments["dim"]
    x = call.arguments["self"].build(values.device.type)[1]
    return Outcome(tuple(v.to(x.dtype).sort(dim).values for v in (values, x.gather(dim, indices.long()))))


def _has_special(call: Call) -> bool:
    values = [spec.special for spec in call.specs()] + list(call.arguments.values())
    return any(isinstance(value, float) and not math.isfinite(value) for value in values)


# --- the child process ----------------------------------------------------------------------------------------------------


def search(name: str, device: str, examples: int, tell: Callable[[str], None]) -> tuple[Counter[str], list[str]]:
    """The number of calls by outcome, and the calls that break a promise. Leaving the mode costs 50 ms: once is enough."""
    drawn: list[Call] = []
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

    @seed(0)
    @settings(max_examples=examples, phases=[Phase.generate], **options)
    @given(calls(name))
    def draw(call: Call) -> None:
        if not ends_the_gpu(call, device):
            drawn.append(call)

    draw()
    counts: Counter[str] = Counter()
    expected, faults = [], []
    with stock_torch():
        for call in drawn:
            tell(f"under stock torch: {call}")
            expected.append(None if ends_torch(call, device) else _stock_outcomes(call, device))
    for call, outcomes in zip(drawn, expected, strict=True):
        tell(f"in the mode: {call}")
        functional, stock, wide = outcomes or (Outcome(),) * 3
        actual = run(call, device, None if call.overload is call.functional else functional.results)
        counts[_kind(stock, actual)] += 1
        fault = fault_of(call, stock, wide, actual) if outcomes else actual.corrupted
        if fault:
            faults.append(f"{fault}\n    {call}")
    return counts, faults


def _kind(stock: Outcome, actual: Outcome) -> str:
    if actual.error is None:
        return "value"
    return "refused" if isinstance(actual.error, Refused) else "error" if stock.error else "stricter than torch"


def _stock_outcomes(call: Call, device: str) -> tuple[Outcome, Outcome, Outcome]:
    functional = run(call, device, None)
    stock = functional if call.overload is call.functional else run(call, device, functional.results)
    return functional, stock, run(call, device, None, wide=True)


class Child:
    """A process that searches one entry after the other. It is started again where a call ended it."""

    def __init__(self, device: str, examples: int = EXAMPLES) -> None:
        self._command = [sys.executable, "-P", __file__, device, str(examples)]
        self._process: subprocess.Popen[str] | None = None

    def search(self, name: str) -> tuple[Counter[str], list[str]]:
        if self._process is None:
            options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process = subprocess.Popen(self._command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
        print(name, file=self._process.stdin, flush=True)
        last = "before its first call"
        for line in self._process.stdout:
            kind, told = json.loads(line)
            if kind == "found":
                return Counter(told[0]), told[1]
            last = told
        code, self._process = self._process.wait(), None
        return Counter(), [f"the process ended with exit code {code}, {last}"]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def _serve(device: str, examples: int) -> None:
    def tell(kind: str, told: Any) -> None:
        print(json.dumps([kind, told]), flush=True)

    with batch_invariant_mode():
        for line in sys.stdin:
            tell("found", search(line.strip(), device, examples, lambda call: tell("call", call)))


@pytest.fixture(params=DEVICES, scope="module")
def child(request):
    process = Child(request.param)
    yield process
    process.close()


@pytest.mark.parametrize("name", NAMES)
def test_no_call_crashes_corrupts_memory_or_gives_a_wrong_value(name, child):
    if overloads.overload_of(name) is None:
        pytest.skip("this torch has no such overload")
    counts, faults = child.search(name)
    assert not faults, "\n".join(faults)
    assert counts["value"] or set(counts) == {"error"}  # as some have no kernel of torch on this device


def test_grouped_products_refuse_operands_on_two_devices(monkeypatch):
    """A CUDA kernel would read the address of a CPU tensor."""
    monkeypatch.setattr(products, "kernel_set", lambda x: pytest.fail("the operands reached the kernels"))
    a, b, offs = torch.ones(8, 16), torch.ones(2, 16, 16), torch.tensor([3, 8], dtype=torch.int32)
    for operands in ((a, b.to("meta"), offs), (a.to("meta"), b, offs.to("meta")), (a, b, offs.to("meta"))):
        with pytest.raises(RuntimeError, match="on one device|int32 vector on"):
            products.grouped_mm(*operands)


SCATTER_ON_THE_GPU = """
import pytest, torch
from triton.runtime import interpreter
from pytest_batchinv.kernels import cuda
from pytest_batchinv.kernels.aten import scatter

scatter._checked = lambda index, size, error: index  # as on CUDA, where the check would wait for the GPU
scatter.kernel_set = lambda x: cuda
x = torch.arange(24.0).view(2, 3, 4)
for dim in (0, 1, 2, -1):
    for bad in (-1, x.shape[dim], 2**40):
        index = torch.zeros(2, 3, 4, dtype=torch.int64)
        index[1, 2, 3] = bad
        good = torch.ones(2, 3, 4)
        good[1, 2, 3] = 0
        calls = [lambda: scatter.scatter_add(x, dim, index, torch.ones(2, 3, 4))]
        wanted = [x.scatter_add(dim, index.clamp(0, 0), good)]
        few = torch.tensor([0, bad])
        source = torch.ones_like(x.narrow(dim, 0, 2))
        calls.append(lambda: scatter.index_add(x, dim, few, source))
        wanted.append(x.index_add(dim, few[:1], source.narrow(dim, 0, 1)))
        for call, want in zip(calls, wanted):
            interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=False)
            assert torch.equal(call(), want), (dim, bad)
            interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)  # a launch's option on a GPU
            with pytest.raises(Exception, match="an index is out of range"):
                call()
"""


def test_an_index_out_of_range_fails_an_assertion_of_the_gpu_and_reaches_no_other_row():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-P", "-c", SCATTER_ON_THE_GPU], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
