"""The subject for causal language models of transformers: presets, local checkpoints and models of the hub."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from pytest_batchinv import gpu
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.base import NotRun, Observer, RowOutputs, Space, Span, SubjectInfo, observed
from pytest_batchinv.subjects.compiled import CUDA_GRAPHS, compiled, compiling, origin_of
from pytest_batchinv.subjects.gradients import GradientsOfModel, trained
from pytest_batchinv.subjects.presets import UnknownModel, is_preset
from pytest_batchinv.subjects.transformers import attention, masks
from pytest_batchinv.subjects.transformers.layout import BatchLayout, lay_out, padded, row_slots
from pytest_batchinv.subjects.transformers.masks import Windows
from pytest_batchinv.subjects.transformers.weights import build_preset

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Longest row, tokens of a padded batch, bytes of its logprobs.
_BOUNDS = {"cpu": (300, 2048, 2 << 30), "cuda": (1024, 16384, 6 << 30)}
_PALETTE_LENGTHS = (1, 13, 5, 16, 17, 31, 33, 2, 7, 64, 65, 100, 128, 200, 257, 300, 3, 8, 15, 32, 48, 9, 27, 63)
# One token comes first: torch.compile makes a graph for sizes of 1 in any case, and its first one is for the first sizes alone.
_PALETTE_CONTENTS = ("random", "random", "extreme", "random", "repeated")
_PROBE_LENGTH, _PROBE_PADDING = 24, 16
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class TransformersSubject:
    """A causal language model under one attention implementation and one compile mode.

    model: a preset, a local path or a hub id. attn: "auto" takes "batch_invariant" where it covers the model, else
    "eager". Raises UnknownModel, or ValueError with what is allowed.
    """

    def __init__(self, model: str, *, device: str, dtype: str, attn: str = "auto", compile_mode: str = "eager") -> None:
        _require(dtype in DTYPES, f"there is no dtype {dtype!r}; use one of {', '.join(DTYPES)}")
        _require_device(device)
        if device.startswith("cuda"):
            gpu.take_share()
        attention.register()
        self.model = _load(model, device, DTYPES[dtype])
        attn = _choose_attention(self.model, device, dtype, attn)
        self.info = SubjectInfo(model, "transformers", device, dtype, attn)
        self.model.set_attn_implementation(attn)
        if dtype == "fp64" and self.model._can_set_experts_implementation():
            self.model.set_experts_implementation("eager")  # grouped_mm, the default, has no fp64

        config = self.model.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        self.outlier = self.vocabulary - 1 if is_preset(model) else _outlier_token(self.model)
        self._takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self._origin = origin_of(self.model)
        self._forward = _Logprobs(self.model)
        self._run: Callable[..., Tensor] = self._forward
        length, tokens = _bounds(config, device, graphs=False)
        self._windows = self._probe(None if _is_flash(attn) else masks.windows_of(config), length)
        self.space = Space(_palette(length), None, self._layouts(), max_length=length, max_tokens=tokens)
        if compile_mode != "eager":
            self._set_compile_mode(compile_mode)

    def in_compile_mode(self, compile_mode: str) -> TransformersSubject:
        """The same model in this compile mode: the weights are shared. Raises ValueError."""
        if compile_mode == self.info.compile_mode:
            return self
        other = copy.copy(self)
        other._set_compile_mode(compile_mode)
        return other

    def in_eager_mode(self) -> TransformersSubject:
        return self.in_compile_mode("eager")

    def _set_compile_mode(self, compile_mode: str) -> None:
        self._run = compiled(self._forward, compile_mode)
        self.info = msgspec.structs.replace(self.info, compile_mode=compile_mode)
        graphs = compile_mode in CUDA_GRAPHS
        length, tokens = _bounds(self.model.config.get_text_config(), self.info.device, graphs)
        self.space = Space(_palette(length), None, self.space.layouts, max_length=length, max_tokens=tokens)

    def digest(self) -> str:
        """Rows are made from the case alone."""
        return ""

    def spans(self, case: BatchShape) -> list[Span]:
        return list(lay_out(case, self.vocabulary, self.outlier).spans)

    def _layouts(self) -> tuple[str, ...]:
        """The layouts under which a row is promised to have one order of sums.

        Our own attention counts keys from the start of the row, the CPU's kernels skip what is hidden. On CUDA a product
        over padded keys counts from the start of the sequence: sdpa's mask tells where a row starts, that of eager does not.
        """
        if self.info.attention == attention.NAME or torch.device(self.info.device).type == "cpu":
            return ("right", "left") if self._windows is None else ("right", "left", "packed")
        return ("right", "left") if self.info.attention == "sdpa" else ("right",)

    @property
    def attention_implementations(self) -> tuple[str, ...]:
        """What ``attn`` may be for this model on this device, besides "auto"."""
        return attention_implementations(self.model, self.info.device, self.info.dtype)

    def logprobs(self, case: BatchShape) -> list[Tensor]:
        """Logprobs over the full vocabulary of every real token: [length, vocabulary] for each row of the batch."""
        return [row["logprobs"] for row in self.run(case)]

    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """``logprobs`` of each row, fp64 for a model in fp64, else fp32. Raises NotRun where memory does not suffice."""

        def rows(layout: BatchLayout) -> RowOutputs:
            rows = self._rows(self._run, layout, self._windows, observer)
            return RowOutputs(rows=[{"logprobs": row} for row in rows])

        return self._where_memory_suffices(case, rows)

    def with_gradients(self) -> GradientsOfModel:
        return GradientsOfModel(self)

    def run_with_gradients(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """The gradient of each row's loss with respect to its embeddings, and those of the weights.

        A row's loss is minus the sum of its logprobs of the token that follows, of the last one that of the first.
        """
        return self._where_memory_suffices(case, lambda layout: self._gradients(layout, observer))

    def _where_memory_suffices(self, case: BatchShape, run: Callable[[BatchLayout], RowOutputs]) -> RowOutputs:
        if why := self.space.holds(case):
            raise NotRun(why)
        layout = lay_out(case, self.vocabulary, self.outlier)
        try:
            with compiling(self.info.compile_mode, self._origin):
                return run(layout)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Here, not in the handler: the error held the tensors of the forward that failed.
        if self.info.compile_mode in CUDA_GRAPHS:
            torch._dynamo.reset()  # a recording that ran out of memory leaves the tree of CUDA graphs unusable
        if torch.device(self.info.device).type == "cuda":
            torch.cuda.empty_cache()
        raise NotRun(f"out of memory: {len(case)} rows, {case.width} columns, {case.tokens} tokens with padding")

    @torch.no_grad()
    def _rows(
        self, run: Callable[..., Tensor], layout: BatchLayout, windows: Windows | None, observer: Observer | None = None
    ) -> list[Tensor]:
        graphs = self.info.compile_mode in CUDA_GRAPHS and run is not self._forward
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        inputs = self._inputs(layout, windows)
        with observed(observer):
            out = run(*inputs)
        rows = [out[span.sequence, span.start : span.stop] for span in layout.spans]
        return [row.clone() for row in rows] if graphs else rows  # a CUDA graph writes every result to the same memory

    @torch.enable_grad()
    def _gradients(self, layout: BatchLayout, observer: Observer | None) -> RowOutputs:
        if self.info.compile_mode in CUDA_GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()
        tokens, *others = self._inputs(layout, self._windows)
        sequences, columns, targets = _next_tokens(layout, tokens)
        weights = trained(self.model)
        with observed(observer):
            embeddings = self.model.get_input_embeddings()(tokens)
            if self.info.compile_mode != "eager":  # Dynamo warns of an input that is no leaf
                embeddings = embeddings.detach().requires_grad_()
            logprobs = self._run(embeddings, *others)[sequences, columns, targets]
            of_embeddings, *of_weights = torch.autograd.grad(
                logprobs, [embeddings, *weights.values()], -torch.ones_like(logprobs), allow_unused=True
            )
        shared = {name: g.clone() for name, g in zip(weights, of_weights, strict=True) if g is not None}
        rows = [of_embeddings[span.sequence, span.start : span.stop].clone() for span in layout.spans]
        return RowOutputs(rows=[{"the gradient of its embeddings": row} for row in rows], shared=shared)

    def _inputs(self, layout: BatchLayout, windows: Windows | None) -> tuple[Tensor, Any, Tensor | None, Any]:
        tokens, rows, positions = (
            torch.tensor(layer, device=self.info.device) for layer in (layout.tokens, layout.rows, layout.positions)
        )
        if windows is None:
            mask = masks.padding_mask(rows)
        else:
            form = masks.additive(DTYPES[self.info.dtype]) if self.info.attention == "eager" else masks.boolean
            mask = masks.causal_masks(rows, positions, windows, form)
        packing = None
        if layout.is_packed and self.info.attention == attention.NAME:
            packing = tuple(torch.tensor(layer, device=self.info.device) for layer in layout.packing())
            if self.info.compile_mode != "eager":
                _of_any_size(tokens, mask, positions, packing)
        return tokens, mask, positions if self._takes_positions else None, packing

    def _probe(self, windows: Windows | None, longest: int) -> Windows | None:
        """Asks the model, with a tolerance, whether it reads our 4-d masks and whether it heeds a mask at all.

        Returns the windows, or None where the model wants the 2-d mask. Raises ValueError where padding changes a row.
        """
        length = min(_PROBE_LENGTH, longest)
        row = row_slots(0, Row(0, length), self.vocabulary, self.outlier)
        alone = padded([row], ["right"], length, [0])
        both_sides = padded([row, row], ["right", "left"], length + _PROBE_PADDING, [0, self.outlier])
        (expected,) = self._rows(self._forward, alone, None)
        if windows is not None and not (self._takes_positions and self._reads(windows, alone, expected)):
            windows = None
        distance = max(_distance(expected, other) for other in self._rows(self._forward, both_sides, windows))
        _require(
            distance <= self._tolerance,
            f"the forward of {self.info.name} ignores the attention mask: padding moves a row's logprobs by "
            f"{distance:.2g} times their spread, so a batch cannot give what the row gives alone; test a model that "
            f"masks its padding, or another attention implementation than {self.info.attention!r}",
        )
        return windows

    def _reads(self, windows: Windows, alone: BatchLayout, expected: Tensor) -> bool:
        try:
            (actual,) = self._rows(self._forward, alone, windows)
        except Exception as error:  # whatever a model that knows no 4-d mask trips over
            if is_out_of_memory(error):
                raise
            return False
        return _distance(expected, actual) <= self._tolerance

    @property
    def _tolerance(self) -> float:
        return 0.01 if self.info.dtype in ("fp32", "fp64") else 0.15


class _Logprobs(nn.Module):
    """What is compiled: the model, and the logprobs of all its positions. tokens: their ids, or their embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Any, positions: Tensor | None, packing: attention.Packing | None) -> Tensor:
        places = {} if positions is None else {"position_ids": positions}
        places |= {} if packing is None else {"packing": packing}
        places |= {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
        logits = self.model(attention_mask=mask, use_cache=False, **places).logits
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return torch.log_softmax(logits.to(wide), -1)


def _next_tokens(layout: BatchLayout, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's tokens are, as sequences and columns, and the token after each; after the last one comes the first."""
    sequences: list[int] = []
    columns: list[int] = []
    following: list[int] = []
    for span in layout.spans:
        places = range(span.start, span.stop)
        sequences += [span.sequence] * len(places)
        columns += places
        following += [*places[1:], places[0]]
    where = [torch.tensor(x, device=tokens.device) for x in (sequences, columns, following)]
    return where[0], where[1], tokens[where[0], where[2]]


def _of_any_size(*inputs: Any) -> None:
    """Tells Dynamo what engines that pack rows tell it, so that it makes no graph for the first sizes alone."""
    for x in pytree.tree_leaves(inputs):
        if isinstance(x, Tensor):
            torch._dynamo.maybe_mark_dynamic(x, [dim for dim in range(x.dim()) if x.shape[dim] > 1])


def attention_implementations(model: nn.Module, device: str, dtype: str) -> tuple[str, ...]:
    """The attention implementations that transformers offers for this model on this device, and ours where it fits."""
    config = model.config.get_text_config()
    names = ["eager"]
    if not model._can_set_attn_implementation():  # transformers has no other way to tell
        return tuple(names)
    if model._supports_sdpa and getattr(config, "attn_logit_softcapping", None) is None:
        names.append("sdpa")
    on_gpu = torch.device(device).type == "cuda"
    # flex_attention is not offered: Inductor writes its kernels, and the mode refuses what it has no kernel for.
    if model._supports_flash_attn and on_gpu and dtype in ("bf16", "fp16"):
        names += ["flash_attention_2"] if is_flash_attn_2_available() else []
        names += ["flash_attention_3"] if is_flash_attn_3_available() else []
    if model._supports_attention_backend:
        names.append(attention.NAME)
    return tuple(names)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; the CPU's allocator says so in a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _load(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    if is_preset(name):
        return build_preset(name, device, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="eager")
    except (OSError, ValueError) as error:
        raise UnknownModel(name, str(error).strip().partition("\n")[0]) from error
    return model.to(device).eval()


def _choose_attention(model: nn.Module, device: str, dtype: str, asked: str) -> str:
    """Ours only where it computes what the model's own attention does."""
    offered = attention_implementations(model, device, dtype)
    if asked != "auto":
        _require(asked in offered, f"this model has no attention implementation {asked!r}; use auto or {', '.join(offered)}")
    if asked not in ("auto", attention.NAME):
        return asked
    if attention.NAME not in offered:
        return "eager"
    length, _ = _bounds(model.config.get_text_config(), device, graphs=False)
    why = attention.difference_from_eager(model, length)
    _require(not why or asked == "auto", f"the plugin's attention does not compute this model: {why}; use auto or eager")
    return "eager" if why else attention.NAME


def _is_flash(attn: str) -> bool:
    return attn.startswith("flash_")


def _outlier_token(model: nn.Module) -> int:
    weight = model.get_input_embeddings().weight.detach()
    return int(torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).argmax())


def _palette(longest: int) -> tuple[Row, ...]:
    """Distinct rows of many lengths and all contents: a search takes its batches from these."""
    lengths = enumerate(min(length, longest) for length in _PALETTE_LENGTHS)
    return tuple(Row(i, length, _PALETTE_CONTENTS[i % len(_PALETTE_CONTENTS)]) for i, length in lengths)


def _bounds(config: Any, device: str, graphs: bool) -> tuple[int, int]:
    length, tokens, budget = _BOUNDS[torch.device(device).type]
    budget = int(budget * gpu.SHARE.fraction)
    if graphs:
        budget //= 8  # a CUDA graph keeps the memory of its batch shape, and there is one for each shape
    tokens = min(tokens, budget // (4 * config.vocab_size))
    return min(length, tokens, getattr(config, "max_position_embeddings", None) or length), tokens


def _distance(expected: Tensor, actual: Tensor) -> float:
    """How far the logprobs of the middle token moved, in units of their spread; 0 where they are NaN on both sides."""
    moved = (expected - actual).abs().mean(-1) / expected.std(-1)
    return float(moved.nanmedian().nan_to_num(0.0))


def _require_device(device: str) -> None:
    _require(device.partition(":")[0] in _BOUNDS, f"there is no device {device!r} to test on; use one of cpu, cuda, cuda:N")
    if device.startswith("cuda"):
        count = torch.cuda.device_count()
        index = torch.device(device).index or 0
        _require(index < count, f"the device {device!r} is not there: torch sees {count} GPUs; use cpu")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
