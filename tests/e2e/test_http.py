"""Served models: batches are made by concurrency, a fault of the server is found, and what is no answer is never "equal"."""

import asyncio
import re
import socket
import time

import pytest
from openai_server import serving

from pytest_batchinv import BatchShape, BatchVarianceError, check_batch_invariant, check_negative_control, context
from pytest_batchinv.search import sweep
from pytest_batchinv.shapes import Row
from pytest_batchinv.subjects.http import HttpSubject, Limits, Number, ServerError, prompt
from pytest_batchinv.urls import checked_url

LIMITS = Limits(timeout=5.0, concurrency=9)
BATCH = BatchShape(tuple(Row(i, 3 + i) for i in range(5)))
FORMS = [("completions", False), ("completions", True), ("chat", False), ("chat", True)]
forms = pytest.mark.parametrize("api, stream", FORMS, ids=["completions", "completions-stream", "chat", "chat-stream"])


@pytest.fixture(autouse=True)
def _short_sweeps(monkeypatch):
    monkeypatch.setattr(sweep, "SECONDS", 0.3)


@forms
def test_a_server_that_keeps_its_bits_is_equal_and_the_load_that_was_reached_is_reported(api, stream):
    with serving() as server:
        subject = HttpSubject("served", server.url, api=api, stream=stream, limits=LIMITS)
        records = check_batch_invariant(subject, ("R", "I"), max_examples=5)
    assert [(record.relation, record.verdict, record.mode) for record in records] == [
        ("R", "equal", "elsewhere"),
        ("I", "equal", "elsewhere"),
    ]
    assert max(server.batcher.sizes) == 9
    load = next(note for note in records[-1].notes if note.startswith("load: "))
    assert re.match(r"load: up to 9 requests waited for their answers at once; in (\d+) of \1 batches of several rows", load)
    assert any(server.url in note for note in records[-1].notes)


@forms
def test_a_fault_that_follows_the_batch_is_caught_with_the_batch(api, stream):
    with serving("follows its batch") as server:
        subject = HttpSubject("served", server.url, api=api, stream=stream, limits=LIMITS)
        with pytest.raises(BatchVarianceError, match="relation I.*\n(.*\n)*.*1 ulp apart") as caught:
            check_batch_invariant(subject, ("R", "I"), max_examples=5)
    assert len(caught.value.shape) == 3
    assert caught.value.sizes == tuple(range(3, 10))
    assert caught.value.finding.output == "logprobs"
    assert "another process computes" in str(caught.value)


@pytest.mark.parametrize(
    "fault, output, verdict",
    [
        ("writes other digits", "decimal text of logprobs", "shape_differs"),
        ("says another token", "tokens", "shape_differs"),
        ("ends early", "logprobs", "shape_differs"),
    ],
)
def test_text_tokens_and_their_number_are_compared_too(fault, output, verdict):
    with serving(fault) as server:
        subject = HttpSubject("served", server.url, limits=LIMITS)
        with pytest.raises(BatchVarianceError) as caught:
            check_batch_invariant(subject, ("I",), case=BATCH)
    assert (caught.value.finding.output, caught.value.record.verdict) == (output, verdict)


NO_ANSWERS = {
    "dies": "failed in the middle of its answer",
    "garbage": "the answer is no JSON",
    "a list": "JSON, but no object",
    "deep": "the answer is no JSON",
    "no logprobs": "has no logprobs; start the server so that it gives them",
    "no choices": "has not one choice",
    "strings": "a logprob is -1.0, which is no number",
    "infinite": "a logprob is -1e999, which is no number",
    "long": "which is no number",
    "unequal": "there are 2 tokens and 1 logprobs",
    "huge": "longer than 16,777,216 bytes",
    "says NaN": "a logprob is NaN, which is no number",
    "says null": "a logprob is null, which is no number",
    "counts wrong": "the server counts 9 tokens and gives the logprobs of 8",
    "says too much": "16 tokens came where at most 8 were asked for",
    "redirects": "answered with status 307",
    "compressed": "the answer is compressed, which was not asked for",
}


@pytest.mark.parametrize("fault", NO_ANSWERS)
def test_what_is_no_answer_is_an_error_of_one_sentence_and_never_equal(fault):
    found = []
    with serving(fault) as server, context.collecting(found.append):
        subject = HttpSubject("served", server.url, limits=LIMITS)
        with pytest.raises(ServerError, match=re.escape(NO_ANSWERS[fault])):
            check_batch_invariant(subject, ("R",), case=BATCH)
    assert [record.verdict for record in found] == ["error"]
    assert len(str(found[0].error)) < 400


@pytest.mark.parametrize("fault", ["hangs", "drips"])
def test_a_server_that_does_not_come_to_an_end_is_given_up_in_time(fault):
    with serving(fault) as server:
        subject = HttpSubject("served", server.url, limits=Limits(timeout=0.5))
        started = time.monotonic()
        with pytest.raises(ServerError, match=r"gave no whole answer within 0\.5 s"):
            subject.run(BATCH)
    assert time.monotonic() - started < 5  # a bound, not a speed: without one this takes 20 s
    assert len(server.seen) == 5  # nothing was asked again


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_stream_that_is_cut_is_no_answer(api):
    with serving("cuts the stream") as server:
        subject = HttpSubject("served", server.url, api=api, stream=True, limits=LIMITS)
        with pytest.raises(ServerError, match=r"ended without \[DONE\]"):
            subject.run(BATCH)


