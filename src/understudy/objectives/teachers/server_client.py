"""Questions to servers over HTTP: several that say the same, any of which may be slow, busy or gone for a while."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic_core import from_json

if TYPE_CHECKING:
    import httpx2

__all__ = ["LostServerError", "RefusedRequestError", "ServerClient", "ServerError"]

Answer = TypeVar("Answer")

FIRST_WAIT_SECONDS = 0.5
"""After a failure where no endpoint is thought well; it doubles with each further one, up to the longest."""
LONGEST_WAIT_SECONDS = 60.0
LONGEST_ASKED_WAIT_SECONDS = 600.0
"""A server may ask for a longer wait (Retry-After), up to this."""
CONNECT_SECONDS = 10.0
"""A host that is there takes a connection sooner, however busy it is."""
QUIET_SECONDS = 60.0
"""Least time between two complaints about one endpoint."""
SHOWN_CHARACTERS = 300
"""Of what a server says of a failure."""
BUSY = (408, 425, 429)
"""Statuses below 500 that say: not now."""
WORDS_ADVICE = (
    ("prefix caching", "start it with --no-enable-prefix-caching"),
    ("logprob", "ask for a smaller `k`, or start it with --max-logprobs as large as `k`"),
    ("context length", "lower data.max_length, or start it with a larger --max-model-len"),
    ("too long", "lower data.max_length, or start it with a larger --max-model-len"),
)
"""By words that servers use when they refuse: what to do about it."""
STATUS_ADVICE = {
    401: "set the environment variable UNDERSTUDY_TEACHER_API_KEY to its key",
    403: "set the environment variable UNDERSTUDY_TEACHER_API_KEY to a key that it takes",
    404: "correct the address, which usually ends in /v1",
}


class ServerError(Exception):
    """A question without an answer. The message is part of a sentence, and names each endpoint that was asked."""


class LostServerError(ServerError):
    """None answered, however often they were asked."""


class RefusedRequestError(ServerError):
    """One said that the question itself is wrong: to ask again is of no use."""


class _FailedAttemptError(Exception):
    """What a server did in place of answering, to stand behind its name."""

    def __init__(self, what: str, wait_seconds: float = 0.0) -> None:
        super().__init__(what)
        self.wait_seconds = wait_seconds
        """How long it asks to be left alone."""


@dataclass
class _Endpoint:
    address: str
    failures: int = 0
    """In a row. Attempts that were under way together count once."""
    failed_at: float = -1.0
    """Times are those of time.monotonic."""
    avoided_until: float = 0.0
    """While others are well."""
    closed_until: float = 0.0
    """As it asked for itself."""
    complained: bool = False
    """About these failures."""
    quiet_until: float = 0.0


class ServerClient:
    """Posts JSON to `endpoints` in turn, and passes over those that have just failed. Any thread may call it.

    A request counts as lost when nothing came for `timeout_seconds`, and is made up to `retries` times more where
    another attempt may succeed. `key` goes along as the bearer's token; nothing that is said or raised holds it. `say`
    is given a line when an endpoint fails and when it answers again; `turn` is the endpoint to begin with.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        timeout_seconds: float,
        retries: int,
        key: str | None,
        connections: int,
        turn: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        import httpx2  # a tenth of a second that only these runs spend

        self._endpoints = [_Endpoint(address.rstrip("/")) for address in endpoints]
        self._turns = itertools.count(turn)
        self._timeout_seconds = timeout_seconds
        self._retries = retries
        self._say = say
        self._lock = threading.Lock()
        self._random = random.Random()  # not the one whose draws are training's
        self._http = httpx2.Client(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(timeout_seconds, connect=min(timeout_seconds, CONNECT_SECONDS), pool=None),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def close(self) -> None:
        self._http.close()

    def post(self, path: str, question: Mapping[str, Any], read: Callable[[Any], Answer]) -> Answer:
        """What `read` makes of the JSON that an endpoint answers at `path`, such as /completions. It raises
        `ValueError`, saying what the server did, for an answer that is not one; then another attempt is made.

        Raises `LostServerError` after the last attempt, and `RefusedRequestError` at once.
        """
        content = json.dumps(question).encode()
        failures: dict[str, str] = {}
        for attempt in range(self._retries + 1):
            endpoint, began = self._next(attempt), time.monotonic()
            try:
                answer = self._attempt(endpoint.address + path, content, read)
            except _FailedAttemptError as error:
                failures[endpoint.address] = str(error)
                self._failed(endpoint, began, error)
            else:
                self._answered(endpoint)
                return answer
        attempts = "1 attempt" if self._retries == 0 else f"{self._retries + 1} attempts"
        raise LostServerError("; ".join(f"{address} {what}" for address, what in failures.items()) + f" ({attempts})")

    def _next(self, attempt: int) -> _Endpoint:
        """The next in turn that is well, at once; where none is, the one that failed least lately, after a wait."""
        with self._lock:
            turn, now = next(self._turns), time.monotonic()
            in_turn = [self._endpoints[(turn + i) % len(self._endpoints)] for i in range(len(self._endpoints))]
            endpoint = min(in_turn, key=lambda each: max(each.avoided_until, now))
            well, closed_seconds = endpoint.avoided_until <= now, endpoint.closed_until - now
            jitter = self._random.uniform(0.5, 1.0)
        if not well:
            time.sleep(max(_growing(attempt) * jitter, closed_seconds, 0.0))
        return endpoint

    def _attempt(self, address: str, content: bytes, read: Callable[[Any], Answer]) -> Answer:
        told = self._asked(address, content)
        try:
            return read(told)
        except ValueError as error:
            raise _FailedAttemptError(str(error)) from error

    def _failed(self, endpoint: _Endpoint, began: float, error: _FailedAttemptError) -> None:
        with self._lock:
            now = time.monotonic()
            if began >= endpoint.failed_at:
                endpoint.failures, endpoint.failed_at = endpoint.failures + 1, now
            endpoint.closed_until = now + error.wait_seconds
            endpoint.avoided_until = max(now + _growing(endpoint.failures), endpoint.closed_until)
            complains = not endpoint.complained and now >= endpoint.quiet_until
            if complains:
                endpoint.complained, endpoint.quiet_until = True, now + QUIET_SECONDS
        if complains:
            self._say(f"{endpoint.address} {error}; it is asked again")

    def _answered(self, endpoint: _Endpoint) -> None:
        with self._lock:
            endpoint.failures, endpoint.avoided_until, endpoint.closed_until = 0, 0.0, 0.0
            complained, endpoint.complained = endpoint.complained, False
        if complained:
            self._say(f"{endpoint.address} answers again")

    def _asked(self, address: str, content: bytes) -> Any:
        with self._transport_errors():
            headers = {"Content-Type": "application/json"}
            deadline = time.monotonic() + self._timeout_seconds
            with self._http.stream("POST", address, content=content, headers=headers) as response:
                body = self._whole(response, deadline)
        if response.status_code != 200:
            raise _refusal(response, address, body)
        try:
            return from_json(body)  # twice as fast as json, for megabytes while a step computes
        except ValueError:
            raise _FailedAttemptError("gave an answer that is no JSON") from None

    def _whole(self, response: httpx2.Response, deadline: float) -> bytes:
        """A server that sends a little now and then is late too."""
        parts = []
        for part in response.iter_bytes():
            parts.append(part)
            if time.monotonic() > deadline:
                raise self._late()
        return b"".join(parts)

    def _late(self) -> _FailedAttemptError:
        return _FailedAttemptError(f"gave no answer within {self._timeout_seconds:g} seconds")

    @contextmanager
    def _transport_errors(self) -> Iterator[None]:
        import httpx2

        try:
            yield
        except httpx2.ConnectTimeout:
            raise _FailedAttemptError("takes no connection") from None
        except httpx2.TimeoutException:
            raise self._late() from None
        except httpx2.ConnectError as error:
            if "WRONG_VERSION_NUMBER" in str(error) or "record layer failure" in str(error):
                raise _FailedAttemptError("does not speak TLS; say http:// in place of https://") from None
            raise _FailedAttemptError(f"cannot be reached ({_one_line(str(error))})") from None
        except httpx2.RequestError as error:
            raise _FailedAttemptError(f"broke off ({_one_line(str(error)) or type(error).__name__})") from None


def _growing(failures: int) -> float:
    """Seconds to wait after so many failures."""
    return min(FIRST_WAIT_SECONDS * 2.0 ** (failures - 1), LONGEST_WAIT_SECONDS) if failures else 0.0


def _refusal(response: httpx2.Response, address: str, body: bytes) -> Exception:
    """What an answer without success means: that it may come later, or never."""
    status, said = response.status_code, _message(body)
    stated = f"status {status} ({said})" if said else f"status {status}"
    if status in BUSY or status >= 500:
        return _FailedAttemptError(f"answered with {stated}", _asked_wait(response.headers.get("Retry-After")))
    return RefusedRequestError(f"{address} refuses with {stated}; {_advice(status, said)}")


def _advice(status: int, said: str) -> str:
    lower = said.lower()
    for words, advice in WORDS_ADVICE:
        if words in lower:
            return advice
    if status == 404 and "model" in lower:
        return "say in `model` under what name it serves the teacher"
    return STATUS_ADVICE.get(status, "its log may say more")


def _message(body: bytes) -> str:
    """What a server says of a failure: the message in its JSON, else the text."""
    text = body[: 2**16].decode(errors="replace")
    try:
        told: Any = from_json(text)
    except ValueError:
        return _one_line(text)
    for key in ("error", "message", "detail"):
        if isinstance(told, dict) and key in told:
            told = told[key]
    return _one_line(told if isinstance(told, str) else json.dumps(told))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[:SHOWN_CHARACTERS] + "…"


def _asked_wait(header: str | None) -> float:
    """Seconds that Retry-After asks for: a number of them, or a date (RFC 9110, section 10.2.3)."""
    if header is None:
        return 0.0
    try:
        seconds = float(header) if header.strip().isdigit() else parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_ASKED_WAIT_SECONDS)
