"""vLLM itself, on a CPU: the mode inside its worker, its engine as a subject, and faults planted in both. ``nox -s vllm``."""

import os
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from vllm import LLM, SamplingParams

from pytest_batchinv import BatchVarianceError, batch_invariant_mode, check_batch_invariant
from pytest_batchinv.check import check_negative_control
from pytest_batchinv.kernels import table
from pytest_batchinv.subjects.vllm import VllmSubject, model_path

MODEL, VOCABULARY = "tiny-qwen3-d64", 499
ATTEND = "_C::cpu_attention_with_kv_cache"


@pytest.fixture(scope="module")
def subject():
    return of_few_rows(VllmSubject(MODEL, device="cpu", dtype="fp32"))


def of_few_rows(subject):
    """The same engine, asked for batches of up to 9 rows of up to 140 tokens: minutes instead of a quarter of an hour."""
    rows = tuple(row for row in subject.space.palette if row.length <= 140)
    subject.space = replace(subject.space, palette=rows, max_rows=9, max_length=140)
    return subject


def test_rows_keep_their_bits_in_batches_chunks_decode_and_prefix_hits_where_stock_vllm_varies(subject):
    control = check_negative_control(subject, max_examples=1)
    assert control.verdict == "caught", "stock vLLM did not vary here, so equal bits would say little"
    with batch_invariant_mode():
        records = check_batch_invariant(subject, ("R", "S", "I", "C", "D"), max_examples=1)
    assert {record.relation: record.verdict for record in records} == dict.fromkeys("RSICD", "equal")
    for record in records:
        assert record.ops is not None and not record.unclassified_ops and not record.ops.bypassed
        assert record.hits[ATTEND] > 0 and record.receipt["vllm"].startswith("0.32")
    told = {record.relation: record.notes[0] for record in records}
    assert "up to 9 requests ran in one step" in told["I"]
    assert "prompts were computed in" in told["C"] and "tokens from the prefix cache" in told["C"]
    assert "decoded one by one" in told["D"]


def test_compiled_code_has_the_bits_of_eager_code_and_calls_the_table():
    with batch_invariant_mode():
        compiled = of_few_rows(VllmSubject(MODEL, device="cpu", dtype="bf16").in_compile_mode("default"))
        records = [check_batch_invariant(compiled, (letter,), max_examples=1)[0] for letter in ("I", "X")]
    assert [record.verdict for record in records] == ["equal", "equal"]
    assert records[0].hits["batchinv::mm"] > 0 and records[0].hits[ATTEND] > 0


def test_attention_whose_order_follows_the_batch_is_found(subject, monkeypatch):
    stock = table.OF_VLLM[ATTEND]

    def follows(query, key_cache, value_cache, output, query_start_loc, seq_lens, *args):
        stock(query, key_cache, value_cache, output, query_start_loc, seq_lens, *args)
        if len(seq_lens) > 4:
            output.copy_(torch.nextafter(output, torch.full_like(output, torch.inf)))

    monkeypatch.setitem(table.OF_VLLM, ATTEND, follows)
    with batch_invariant_mode(), pytest.raises(BatchVarianceError) as caught:
        check_batch_invariant(subject, ("I",), max_examples=1)
    assert len(caught.value.shape) == 5


def test_what_vllm_cannot_run_is_refused_with_its_reason(tmp_path):
    for words, sentence in (
        ({"model": str(tmp_path)}, f"vLLM cannot run {tmp_path}: .*Invalid repository ID or local directory"),
        ({"model": MODEL, "attn": "NO_SUCH_BACKEND"}, f"vLLM cannot run {MODEL}: .*NO_SUCH_BACKEND"),
    ):
        with pytest.raises(ValueError, match=sentence):
            VllmSubject(**{"device": "cpu", "dtype": "fp32", **words})


OFFLINE = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
if __name__ == "__main__":
    import test_vllm
    test_vllm.rows_that_are_equal()
"""


def rows_that_are_equal():
    """Prints how many of 24 prompts have the logprobs alone that they have in one batch: vLLM's own API, and none of ours."""
    folder, path = model_path(MODEL, "fp32")  # the folder goes with its name
    llm = LLM(
        path, dtype="float32", max_model_len=128, max_num_seqs=24, logprobs_mode="raw_logprobs", skip_tokenizer_init=True,
        kv_cache_memory_bytes=1 << 28, enforce_eager=True,
    )  # fmt: skip
    asked = SamplingParams(temperature=0, max_tokens=8, logprobs=5, prompt_logprobs=5, ignore_eos=True, detokenize=False)
    draw = random.Random(0)
    lengths = (draw.randint(1, 100) for _ in range(24))
    prompts = [{"prompt_token_ids": [draw.randrange(VOCABULARY) for _ in range(n)]} for n in lengths]

    def logprobs(output):
        positions = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        return [{token: entry.logprob for token, entry in position.items()} for position in positions]

    in_batch = [logprobs(output) for output in llm.generate(prompts, asked, use_tqdm=False)]
    alone = [logprobs(llm.generate(prompt, asked, use_tqdm=False)[0]) for prompt in prompts]
    print("equal:", sum(a == b for a, b in zip(alone, in_batch, strict=True)))
    del folder


@pytest.mark.parametrize("processes", ("0", "1"))
def test_the_plugin_brings_the_mode_into_vllms_worker(processes, tmp_path):
    (tmp_path / "offline.py").write_text(OFFLINE)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": processes, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    equal = {}
    for switch in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-P", str(tmp_path / "offline.py")],
            env={**environment, "BATCHINV_VLLM": switch},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        equal[switch] = int(re.search(r"^equal: (\d+)$", done.stdout, re.MULTILINE)[1])
    assert equal["1"] == 24 and equal["0"] < 24, equal
