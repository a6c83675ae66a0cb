"""The engine vllm, beside a stand-in for vLLM: what it asks of the engine, what it reports, and every answer that is none.

vLLM itself runs in ``integration/test_vllm.py``, which the nox session ``vllm`` runs.
"""

import importlib
import sys
from pathlib import Path

import pytest

from pytest_batchinv import BatchShape, BatchVarianceError, check_batch_invariant, vllm_plugin
from pytest_batchinv.patches import registry
from pytest_batchinv.shapes import Row, Steps
from pytest_batchinv.subjects import NotRun

STAND_IN = Path(__file__).parents[1] / "support" / "vllm_stand_in"
ROWS = (Row(0, 70), Row(1, 5), Row(2, 33))


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in, imported, of the version that is known."""
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setattr(vllm_plugin, "prepare", vllm_plugin.check_version)
    version = registry.vllm_version
    version.cache_clear()
    yield importlib.import_module("vllm")
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm" or name.endswith("subjects.vllm.in_worker")]:
        del sys.modules[name]
    version.cache_clear()


@pytest.fixture
def load(vllm):
    from pytest_batchinv.subjects.vllm import VllmSubject

    def load(model="a/model", **words):
        return VllmSubject(model, **{"device": "cpu", "dtype": "fp32", **words})

    return load


def test_a_row_has_the_logprobs_of_all_its_tokens_and_of_what_it_generates(load):
    outputs = load().run(BatchShape(ROWS))
    for row, given in zip(ROWS, outputs, strict=True):
        assert given["logprobs"].shape == given["tokens"].shape == (row.length - 1 + 8, 1 + 8)
        assert given["logprobs"].isfinite().all()


def test_the_relations_hold_of_an_engine_that_computes_each_row_by_itself_and_what_was_reached_is_told(load):
    records = check_batch_invariant(load(), ("R", "S", "I", "C", "D"), max_examples=5)
    assert {record.relation: record.verdict for record in records} == dict.fromkeys("RSICD", "equal")
    told = {record.relation: record.notes[0] for record in records}
    assert "up to 33 requests ran in one step" in told["I"]
    assert "prompts were computed in" in told["C"] and "tokens from the prefix cache" in told["C"]
    assert "given tokens were decoded one by one" in told["D"]
    assert all("vLLM 0.32.0, its own VLLM_BATCH_INVARIANT off" in record.notes for record in records)


def test_a_row_that_follows_its_batch_is_found(load, vllm, monkeypatch):
    subject = load()
    stock = vllm._logprobs

    def follows(tokens, token):
        found = stock(tokens, token)
        found[token].logprob -= 1e-3 * (len(subject._engine._scheduler.requests) > 2)
        return found

    monkeypatch.setattr(vllm, "_logprobs", follows)
    with pytest.raises(BatchVarianceError) as caught:
        check_batch_invariant(subject, ("I",), max_examples=1)
    assert len(caught.value.shape) == 3


def test_steps_are_the_engines_chunks_decoded_tokens_and_prefix_hits(load):
    subject = load()
    subject.run(BatchShape(ROWS, steps=Steps((32, 68, 69))))
    assert "2 prompts were computed in 4 chunks" in subject.load.words()
    assert subject.load.decoded == 2
    assert subject._engine.steps.tokens[:3] == [{0: 32, 1: 5, 2: 32}, {0: 36, 1: 1, 2: 1}, {0: 1, 1: 1, 2: 1}]
    subject.run(BatchShape((Row(0, 70), Row(2, 66)), steps=Steps(prefix=65)))
    assert (subject.load.hits, subject.load.cached) == (2, 128)
    with pytest.raises(NotRun, match="a prefix of 31 tokens fills no block of 32"):
        subject.run(BatchShape(ROWS[:1], steps=Steps(prefix=31)))
    with pytest.raises(NotRun, match="forgets no tokens"):
        subject.run(BatchShape(ROWS[:1], steps=Steps((3,), rejected=1)))


PREFIXED = BatchShape((Row(0, 70), Row(2, 66)), steps=Steps((66,), prefix=64))


@pytest.mark.parametrize(
    "fault, sentence, case",
    (
        ("fewer logprobs", "gave [78] logprobs of a token where its own and the 8 largest were asked for", BatchShape(ROWS)),
        ("logprobs of fewer tokens", "of 7 generated ones, where 69 and 8 were asked for", BatchShape(ROWS)),
        ("NaN", "gave a logprob that is NaN", BatchShape(ROWS)),
        ("another prompt", "answered another prompt than the one that was asked", BatchShape(ROWS)),
        ("loses an answer", "answered 2 of 3 requests", BatchShape(ROWS)),
        ("reads its cache unasked", "took 1 tokens from its prefix cache, which the request was not to read", BatchShape(ROWS)),
        ("keeps its cache", "did not empty its prefix cache", PREFIXED),
        ("misses its cache", "took 0 tokens from its prefix cache, where 64 were there to take", PREFIXED),
        ("forgets what is forced", "generated other tokens than were forced on it", BatchShape(ROWS, steps=Steps((68, 69)))),
        (
            "other chunks",
            r"in chunks of \[5, 5, 5\] tokens, where \[32, 36, 2\] were asked for",
            BatchShape(ROWS, steps=Steps((32, 68))),
        ),
    ),
)
def test_an_answer_that_is_none_is_an_error_and_the_engine_goes_on(load, vllm, monkeypatch, fault, sentence, case):
    from pytest_batchinv.subjects.vllm import EngineError

    subject = load()
    monkeypatch.setattr(vllm, "FAULT", fault)
    with pytest.raises(EngineError, match=sentence):
        subject.run(case)
    monkeypatch.setattr(vllm, "FAULT", "")
    subject.run(case)


def test_requests_that_never_ran_together_are_no_batch(load, vllm, monkeypatch):
    monkeypatch.setattr(vllm, "FAULT", "one at a time")
    with pytest.raises(NotRun, match="no two of the 3 requests ran in one step"):
        load().run(BatchShape(ROWS))


@pytest.mark.parametrize(
    "words, sentence",
    (
        ({"dtype": "fp64"}, "vLLM has no dtype 'fp64'; use one of fp32, bf16, fp16"),
        ({"compile_mode": "max-autotune"}, "not in the mode 'max-autotune'; use eager or default"),
        ({"device": "cuda"}, "this vLLM is built for cpu, not for cuda"),
        ({"model": "not-a-model"}, "vLLM cannot run not-a-model: not-a-model has no config.json"),
        ({"model": "tiny-qwen9"}, "there is no model 'tiny-qwen9'"),
    ),
)
def test_what_cannot_be_loaded_is_refused_with_a_sentence(load, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(**words)


def test_without_vllm_or_with_another_one_the_engine_is_refused(vllm, load, monkeypatch):
    monkeypatch.setattr(registry, "vllm_version", lambda: None)
    with pytest.raises(ValueError, match="vLLM is not installed here: pip install vllm"):
        load()
    monkeypatch.setattr(registry, "vllm_version", lambda: registry.Version("0.30.1"))
    with pytest.raises(ValueError, match="vLLM 0.30.1 is installed, and its sources have not been read"):
        load()


def test_vllms_own_mode_is_told_and_excludes_ours(load, monkeypatch):
    from pytest_batchinv import batch_invariant_mode

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    subject = load()
    assert any("its own VLLM_BATCH_INVARIANT on" in note for note in subject.notes())
    with batch_invariant_mode(), pytest.raises(ValueError, match="both take the same operators of torch"):
        subject.run(BatchShape(ROWS))


def test_a_worker_in_another_process_answers_for_its_mode_and_is_asked_for_no_steps(load, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    subject = load()
    assert subject.info.elsewhere and not subject.space.caches
    subject.run(BatchShape(ROWS))
    assert "1 worker in batch-invariant mode, fingerprint 0123" in subject.notes()[0]


def test_compiled_code_is_an_engine_of_its_own_and_of_the_mode_that_it_was_compiled_in(load, vllm):
    from pytest_batchinv import batch_invariant_mode

    eager = load()
    compiled = eager.in_compile_mode("default")
    assert [options.enforce_eager for options in vllm.loaded[-2:]] == [True, False]
    assert compiled.in_eager_mode() is eager
    compiled.run(BatchShape(ROWS))
    with batch_invariant_mode(), pytest.raises(NotRun, match="compiled this model once, with batch-invariant mode off"):
        compiled.run(BatchShape(ROWS))
