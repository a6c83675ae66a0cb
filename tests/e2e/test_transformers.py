"""Models of transformers: a row's tokens, place and mask are right in every layout. Tolerances here, bits in the suite."""

import inspect
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from pytest_batchinv import batch_invariant_mode, check_batch_invariant, check_negative_control
from pytest_batchinv.kernels import operators
from pytest_batchinv.relations import RELATIONS
from pytest_batchinv.search.runs import SubjectRuns
from pytest_batchinv.shapes import BatchShape, Row, Steps, chosen_evenly
from pytest_batchinv.subjects import NotRun
from pytest_batchinv.subjects.presets import UnknownModel, preset_config
from pytest_batchinv.subjects.transformers import TransformersSubject, attention, attention_implementations
from pytest_batchinv.subjects.transformers.attention import attention_forward
from pytest_batchinv.subjects.transformers.layout import row_tokens
from pytest_batchinv.subjects.transformers.weights import build_preset

TINY = ("tiny-llama", "tiny-qwen3", "tiny-qwen3-moe", "tiny-gpt2", "tiny-gemma")
ATTENTIONS = ("eager", "sdpa", "batch_invariant")
# Longer than tiny-gemma's window of 16; one token; every content.
ROWS = (Row(0, 5), Row(1, 1), Row(2, 40), Row(3, 23, "extreme"), Row(4, 17, "repeated"))
LAYOUTS = [("right", 0), ("right", 7), ("left", 0), ("left", 3), ("packed", 0)]


def make(model="tiny-qwen3", **words):
    return TransformersSubject(model, **{"device": "cpu", "dtype": "fp32", **words})


@pytest.mark.parametrize("attn", ATTENTIONS)
@pytest.mark.parametrize("model", TINY)
def test_every_layout_gives_what_the_row_gives_alone(model, attn):
    engine = make(model, attn=attn)
    alone = [engine.logprobs(BatchShape((row,)))[0] for row in ROWS]
    for layout, extra in LAYOUTS:
        together = engine.logprobs(BatchShape(ROWS, layout, extra))
        for row, expected, actual in zip(ROWS, alone, together, strict=True):
            assert expected.shape == (row.length, 499)
            assert expected.dtype == torch.float32
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4, msg=f"{layout} +{extra}, {row}")


