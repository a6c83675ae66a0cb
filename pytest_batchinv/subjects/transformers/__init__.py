"""The subject for causal language models of transformers: presets, local checkpoints and models of the hub."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from pytest_batchinv import gpu, mode
from pytest_batchinv.shapes import BatchShape, Row, Steps
from pytest_batchinv.subjects.base import NoGradients, NotRun, Observer, Part, RowOutputs, Space, Span, Subject, SubjectInfo
from pytest_batchinv.subjects.compiled import CUDA_GRAPHS, compiled, compiling, origin_of
from pytest_batchinv.subjects.gradients import GradientsOfModel
from pytest_batchinv.subjects.presets import UnknownModel, is_preset
from pytest_batchinv.subjects.ranks import OverRanks
from pytest_batchinv.subjects.transformers import attention, caches, masks
from pytest_batchinv.subjects.transformers.forward import Forward, Hidden, Logprobs, parts
from pytest_batchinv.subjects.transformers.layout import BatchLayout, lay_out
from pytest_batchinv.subjects.transformers.probe import Probe, is_out_of_memory
from pytest_batchinv.subjects.transformers.weights import build_preset

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Longest row, tokens of a padded batch, bytes of its logprobs.
_BOUNDS = {"cpu": (300, 2048, 2 << 30), "cuda": (1024, 16384, 6 << 30)}
_PALETTE_LENGTHS = (1, 13, 5, 16, 17, 31, 33, 2, 7, 64, 65, 100, 128, 200, 257, 300, 3, 8, 15, 32, 48, 9, 27, 63)
# One token comes first: torch.compile makes a graph for sizes of 1 in any case, and its first one is for the first sizes alone.
_PALETTE_CONTENTS = ("random", "random", "extreme", "random", "repeated")


class TransformersSubject(Subject):
    """A causal language model under one attention implementation and one compile mode.

    model: a preset, a local path or a hub id, with device and dtype; or a model that is loaded, whose weights stay where
    they are: it is put into eval mode, and its attention implementation is set. attn: "auto" takes "batch_invariant" where
    it covers the model, else "eager". hidden: the model is an encoder or an encoder-decoder, and its last hidden states are
    compared; it gets 2-d masks and no positions, has no cache, and for "auto" transformers' sdpa. Raises UnknownModel, or
    ValueError with what is allowed.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        device: str | None = None,
        dtype: str | None = None,
        attn: str = "auto",
        compile_mode: str = "eager",
        hidden: bool = False,
    ) -> None:
        name = model if isinstance(model, str) else type(model).__name__
        # What a model computes as it is built, such as the frequencies of its rotary embedding, is computed by the mode or not.
        self.was_built_in_mode = mode.is_on()
        self.is_known_by_name = isinstance(model, str) and not hidden
        device, dtype = _device_and_dtype(model, device, dtype)
        _require(dtype in DTYPES, f"there is no dtype {dtype!r}; use one of {', '.join(DTYPES)}")
        _require_device(device)
        if device.startswith("cuda"):
            gpu.take_share()
        attention.register()
        self.model = _load(model, device, DTYPES[dtype], hidden)
        attn = _choose_attention(self.model, device, dtype, attn, hidden)
        self.info = SubjectInfo(name, "transformers", device, dtype, attn)
        self.model.set_attn_implementation(attn)
        if dtype == "fp64" and self.model._can_set_experts_implementation():
            self.model.set_experts_implementation("eager")  # grouped_mm, the default, has no fp64

        config = self.model.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        self.outlier = self.vocabulary - 1 if is_preset(name) else _outlier_token(self.model)
        self._origin = origin_of(self.model)
        self._over_ranks: dict[tuple[int, ...], OverRanks] = {}
        self._head = Hidden(self.model) if hidden else Logprobs(self.model)
        self._output = "hidden states" if hidden else "logprobs"
        parameters = {} if hidden else inspect.signature(self.model.forward).parameters
        self._forward = Forward(
            model=self.model,
            run=self._head,
            dtype=DTYPES[dtype],
            device=device,
            attention=attn,
            takes_positions="position_ids" in parameters,
            is_compiled=False,
            windows=None if hidden or _is_flash(attn) else masks.windows_of(config),
        )
        length, tokens = _bounds(config, device, graphs=False)
        probe = Probe(name, self._forward, self.vocabulary, self.outlier, length)
        layouts = probe.layouts()
        self._forward = probe.forward
        self._caches = probe.caches() if not hidden and caches.word_of(self.model) else ()
        self.space = Space(
            palette=_palette(length),
            layouts=layouts,
            max_length=length,
            max_tokens=tokens,
            max_position=_max_position(config) if self._forward.takes_positions else 0,
            max_keys=_max_position(config),
            caches=self._caches,
            window=masks.window_of(config),
            left_out=tuple(probe.left_out),
        )
        if compile_mode != "eager":
            self._set_compile_mode(compile_mode)

    def in_compile_mode(self, compile_mode: str) -> TransformersSubject:
        """The same model in this compile mode: the weights are shared. Raises ValueError."""
        if compile_mode == self.info.compile_mode:
            return self
        other = copy.copy(self)
        other._over_ranks = {}
        other._set_compile_mode(compile_mode)
        return other

    def in_eager_mode(self) -> TransformersSubject:
        return self.in_compile_mode("eager")

    def _set_compile_mode(self, compile_mode: str) -> None:
        run = compiled(self._head, compile_mode)
        self._forward = replace(self._forward, run=run, is_compiled=compile_mode != "eager")
        self.info = msgspec.structs.replace(self.info, compile_mode=compile_mode)
        graphs = compile_mode in CUDA_GRAPHS
        length, tokens = _bounds(self.model.config.get_text_config(), self.info.device, graphs)
        # A cache that one graph has written is overwritten by its next replay.
        kept = () if graphs else self._caches
        self.space = replace(self.space, palette=_palette(length), max_length=length, max_tokens=tokens, caches=kept)

    def digest(self) -> str:
        """Rows are made from the case alone."""
        return ""

    def spans(self, case: BatchShape) -> list[Span]:
        return list(lay_out(case, self.vocabulary, self.outlier).spans)

    def parts(self, case: BatchShape) -> list[Part]:
        """The forwards of a case that is computed in several; empty for one that is computed at once."""
        layout = lay_out(case, self.vocabulary, self.outlier)
        return parts(case.steps, len(layout.tokens), len(layout.tokens[0])) if case.steps else []

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
            rows = self._rows(layout, case.steps, observer)
            return RowOutputs(rows=[{self._output: row} for row in rows])

        return self._where_memory_suffices(case, rows)

    def with_gradients(self) -> GradientsOfModel:
        if isinstance(self._head, Hidden):
            raise NoGradients(f"{self.info.name} is asked for hidden states, and has no loss")
        return GradientsOfModel(self)

    def over_ranks(self, numbers: tuple[int, ...]) -> OverRanks:
        """Kept for the next time, with the processes that it has started. Raises NoRanks."""
        if numbers not in self._over_ranks:
            self._over_ranks[numbers] = OverRanks(self, numbers)
        return self._over_ranks[numbers]

    def run_with_gradients(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """The gradient of each row's loss with respect to its embeddings, and those of the weights.

        A row's loss is minus the sum of its logprobs of the token that follows, of the last one that of the first.
        """

        def gradients(layout: BatchLayout) -> RowOutputs:
            if self.info.compile_mode in CUDA_GRAPHS:
                torch.compiler.cudagraph_mark_step_begin()
            return self._forward.gradients(layout, observer)

        return self._where_memory_suffices(case, gradients)

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

    def _rows(self, layout: BatchLayout, steps: Steps | None, observer: Observer | None = None) -> list[Tensor]:
        graphs = self.info.compile_mode in CUDA_GRAPHS
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        rows = self._forward.rows(layout, steps, observer)
        return [row.clone() for row in rows] if graphs else rows  # a CUDA graph writes every result to the same memory


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


def _device_and_dtype(model: str | PreTrainedModel, device: str | None, dtype: str | None) -> tuple[str, str]:
    """What was asked for, and of a loaded model what it has."""
    if isinstance(model, str):
        if device is None or dtype is None:
            raise ValueError(f"{model!r} is loaded by name: say device= and dtype=")
        return device, dtype
    there = str(model.device), next((name for name, known in DTYPES.items() if known == model.dtype), str(model.dtype))
    for word, asked, has in zip(("device", "dtype"), (device, dtype), there, strict=True):
        _require(asked in (None, has), f"the model's {word} is {has}, not {asked}; move the model, or leave {word}= out")
    return there


def _load(name: str | PreTrainedModel, device: str, dtype: torch.dtype, hidden: bool) -> nn.Module:
    if not isinstance(name, str):
        return name.eval()
    if is_preset(name):
        _require(not hidden, f"the presets are causal language models, and {name!r} is one; give the path or id of an encoder")
        return build_preset(name, device, dtype)
    try:
        model = (AutoModel if hidden else AutoModelForCausalLM).from_pretrained(name, dtype=dtype, attn_implementation="eager")
    except (OSError, ValueError) as error:
        raise UnknownModel(name, str(error).strip().partition("\n")[0]) from error
    return model.to(device).eval()


def _choose_attention(model: nn.Module, device: str, dtype: str, asked: str, hidden: bool) -> str:
    """Ours only where it computes what the model's own attention does."""
    offered = attention_implementations(model, device, dtype)
    if asked != "auto":
        _require(asked in offered, f"this model has no attention implementation {asked!r}; use auto or {', '.join(offered)}")
    if asked not in ("auto", attention.NAME) or (hidden and asked != "auto"):
        return asked
    if hidden:
        return "sdpa" if "sdpa" in offered else "eager"
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
    return min(length, tokens, _max_position(config)), tokens


def _max_position(config: Any) -> int:
    """Tokens that have a position; some configurations say -1 where there is no limit."""
    given = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return given if given is not None and given > 0 else 1 << 30


def _require_device(device: str) -> None:
    _require(device.partition(":")[0] in _BOUNDS, f"there is no device {device!r} to test on; use one of cpu, cuda, cuda:N")
    if device.startswith("cuda"):
        count = torch.cuda.device_count()
        index = torch.device(device).index or 0
        _require(index < count, f"the device {device!r} is not there: torch sees {count} GPUs; use cpu")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