def test_a_failed_connection_is_tried_again_and_said_and_an_answer_is_never_asked_for_again():
    with serving(refused=2) as server:
        subject = HttpSubject("served", server.url, limits=LIMITS)
        assert len(subject.run(BATCH)) == 5
        assert len(server.seen) == 7
        assert "2 of them sent again after the connection failed" in subject.load.words()
    for fault in ("garbage", "dies", "500"):
        with serving(fault) as server:
            with pytest.raises(ServerError):
                HttpSubject("served", server.url, limits=LIMITS).run(BATCH.alone(0))
            assert len(server.seen) == 1, fault


def test_nobody_at_the_address_is_an_error_after_the_retries():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(ServerError, match=f"the connection to {url}/completions failed 3 times: ConnectError"):
            HttpSubject("served", url, limits=LIMITS).run(BATCH)


def test_the_key_comes_from_the_environment_goes_into_the_header_alone_and_is_never_shown(monkeypatch):
    monkeypatch.setenv("BATCHINV_API_KEY", "sk-very-secret")
    found = []
    with serving("500") as server, context.collecting(found.append):
        subject = HttpSubject("served", server.url, limits=LIMITS)
        with pytest.raises(ServerError, match=r"status 500: no \?\[31mBearer \[the key\]") as caught:
            check_batch_invariant(subject, ("R",), case=BATCH)
    path, body, headers = server.seen[0]
    assert headers["authorization"] == "Bearer sk-very-secret"
    everything = [
        str(caught.value),
        repr(caught.value),
        found[0].to_json(),
        path,
        str(body),
        str(subject.info),
        str(subject.notes()),
    ]
    assert not any("secret" in text for text in everything)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_what_can_be_no_key_is_refused_without_showing_it(monkeypatch, key):
    monkeypatch.setenv("BATCHINV_API_KEY", key)
    with pytest.raises(ValueError, match="the variable BATCHINV_API_KEY holds no key") as caught:
        HttpSubject("served", "http://localhost:1/v1")
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "url, says",
    [
        ("localhost:8000", "is like http://localhost:8000/v1"),
        ("ftp://host/v1", "is like http://localhost:8000/v1"),
        ("http://me:pass@host/v1", "an address holds no user, key or query"),
        ("http://host/v1?key=1", "an address holds no user, key or query"),
        ("http://host:99999/v1", "is like http://localhost:8000/v1"),
        ("http://me:pass\u2100@host/v1", "is like http://localhost:8000/v1"),
        ("http://host\x1b[31m/v1", "is like http://localhost:8000/v1"),
    ],
)
def test_an_address_that_could_hold_a_secret_or_is_none_is_refused(url, says):
    with pytest.raises(ValueError, match=says) as caught:
        checked_url(url)
    assert "pass" not in str(caught.value)


def test_an_address_without_a_path_is_that_of_v1():
    assert checked_url("http://host:8000") == checked_url("http://host:8000/v1/") == "http://host:8000/v1"


def test_requests_are_bounded_and_batches_beyond_the_bound_are_no_cases():
    with serving() as server:
        subject = HttpSubject("served", server.url, limits=Limits(concurrency=3))
        assert max(len(case) for case in sweep.boundary_cases(subject.space)) == 3
        subject.run(BATCH)  # asked for by hand, it takes turns
    assert max(server.batcher.sizes) == 3
    assert subject.load.at_once == 3


def test_it_runs_where_an_event_loop_runs_already():
    async def inside():
        return HttpSubject("auto", server.url, limits=LIMITS).run(BATCH)

    with serving() as server:
        assert len(asyncio.run(inside())) == 5
        assert {body["model"] for _, body, _ in server.seen} == {"served"}


def test_rows_are_made_of_their_identity_and_are_as_long_as_they_say():
    assert prompt(Row(1, 9)) == prompt(Row(1, 9)) != prompt(Row(2, 9))
    assert {len(prompt(Row(1, 9, content)).split()) for content in ("random", "repeated", "extreme")} == {9}
    assert len(set(prompt(Row(1, 9, "repeated")).split())) == 1


def test_numbers_are_kept_as_they_are_written():
    with serving() as server:
        row = HttpSubject("served", server.url, limits=LIMITS).run(BATCH.alone(0))[0]
    text = bytes(row["decimal text of logprobs"].tolist()).decode()
    assert [float(number) for number in re.findall(r"-[0-9.e-]+", text)] == row["logprobs"].tolist()
    assert isinstance(Number("1.50"), str)


def test_layouts_caches_gradients_leaks_and_a_control_cannot_be_asked_of_a_server():
    with serving() as server:
        subject = HttpSubject("served", server.url, limits=LIMITS)
        records = check_batch_invariant(subject, ("S", "L", "C", "D", "G"))
        assert {record.verdict for record in records} == {"not_run"}
        assert server.seen == []
        with pytest.raises(ValueError, match=r"computed by .*, where stock_torch\(\) changes nothing"):
            check_negative_control(subject)