@pytest.mark.parametrize("model", TINY)
def test_logprobs_are_those_that_the_model_gives_without_our_masks(model):
    engine = make(model, attn="sdpa")
    row = Row(2, 40)
    tokens = torch.tensor([row_tokens(row, engine.vocabulary, engine.outlier)])
    with torch.no_grad():
        expected = torch.log_softmax(engine.model(input_ids=tokens).logits[0], -1)
    torch.testing.assert_close(engine.logprobs(BatchShape((row,)))[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", TINY)
def test_logprobs_depend_on_the_context_and_the_token(model):
    logits = make(model, attn="eager").logprobs(BatchShape((Row(0, 30), Row(1, 30))))
    assert logits[0].std(-1).min() > 0.3  # over the vocabulary
    first, second = make(model, attn="eager").logprobs(BatchShape((Row(7, 12, "repeated"), Row(5, 12))))
    assert (first[0] - second[0]).abs().mean() > 0.1  # another token
    assert (second[0] - second[-1]).abs().mean() > 0.1


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("model", TINY)
def test_extreme_rows_stay_finite(model, dtype):
    engine = make(model, dtype=dtype, attn="eager")
    (logprobs,) = engine.logprobs(BatchShape((Row(0, 20, "extreme"),)))
    assert logprobs.isfinite().all()
    assert logprobs.dtype == (torch.float64 if dtype == "fp64" else torch.float32)


def test_weights_are_the_same_every_time_and_the_same_in_every_dtype_but_for_rounding():
    first, second = (build_preset("tiny-qwen3-moe", "cpu", torch.float32) for _ in range(2))
    rounded = build_preset("tiny-qwen3-moe", "cpu", torch.bfloat16)
    for a, b, c in zip(first.parameters(), second.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c.float(), a, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("random:qwen3-0.6b", 0.596),
        ("random:qwen3-1.7b", 1.721),
        ("random:qwen3-4b", 4.022),
        ("random:qwen3-8b", 8.191),
        ("random:qwen3-30b-a3b", 30.532),
        ("random:llama-3.2-1b", 1.236),
        ("random:llama-3.1-8b", 8.030),
    ],
)
def test_random_presets_have_as_many_parameters_as_the_published_models(name, billions):
    settings = preset_config(name)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == billions


def test_the_outlier_is_the_last_token_and_about_a_thousand_times_larger():
    weight = build_preset("tiny-llama", "cpu", torch.float32).get_input_embeddings().weight
    norms = weight.norm(dim=1)
    assert 500 < norms[-1] / norms[:-1].mean() < 2000


@pytest.mark.parametrize(("model", "expected"), [("tiny-gpt2", ATTENTIONS), ("tiny-gemma", ATTENTIONS)])
def test_the_subject_lists_its_attention_implementations(model, expected):
    engine = make(model)
    assert engine.attention_implementations == expected
    assert engine.info.attention == "batch_invariant"


@pytest.mark.parametrize("config", ["gemma2", "gpt_oss"])
def test_our_attention_computes_soft_caps_and_sinks(config):
    """Soft caps and windows of gemma2, sinks and windows of gpt_oss: what their eager attention gives, with its gradients."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({"gemma2": _gemma2, "gpt_oss": _gpt_oss}[config]())
    assert "batch_invariant" in attention_implementations(model, "cpu", "fp32")
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.normal_()
    tokens = torch.randint(0, 97, (2, 30))

    def run(attn):
        attention.register()
        model.set_attn_implementation(attn)
        model.zero_grad()
        logits = model(input_ids=tokens).logits
        logits.square().mean().backward()
        return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    (expected, expected_gradients), (actual, gradients) = run("eager"), run("batch_invariant")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", ["gemma2", "gpt_oss"])
def test_soft_caps_and_sinks_are_batch_invariant(config, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({"gemma2": _gemma2, "gpt_oss": _gpt_oss}[config]())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, dtype, **_: model.to(dtype))
    engine = make("org/" + config, attn="batch_invariant")
    with batch_invariant_mode():
        alone = [engine.logprobs(BatchShape((row,)))[0] for row in ROWS]
        for layout in engine.space.layouts:
            for expected, actual in zip(alone, engine.logprobs(BatchShape(ROWS, layout, 3)), strict=True):
                assert torch.equal(actual, expected), layout


@pytest.mark.parametrize("model", TINY)
def test_a_mask_that_is_causality_alone_may_be_left_out(model):
    """transformers asks us for a mask where the caller gives none: without one, and with one that says the same."""
    engine = make(model, attn="batch_invariant")
    tokens = torch.randint(0, 499, (2, 40))
    with torch.no_grad(), batch_invariant_mode():
        without, padding = (engine.model(input_ids=tokens, attention_mask=m).logits for m in (None, torch.ones_like(tokens)))
    assert torch.equal(without, padding)


def test_no_mask_is_made_for_a_causal_prefill(monkeypatch):
    model = make("tiny-qwen3", attn="batch_invariant").model
    masks = []
    stock = attention.sdpa_mask
    monkeypatch.setattr(attention, "sdpa_mask", lambda **words: masks.append(stock(**words)) or masks[-1])
    tokens = torch.randint(0, 499, (2, 40))
    with torch.no_grad():
        model(input_ids=tokens)
        assert masks == []
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert [tuple(mask.shape) for mask in masks] == [(2, 1, 40, 40)]


@pytest.mark.parametrize(
    "positions",
    [torch.zeros(2, 1), torch.zeros(3, 1, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0, 0])],
)
def test_positions_that_are_none_of_the_queries_are_refused(positions):
    """GPU kernels read them by address."""
    operators.operators()
    q, k, mask = torch.ones(2, 1, 1, 16), torch.ones(2, 1, 3, 16), torch.ones(2, 1, 1, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="expected positions beside a mask, as int64 of one row or 2, for 1 queries"):
        torch.ops.batchinv.attention(q, k, k, mask, False, 1.0, None, None, positions, 2)
    with pytest.raises(RuntimeError, match="without a mask"):
        torch.ops.batchinv.attention(q, k, k, None, False, 1.0, None, None, torch.zeros(2, 1, dtype=torch.int64), 2)


def test_our_attention_is_told_how_many_keys_a_window_has_left_behind(monkeypatch):
    """By the positions of the queries, in layers with a window, where keys may be missing; GPU kernels count keys from them."""
    subject = TransformersSubject("tiny-gemma", device="cpu", dtype="fp32")  # one layer with a window of 16, one without
    places = []
    attend = torch.ops.batchinv.attention

    def noted(*args):
        places.append((args[0].shape[2], *args[8:]))
        return attend(*args)

    monkeypatch.setattr(torch.ops.batchinv, "attention", noted)
    cache = DynamicCache(config=subject.model.config)
    with torch.no_grad():
        for tokens in torch.arange(24)[None].split([20, 1, 3], 1):
            subject.model(input_ids=tokens, past_key_values=cache)
    told = [(queries, None if at is None else at.tolist(), window) for queries, at, window in places]
    none = [(n, None, 0) for n in (20, 1, 3)]
    assert told == [none[0], none[0], (1, [[20]], 16), none[1], (3, [[21, 22, 23]], 16), none[2]]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"position_bias": torch.ones(1)}, "position_bias"),
        ({"indices": torch.zeros(1, 8, 4, dtype=torch.int32)}, "indices"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_our_attention_refuses_what_it_does_not_compute(words, sentence):
    with pytest.raises(ValueError, match=f'does not compute .*{sentence}.*choose attn="eager"'):
        attention_forward(nn.Identity(), *[torch.ones(1, 1, 2, 16)] * 3, None, **words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"model": "random:nothing"}, "no model 'random:nothing'.*tiny-llama"),
        ({"model": "/nowhere/at/all"}, "no model '/nowhere/at/all'.*tiny-llama"),
        ({"dtype": "int8"}, "no dtype 'int8'; use one of fp32, bf16, fp16, fp64"),
        ({"compile_mode": "fast"}, "no compile mode 'fast'; use one of eager, default"),
        ({"attn": "linear"}, "no attention implementation 'linear'; use auto or eager, sdpa"),
        ({"device": "tpu"}, "no device 'tpu' to test on; use one of cpu, cuda"),
        ({"device": "cuda:63"}, "the device 'cuda:63' is not there"),
    ],
)
def test_a_wrong_word_is_refused_with_the_right_ones(words, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        make(**words)
    assert isinstance(caught.value, UnknownModel) == ("model" in words)


class Indexed(LlamaForCausalLM):
    """A model that tells its attention by a keyword which keys to look at."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, indices=torch.zeros(1, dtype=torch.int64), **kwargs)


class Other(LlamaForCausalLM):
    """A model that is another one under an attention that is not its own."""

    def forward(self, input_ids=None, **kwargs):
        own = self.config._attn_implementation == "eager"
        return super().forward(input_ids=input_ids if own else (input_ids + 1) % 499, **kwargs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("model", "why"), [(Indexed, "does not compute indices"), (Other, "moves logits by .* times")])
def test_our_attention_is_taken_for_no_model_that_it_does_not_compute(monkeypatch, model, why, dtype):
    _engine_loads(monkeypatch, model)
    assert make("org/other", attn="auto", dtype=dtype).info.attention == "eager"
    with pytest.raises(ValueError, match=f"the plugin's attention does not compute this model: .*{why}.*use auto or eager"):
        make("org/other", attn="batch_invariant", dtype=dtype)


class Deaf(LlamaForCausalLM):
    """A model that ignores its attention mask."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        everything = torch.ones_like(input_ids)
        return super().forward(input_ids=input_ids, attention_mask=everything, position_ids=position_ids, **kwargs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_model_that_ignores_the_attention_mask_is_run_with_padding_on_the_right_alone(monkeypatch, attn, dtype):
    _engine_loads(monkeypatch, Deaf)
    engine = make("org/deaf", attn=attn, dtype=dtype)
    assert engine.space.layouts == ("right",)
    left, packed = engine.space.left_out
    assert re.match(r"org/deaf: padding on the left is left out: it moves a row's logprobs by [0-9.e-]+ times", left)
    assert packed.startswith("org/deaf: packing is left out")


class Bidirectional(LlamaForCausalLM):
    """A model in which padding on either side moves a row."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        return type(out)(logits=out.logits + out.logits.roll(1, -1).mean(1, keepdim=True))


def test_a_model_that_takes_padding_on_no_side_is_refused(monkeypatch):
    _engine_loads(monkeypatch, Bidirectional)
    with pytest.raises(
        ValueError, match="forward of org/deaf ignores the attention mask: padding on the right moves .*left moves"
    ):
        make("org/deaf", attn="eager")


class Flat(LlamaForCausalLM):
    """A model that knows 2-d masks only."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        assert attention_mask.ndim == 2
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


@pytest.mark.parametrize("attn", ATTENTIONS)
def test_a_model_without_4d_masks_gets_the_2d_mask_and_no_packing(monkeypatch, attn):
    _engine_loads(monkeypatch, Flat)
    engine = make("org/flat", attn=attn)
    assert engine.space.layouts == ("right", "left")
    alone = [engine.logprobs(BatchShape((row,)))[0] for row in ROWS]
    for layout in engine.space.layouts:
        for expected, actual in zip(alone, engine.logprobs(BatchShape(ROWS, layout)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    with pytest.raises(NotRun, match="no layout 'packed'"):
        engine.logprobs(BatchShape(ROWS, "packed"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    ],
)
def test_a_batch_without_room_is_not_run(error):
    engine = make(attn="eager")

    def no_room(*args):
        raise error

    engine._forward = replace(engine._forward, run=no_room)
    with pytest.raises(NotRun, match="out of memory: 5 rows, 40 columns, 200 tokens with padding"):
        engine.logprobs(BatchShape(ROWS))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    engine = make(attn="eager")

    def broken(*args):
        raise RuntimeError("broken")

    engine._forward = replace(engine._forward, run=broken)
    with pytest.raises(RuntimeError, match="broken"):
        engine.logprobs(BatchShape(ROWS))


def test_nan_logits_are_no_error():
    engine = make(attn="eager")
    with torch.no_grad():
        engine.model.lm_head.weight[3] = torch.nan
    assert engine.logprobs(BatchShape(ROWS))[0].isnan().any()


def test_compiled_logprobs_are_those_of_eager_mode():
    engine = make("tiny-gemma", compile_mode="default")
    for layout in ("right", "packed"):
        expected = engine.in_eager_mode().logprobs(BatchShape(ROWS, layout))
        for a, b in zip(expected, engine.logprobs(BatchShape(ROWS, layout)), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-4)


# --- in other layouts, in chunks, decoded ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["tiny-qwen3", "tiny-llama", "tiny-gpt2", "tiny-gemma"])
def test_no_bit_differs_in_another_layout_in_chunks_or_decoded(model, dtype):
    engine = make(model, dtype=dtype)
    assert engine.space.caches == ("dynamic", "static", "sliding") if model == "tiny-gemma" else ("dynamic", "static")
    runs = SubjectRuns(engine)
    with batch_invariant_mode():
        for relation in (RELATIONS[letter] for letter in "LCD"):
            for case in chosen_evenly(relation.cases(engine.space).first, 7):
                assert [runs.compare(comparison) for comparison in relation.sides(runs, case)] == [None], case
    assert runs.stats.compared_bytes > 1e6


@pytest.mark.parametrize("letter", "LCD")
def test_stock_torch_is_caught_in_another_layout_in_chunks_and_decoded(letter):
    assert check_negative_control(make("tiny-llama"), letter, max_examples=10).verdict == "caught"


STEPS = [
    Steps((7, 20)),
    Steps(tuple(range(1, 40)), "static", spare=9),
    Steps((5, 9, 30), rejected=4),
    Steps((30,), prefix=4, rejected=2),
    Steps(tuple(range(10, 40)), "sliding"),
    Steps((11, 19, 35), "sliding", rejected=3),
]


@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("attn", ATTENTIONS)
def test_steps_with_a_cache_give_what_the_model_gives_at_once(attn, steps):
    engine = make("tiny-gemma", attn=attn)
    case = BatchShape((Row(0, 6), Row(2, 40), Row(4, 17, "repeated")))
    for expected, actual in zip(engine.logprobs(case), engine.logprobs(case.in_steps(steps)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_a_step_computes_its_own_columns_alone_and_a_prefix_comes_from_the_cache():
    engine, seen = make(), []
    engine.model.register_forward_pre_hook(lambda _, args, words: seen.append(list(words["input_ids"].shape)), with_kwargs=True)
    engine.run(BatchShape((Row(0, 12), Row(1, 9))).in_steps(Steps((8,), prefix=5)))
    assert seen == [[1, 5], [1, 5], [2, 3], [2, 4]]


def test_a_prefix_that_is_not_in_the_cache_is_no_hit(monkeypatch):
    engine = make()
    monkeypatch.setattr(DynamicLayer, "get_seq_length", lambda layer: 0)
    with pytest.raises(RuntimeError, match=r"the caches hold \[0\] tokens where the prefix has 5: nothing could be reused"):
        engine.run(BatchShape((Row(0, 12), Row(1, 9))).in_steps(Steps((8,), prefix=5)))


class WithoutACache(LlamaForCausalLM):
    """A model that forgets what came before."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        kwargs["use_cache"] = False
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


def test_a_cache_that_the_model_cannot_use_is_left_out_and_said(monkeypatch):
    _engine_loads(monkeypatch, WithoutACache)
    engine = make("org/forgetful")
    assert engine.space.caches == ()
    assert [words.partition(" it ")[0] for words in engine.space.left_out] == [
        "org/forgetful: a dynamic cache is left out:",
        "org/forgetful: a static cache is left out:",
    ]
    (record,) = check_batch_invariant(engine, ("D",))
    assert (record.verdict, record.error) == (
        "not_run",
        "NotRun: org/forgetful keeps no cache in which it could go on (transformers, eager)",
    )


# --- one model, several compile modes ---------------------------------------------------------------------------------


def test_compile_modes_share_the_model_and_spans_say_where_rows_lie():
    subject = make("tiny-llama")
    compiled = subject.in_compile_mode("default")
    assert compiled.model is subject.model
    assert (subject.info.compile_mode, compiled.info.compile_mode) == ("eager", "default")
    assert compiled.in_eager_mode().info == subject.info
    spans = subject.spans(BatchShape(ROWS[:2], "left", 3))
    assert [tuple(span) for span in spans] == [(0, 3, 8), (1, 7, 8)]


# --- helpers ----------------------------------------------------------------------------------------------------------


def _engine_loads(monkeypatch, model_class):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1,
    )  # fmt: skip
    model = model_class(config)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, dtype, **_: model.to(dtype))


