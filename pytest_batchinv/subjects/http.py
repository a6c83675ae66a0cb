"""The subject for a served model: any server that speaks OpenAI's HTTP protocol, completions or chat, whole or streamed.

A batch is made by concurrency: the requests of its rows are sent at once. What a server makes of them it does not tell; how
many were waiting for an answer at once is measured here and reported. Logprobs are compared as the decimal text that the server
wrote, and as float64. The server is not trusted: its answers have bounds in size and time, are read as JSON and nothing else,
and what of them is shown is cut, without control characters, and without the key.

Protocol: the OpenAI API reference, "Completions", "Chat" and "Streaming"; server-sent events, WHATWG HTML, section 9.2.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import httpx
import torch

from pytest_batchinv import urls
from pytest_batchinv.shapes import BatchShape, Row
from pytest_batchinv.subjects.base import NotRun, Observer, RowOutputs, Space, Span, Subject, SubjectInfo, observed

T = TypeVar("T")

_WORDS = (
    "river stone light summer paper window garden silver music winter letter bridge forest shadow candle market sailor engine "
    "mirror valley copper thunder cotton harbor meadow lantern pepper violin marble orchard whisper compass"
).split()
_EXTREME = ("ZZZZ", "0000000", "<<<>>>", "naïve", "東京", "\U0001f642", "x=1;", "----")
_LENGTHS = (1, 13, 5, 16, 2, 7, 33, 3, 64, 9, 31, 17)
_CONTENTS = ("random", "random", "extreme", "random", "repeated")
_LONGEST_NUMBER = 100
_LONGEST_NAME = 200
_LONGEST_EVENT = 1 << 20


class ServerError(RuntimeError):
    """The server cannot be reached, does not answer in time, or answers what is no answer. A sentence says what."""


@dataclass(frozen=True)
class Limits:
    """timeout: seconds for one request, from its first byte to the last of the answer. concurrency: requests at once. retries:
    of a request whose connection failed before any of the answer came; an answer is never asked for again. answer_bytes: of one
    answer. max_tokens: that each row generates."""

    timeout: float = 120.0
    concurrency: int = 64
    retries: int = 2
    answer_bytes: int = 16 << 20
    max_tokens: int = 8


@dataclass
class Load:
    """What was reached. at_once: the most requests that waited for their answers at one time. batches: of several rows; whole:
    those all of whose requests did."""

    at_once: int = 0
    batches: int = 0
    whole: int = 0
    retried: int = 0

    def words(self) -> str:
        retried = f", {self.retried} of them sent again after the connection failed" if self.retried else ""
        return (
            f"load: up to {self.at_once} requests waited for their answers at once{retried}; in {self.whole} of {self.batches} "
            "batches of several rows all of them did. How the server batched them it does not tell"
        )


class HttpSubject(Subject):
    """url: of the server's API, such as http://localhost:8000/v1. api: "completions" or "chat". model: its name there; "auto"
    takes the first one that the server lists. Raises ValueError for what is no address, and ServerError."""

    def __init__(
        self, model: str, url: str, *, api: str = "completions", stream: bool = False, limits: Limits | None = None
    ) -> None:
        if api not in ("completions", "chat"):
            raise ValueError(f"there is no API {api!r}; use completions or chat")
        self.url, self.api, self.stream, self.limits = urls.checked_url(url), api, stream, limits or Limits()
        self._key = urls.key()
        self.load = Load()
        name = self._first_model() if model == "auto" else model
        self.info = SubjectInfo(name, f"http {api}{' stream' if stream else ''}", self.url, "", elsewhere=True)
        palette = zip(itertools.count(), _LENGTHS, itertools.cycle(_CONTENTS), strict=False)
        self.space = Space(
            palette=tuple(Row(i, length, content) for i, length, content in palette),
            layouts=("right",),
            max_rows=self.limits.concurrency,
            max_length=max(_LENGTHS),
            lays_out=True,
            shapes_follow_length=False,  # words are as many tokens as the server's tokenizer makes of them
        )

    def run(self, case: BatchShape, observer: Observer | None = None) -> RowOutputs:
        """Logprobs of the tokens that each row generates, greedily; the tokens, as bytes of UTF-8.

        Raises ServerError, and NotRun where the requests of several rows came one after the other, so that there was no batch.
        """
        if why := self.space.holds(case):
            raise NotRun(why)
        flight = _Flight()
        with observed(observer):
            answers = _finished(lambda: self._batch(case, flight))
        self.load.at_once = max(self.load.at_once, flight.most)
        self.load.retried += flight.retried
        if len(case) > 1:
            self.load.batches += 1
            self.load.whole += flight.most == len(case)
            if flight.most < 2:
                raise NotRun(f"no two of the {len(case)} requests waited for their answers at once, so there was no batch")
        return RowOutputs(rows=[answer.as_tensors() for answer in answers])

    def spans(self, case: BatchShape) -> list[Span]:
        return [Span(i, 0, row.length) for i, row in enumerate(case.rows)]

    def notes(self) -> tuple[str, ...]:
        load, self.load = self.load, Load()
        return (
            load.words(),
            f"{self.info.name} was computed by {self.url}; the machine in the record is the one that asked",
        )

    async def _batch(self, case: BatchShape, flight: _Flight) -> list[Answer]:
        turn = asyncio.Semaphore(self.limits.concurrency)
        async with self._client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._row(client, row, flight, turn)) for row in case.rows]
            except ExceptionGroup as errors:  # the first failure cancels the other requests
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _row(self, client: httpx.AsyncClient, row: Row, flight: _Flight, turn: asyncio.Semaphore) -> Answer:
        async with turn:
            path, body = _request(self.api, self.info.name, prompt(row), self.limits.max_tokens, self.stream)
            read = self._streamed if self.stream else self._whole
            return await self._asked(client, "POST", path, body, flight, read)

    async def _whole(self, answer: httpx.Response) -> Answer:
        data = _json(b"".join([part async for part in self._bounded(answer)]))
        return self._checked(_read_choice(self.api, [_choice(data)]), data)

    async def _streamed(self, answer: httpx.Response) -> Answer:
        choices: list[dict[str, Any]] = []
        usage: dict[str, Any] = {}
        ended = False
        async for event in _events(self._bounded(answer)):
            if event == b"[DONE]":
                ended = True
                break
            data = _json(event)
            usage = data if data.get("usage") else usage
            if data.get("choices"):
                choices.append(_choice(data))
        if not ended:
            raise ServerError("the stream ended without [DONE], so something of the answer is missing")
        return self._checked(_read_choice(self.api, choices), usage)

    def _checked(self, answer: Answer, data: dict[str, Any]) -> Answer:
        """Raises ServerError for an answer of another number of tokens than was asked for, or than it says."""
        if len(answer.tokens) > self.limits.max_tokens:
            raise ServerError(f"{len(answer.tokens)} tokens came where at most {self.limits.max_tokens} were asked for")
        usage = data.get("usage")
        told = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if told is not None and str(told) != str(len(answer.tokens)):
            raise ServerError(f"the server counts {_shown(told)} tokens and gives the logprobs of {len(answer.tokens)}")
        return answer

    async def _asked(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        flight: _Flight,
        read: Callable[[httpx.Response], Coroutine[Any, Any, T]],
    ) -> T:
        for attempt in itertools.count():
            passage = flight.of_one_request()
            try:
                async with asyncio.timeout(self.limits.timeout):
                    request = client.build_request(method, path, json=body, extensions={"trace": passage.event})
                    answer = await client.send(request, stream=True)
                    try:
                        await self._refuse_errors(answer)
                        return await read(answer)
                    finally:
                        await answer.aclose()
            except TimeoutError:
                raise ServerError(f"{self.url}{path} gave no whole answer within {self.limits.timeout:g} s") from None
            except httpx.TransportError as error:
                if passage.answered or attempt >= self.limits.retries:
                    when = "in the middle of its answer" if passage.answered else f"{attempt + 1} times"
                    said = self._clean(f"{type(error).__name__} {error}".strip())
                    raise ServerError(f"the connection to {self.url}{path} failed {when}: {said}") from None
                flight.retried += 1
            finally:
                passage.end()
        raise AssertionError("unreachable")

    async def _refuse_errors(self, answer: httpx.Response) -> None:
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise ServerError("the answer is compressed, which was not asked for: its size could not be bounded")
        if answer.status_code != 200:
            said = b""
            async for part in self._bounded(answer):
                said += part
                if len(said) > 2000:
                    break
            raise ServerError(
                f"the server answered with status {answer.status_code}: {self._clean(said.decode(errors='replace'))}"
            )

    async def _bounded(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        size = 0
        async for part in answer.aiter_raw():
            size += len(part)
            if size > self.limits.answer_bytes:
                raise ServerError(f"the answer is longer than {self.limits.answer_bytes:,} bytes")
            yield part

    def _client(self) -> httpx.AsyncClient:
        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {self._key}"} if self._key else {})
        connections = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        # No environment: a proxy or a .netrc that nobody meant would see the key. No redirects, for the same reason.
        return httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=None, limits=connections, trust_env=False, follow_redirects=False
        )

    def _first_model(self) -> str:
        async def asked() -> dict[str, Any]:
            async def read(answer: httpx.Response) -> dict[str, Any]:
                return _json(b"".join([part async for part in self._bounded(answer)]))

            async with self._client() as client:
                return await self._asked(client, "GET", "/models", None, _Flight(), read)

        models = _finished(asked).get("data")
        first = models[0].get("id") if isinstance(models, list) and models and isinstance(models[0], dict) else None
        if not isinstance(first, str) or isinstance(first, Number) or not first.isprintable() or len(first) > _LONGEST_NAME:
            raise ServerError(f"{self.url}/models lists no model; name one")
        return first

    def _clean(self, text: str) -> str:
        return _shown(text.replace(self._key, "[the key]") if self._key else text)


class Number(str):
    """A number of an answer, as the server wrote it."""


class Answer(NamedTuple):
    """What one row generated: the text of each token, and its logprob as the server wrote it."""

    tokens: tuple[str, ...]
    logprobs: tuple[Number, ...]

    def as_tensors(self) -> dict[str, torch.Tensor]:
        values = torch.tensor([float(number) for number in self.logprobs], dtype=torch.float64)
        return {"logprobs": values, "decimal text of logprobs": _bytes(self.logprobs), "tokens": _bytes(self.tokens)}


@dataclass
class _Flight:
    """The requests of one batch: how many wait for their answers, and the most that did."""

    waiting: int = 0
    most: int = 0
    retried: int = 0

    def of_one_request(self) -> _Passage:
        return _Passage(self)


@dataclass
class _Passage:
    """One request. It waits from its last byte sent to the end of its answer."""

    flight: _Flight
    waits: bool = False
    answered: bool = False

    async def event(self, name: str, info: dict[str, Any]) -> None:
        """An event of httpcore (its "trace" extension)."""
        if name.endswith("send_request_body.complete") and not self.waits:
            self.waits = True
            self.flight.waiting += 1
            self.flight.most = max(self.flight.most, self.flight.waiting)
        elif name.endswith("receive_response_headers.complete"):
            self.answered = True

    def end(self) -> None:
        self.flight.waiting -= self.waits
        self.waits = False


def prompt(row: Row) -> str:
    """As many words as the row is long; made from the row alone."""
    draw = random.Random(f"{row.id} {row.length} {row.content}")
    if row.content == "repeated":
        return " ".join([draw.choice(_WORDS)] * row.length)
    words = _WORDS if row.content == "random" else _EXTREME
    return " ".join(draw.choice(words) for _ in range(row.length))


def _request(api: str, model: str, text: str, max_tokens: int, stream: bool) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": 0}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if api == "chat":
        return "/chat/completions", body | {"messages": [{"role": "user", "content": text}], "logprobs": True}
    return "/completions", body | {"prompt": text, "logprobs": 1}


def _json(text: bytes) -> dict[str, Any]:
    """A JSON object whose numbers are left as they are written. Raises ServerError."""
    try:
        data = json.loads(text.decode(), parse_float=Number, parse_int=Number, parse_constant=Number)
    except (ValueError, RecursionError) as error:
        raise ServerError(f"the answer is no JSON: {_shown(str(error))}") from None
    if not isinstance(data, dict):
        raise ServerError("the answer is JSON, but no object")
    return data


def _choice(data: dict[str, Any]) -> dict[str, Any]:
    choices = data.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ServerError("the answer has not one choice, as was asked for")
    return choices[0]


def _read_choice(api: str, choices: list[dict[str, Any]]) -> Answer:
    """The tokens of a choice, or of the parts of a streamed one."""
    tokens: list[Any] = []
    logprobs: list[Any] = []
    for choice in choices:
        given = choice.get("logprobs")
        if given is None:
            continue
        if not isinstance(given, dict):
            raise ServerError("logprobs are no object")
        if api == "chat":
            entries = given.get("content") or []
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ServerError("the content of logprobs is no list of objects")
            tokens += [entry.get("token") for entry in entries]
            logprobs += [entry.get("logprob") for entry in entries]
        else:
            texts, numbers = given.get("tokens"), given.get("token_logprobs")
            if not isinstance(texts, list) or not isinstance(numbers, list):
                raise ServerError("tokens and token_logprobs are no lists")
            tokens += texts
            logprobs += numbers
    if not tokens:
        raise ServerError("the answer has no logprobs; start the server so that it gives them")
    if len(tokens) != len(logprobs) or not all(isinstance(token, str) for token in tokens):
        raise ServerError(f"there are {len(tokens)} tokens and {len(logprobs)} logprobs")
    return Answer(tuple(map(str, tokens)), tuple(_number(logprob) for logprob in logprobs))


def _number(value: Any) -> Number:
    if not isinstance(value, Number) or len(value) > _LONGEST_NUMBER or not math.isfinite(float(value)):
        raise ServerError(f"a logprob is {_shown('null' if value is None else value)}, which is no number")
    return value


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events."""
    kept = b""
    async for part in parts:
        *lines, kept = (kept + part).split(b"\n")
        if len(kept) > _LONGEST_EVENT:
            raise ServerError(f"a line of the stream is longer than {_LONGEST_EVENT:,} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _bytes(texts: tuple[str, ...]) -> torch.Tensor:
    encoded = json.dumps(texts, ensure_ascii=True).encode()
    return torch.frombuffer(bytearray(encoded), dtype=torch.uint8)


def _shown(text: Any) -> str:
    """In one short line, without control characters."""
    plain = re.sub(r"\s+", " ", str(text)[:2000])
    plain = "".join(character if character.isprintable() else "?" for character in plain).strip()
    return plain if len(plain) <= _LONGEST_NAME else f"{plain[:_LONGEST_NAME]}..."


def _finished(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs it to its end; in a thread of its own where this one has a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(make())
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(make()))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="batchinv-http")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
