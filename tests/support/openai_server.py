"""A small server of OpenAI's protocol for tests: it batches what comes close together, and has faults that are asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MOMENT = 0.05
"""Seconds. On a busy machine the requests of one batch come far apart, though each soon after the one before."""


class Batcher:
    """Requests that each come within a moment of the one before are one batch; each learns how large it is."""

    def __init__(self) -> None:
        self.lock, self.open = threading.Lock(), None
        self.sizes: list[int] = []

    def join(self) -> int:
        with self.lock:
            if self.open is None:
                self.open = {"size": 0, "closed": threading.Event()}
            batch = self.open
            batch["size"] += 1
            threading.Timer(MOMENT, self._close, [batch, batch["size"]]).start()
        batch["closed"].wait()
        return batch["size"]

    def _close(self, batch: dict, size: int) -> None:
        """Where nobody came since."""
        with self.lock:
            if batch["size"] != size:
                return
            self.open = None
            self.sizes.append(size)
        batch["closed"].set()


class Server(ThreadingHTTPServer):
    """fault: a name that ``Handler`` knows. refused: connections that are closed before an answer. seen: bodies and headers."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, fault: str = "", refused: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.refused, self.batcher, self.seen = fault, refused, Batcher(), []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address) -> None:
        """A client that has gone is no error of the server."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(json.dumps({"data": [{"id": "served"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, body, dict(self.headers)))
        if self.server.refused > 0:
            self.server.refused -= 1
            return self.connection.shutdown(socket.SHUT_RDWR)
        size, fault = self.server.batcher.join(), self.server.fault
        if fault == "hangs":
            self.server.over.wait(20)
        elif fault == "dies":
            self.head(1000)
            self.wfile.write(b'{"choices": [')
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "drips":
            self.head(10000)
            with contextlib.suppress(OSError):
                while not self.server.over.wait(0.05):
                    self.wfile.write(b" ")
        elif fault == "huge":
            self.head(1 << 40)
            with contextlib.suppress(OSError):
                while not self.server.over.is_set():
                    self.wfile.write(b" " * 65536)
        elif fault == "500":
            self.answer(f"no \x1b[31m{self.headers['authorization']}".encode(), 500)
        elif fault == "redirects":
            self.answer(b"", 307, location="http://127.0.0.1:9/v1/completions")
        elif fault == "compressed":
            self.answer(b"\x1f\x8b", **{"content-encoding": "gzip"})
        elif fault in BODIES:
            self.answer(BODIES[fault])
        else:
            self.generate(body, size, fault)

    def generate(self, body: dict, size: int, fault: str) -> None:
        chat = "messages" in body
        text = body["messages"][0]["content"] if chat else body["prompt"]
        digits = hashlib.sha256(text.encode()).hexdigest()
        tokens = [f" {digits[i : i + 3]}" for i in range(body["max_tokens"])]
        numbers = [f"-{int(digits[i : i + 6], 16) / 1e7 + 0.5!r}" for i in range(len(tokens))]
        if fault == "follows its batch" and size >= 3:
            numbers[-1] = repr(float(numbers[-1]) * (1 + 2**-52))
        if fault == "writes other digits" and size >= 3:
            numbers[-1] += "0"
        if fault == "says another token" and size >= 3:
            tokens[-1] = " other"
        if fault == "ends early" and size >= 3:
            tokens, numbers = tokens[:-1], numbers[:-1]
        if fault == "says NaN":
            numbers[0] = "NaN"
        if fault == "says null":
            numbers[0] = "null"
        told = len(tokens) + (fault == "counts wrong")
        if fault == "says too much":
            tokens, numbers, told = tokens * 2, numbers * 2, told * 2
        if not body.get("stream"):
            return self.answer(_body(chat, tokens, numbers, told))
        self.head(None, "text/event-stream")
        for token, number in zip(tokens, numbers, strict=True):
            self.wfile.write(b"data: " + _body(chat, [token], [number], None) + b"\n\n")
            time.sleep(0.001)
        self.wfile.write(b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n' % told)
        if fault != "cuts the stream":
            self.wfile.write(b"data: [DONE]\n\n")

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.head(len(body), status=status, **headers)
        self.wfile.write(body)

    def head(self, length: int | None, kind: str = "application/json", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("content-length", str(length))
        self.end_headers()


def _body(chat: bool, tokens: list[str], numbers: list[str], told: int | None) -> bytes:
    """By hand: the numbers are to stand there as they are."""
    if chat:
        entries = (f'{{"token": {json.dumps(t)}, "logprob": {n}}}' for t, n in zip(tokens, numbers, strict=True))
        logprobs = f'{{"content": [{", ".join(entries)}]}}'
    else:
        logprobs = f'{{"tokens": {json.dumps(tokens)}, "token_logprobs": [{", ".join(numbers)}]}}'
    usage = "" if told is None else f', "usage": {{"completion_tokens": {told}}}'
    return f'{{"choices": [{{"logprobs": {logprobs}}}]{usage}}}'.encode()


BODIES = {
    "garbage": b"\x80\x04\x95 no json",
    "a list": b"[1, 2]",
    "deep": b"[" * 200_000,
    "no logprobs": b'{"choices": [{"text": "hello"}]}',
    "no choices": b'{"choices": []}',
    "strings": b'{"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": ["-1.0"]}}]}',
    "infinite": b'{"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [-1e999]}}]}',
    "long": b'{"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [-1.' + b"0" * 5000 + b"]}}]}",
    "unequal": b'{"choices": [{"logprobs": {"tokens": ["a", "b"], "token_logprobs": [-1.5]}}]}',
}


@contextlib.contextmanager
def serving(fault: str = "", refused: int = 0) -> Iterator[Server]:
    server = Server(fault, refused)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