def _gemma2():
    return Gemma2Config(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, attn_logit_softcapping=2.0, initializer_range=0.3,
    )  # fmt: skip


def _gpt_oss():
    return GptOssConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.3,
    )  # fmt: skip


def test_a_loaded_model_is_a_subject_as_a_named_one_is():
    named = make("tiny-qwen3")
    loaded = TransformersSubject(build_preset("tiny-qwen3", "cpu", torch.float32).train())
    assert (loaded.info.name, loaded.info.device, loaded.info.dtype) == ("Qwen3ForCausalLM", "cpu", "fp32")
    case = BatchShape(ROWS, "left")
    for expected, actual in zip(named.logprobs(case), loaded.logprobs(case), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize(
    ("model", "words", "sentence"),
    [
        ("tiny-qwen3", {}, "'tiny-qwen3' is loaded by name: say device= and dtype="),
        (None, {"dtype": "bf16"}, "the model's dtype is fp32, not bf16; move the model, or leave dtype= out"),
        (None, {"device": "cuda"}, "the model's device is cpu, not cuda"),
    ],
)
def test_a_loaded_model_keeps_its_device_and_dtype(model, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        TransformersSubject(model or build_preset("tiny-qwen3", "cpu", torch.float32), **words)


class WithARenamedCache(LlamaForCausalLM):
    """As transformers names the keyword from 5.24 on."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **kwargs):
        words = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        return super().forward(**words, **({} if cache is None else {WORD: cache}))


class WithTheFormerName(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        words = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        return super().forward(**words, **({} if past_key_values is None else {WORD: past_key_values}))


WORD = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


@pytest.mark.parametrize("model", [WithARenamedCache, WithTheFormerName])
def test_a_cache_is_handed_over_by_the_keyword_that_the_model_has(monkeypatch, model):
    _engine_loads(monkeypatch, model)
    engine = make("org/renamed")
    assert "dynamic" in engine.space.caches
    case = BatchShape((Row(0, 12), Row(1, 9)))
    for expected, actual in zip(engine.logprobs(case), engine.logprobs(case.in_steps(Steps((8,)))), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
