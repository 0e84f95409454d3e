"""A server in front of a small model: as much of vLLM's completions as a teacher needs, failing as it is told."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Fault = Callable[["Handler", bytes], None]
"""What is done in place of sending an answer."""


class TeacherServer:
    """Serves `model`, of transformers, on 127.0.0.1, from threads of this process, until it is left.

    `fault` is asked before each answer, by the number of the request from 0, for what to do instead; None to answer.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str = "teacher",
        most: int = 20,
        key: str | None = None,
        port: int = 0,
        fault: Callable[[int], Fault | None] = lambda number: None,
    ) -> None:
        self.name = name
        self.most = most
        """Of `prompt_logprobs`: vLLM's --max-logprobs."""
        self.key = key
        self.fault = fault
        self.prompts: list[list[int]] = []
        """Of each request that was understood, in order."""
        self.ended = threading.Event()
        self._model = model
        self._lock = threading.Lock()
        self._number = 0
        self._connections: set[socket.socket] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self.port = self._server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> TeacherServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gone at once, as when its process is killed."""
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for connection in self._connections:
                connection.close()

    def note(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def number(self) -> int:
        with self._lock:
            self._number += 1
            return self._number - 1

    def answer(self, question: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and JSON, the refusals in vLLM's words."""
        if question["model"] != self.name:
            return _refused(404, f"The model `{question['model']}` does not exist.")
        if "return_token_ids" in question:
            return 200, {"choices": [{"index": 0, "text": "x", "token_ids": self._going_on(question)}]}
        k, prompt = question["prompt_logprobs"], question["prompt"]
        if k > self.most:
            return _refused(400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most}")
        limit = self._model.config.max_position_embeddings
        if len(prompt) + question["max_tokens"] > limit:
            return _refused(400, f"This model's maximum context length is {limit} tokens.")
        with self._lock, torch.no_grad():
            self.prompts.append(prompt)
            log_probs = torch.log_softmax(self._model(input_ids=torch.tensor([prompt])).logits[0], dim=1)
        entries: list[dict[str, Any] | None] = [None]
        for row, actual in zip(log_probs, prompt[1:]):
            largest = row.topk(k)
            ranks = {actual: int((row >= row[actual]).sum())}
            ranks |= {token: rank for rank, token in enumerate(largest.indices.tolist(), start=1)}
            entries.append({str(token): _told(float(row[token]), rank) for token, rank in ranks.items()})
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": entries}
        return 200, {"object": "text_completion", "model": self.name, "choices": [choice]}

    def _going_on(self, question: dict[str, Any]) -> list[int]:
        """The likeliest continuation, whatever the temperature; its stop token included."""
        tokens = list(question["prompt"])
        with self._lock, torch.no_grad():
            for _ in range(question["max_tokens"]):
                tokens.append(int(self._model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
                if tokens[-1] in question["stop_token_ids"]:
                    break
        return tokens[len(question["prompt"]) :]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: TeacherServer

    def do_POST(self) -> None:
        server = self.server_of
        server.note(self.connection)
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = server.fault(server.number())
        if self.path != "/v1/completions":
            status, told = 404, {"detail": "Not Found"}
        elif server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
            status, told = 401, {"error": "Unauthorized"}
        else:
            status, told = server.answer(question)
        content = json.dumps(told).encode()
        if fault is not None:
            fault(self, content)
        else:
            self.send(status, content)

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


def _handler(server: TeacherServer) -> type[Handler]:
    return type("BoundHandler", (Handler,), {"server_of": server})


def _told(log_prob: float, rank: int) -> dict[str, Any]:
    return {"logprob": log_prob, "rank": rank, "decoded_token": "x"}


def _refused(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": "Error", "param": None, "code": status}}


def failing(status: int, **headers: str) -> Fault:
    """An answer with that status."""
    return lambda handler, content: handler.send(status, json.dumps(_refused(status, "busy")[1]).encode(), **headers)


def late(seconds: float) -> Fault:
    """The answer, after so long."""

    def fault(handler: Handler, content: bytes) -> None:
        handler.server_of.ended.wait(seconds)
        handler.send(200, content)

    return fault


def dropping(handler: Handler, content: bytes) -> None:
    """The connection is closed without a word."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def cutting(handler: Handler, content: bytes) -> None:
    """Half of the answer, then the end of the connection."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def garbled(handler: Handler, content: bytes) -> None:
    """Half of the answer, as if it were whole."""
    handler.send(200, content[: len(content) // 2])


def hanging(handler: Handler, content: bytes) -> None:
    """Nothing, for as long as the server lives."""
    handler.server_of.ended.wait()
    handler.close_connection = True


def dripping(handler: Handler, content: bytes) -> None:
    """A byte now and then, for as long as the server lives."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    for i in range(len(content)):
        if handler.server_of.ended.wait(0.05):
            break
        handler.wfile.write(content[i : i + 1])
    handler.close_connection = True


def changing(change: Callable[[dict[str, Any]], None]) -> Fault:
    """The answer, with its first choice changed."""

    def fault(handler: Handler, content: bytes) -> None:
        told = json.loads(content)
        change(told["choices"][0])
        handler.send(200, json.dumps(told).encode())

    return fault
