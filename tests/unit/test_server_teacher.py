"""A teacher behind a server: its answers are true, its failures are retried, and what is beyond help is a sentence."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.scenario import VOCABULARY, write_model
from tests.small_models import documents
from tests.teacher_server import (
    Fault,
    TeacherServer,
    changing,
    cutting,
    dripping,
    dropping,
    failing,
    garbled,
    hanging,
    late,
)
from understudy.contracts import IGNORED, Batch
from understudy.objectives.targets import TopKTargets
from understudy.objectives.teachers import server_client
from understudy.objectives.teachers.prompt_logprobs import read_answer
from understudy.objectives.teachers.server_client import LostServerError, RefusedRequestError, ServerClient
from understudy.objectives.teachers.server_teacher import ServerTeacher

pytestmark = pytest.mark.unit

K = 8
KEY = "a-secret-key"
Serve = Callable[..., TeacherServer]
Connect = Callable[..., ServerTeacher]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("models") / "teacher"
    write_model(directory, tied=False)
    return AutoModelForCausalLM.from_pretrained(directory).double()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def serve(model: Any) -> Iterator[Serve]:
    servers: list[TeacherServer] = []

    def start(**options: Any) -> TeacherServer:
        servers.append(TeacherServer(model, **options).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def connect() -> Iterator[Connect]:
    teachers: list[ServerTeacher] = []

    def to(*servers: TeacherServer | str, k: int = K, classes: int = VOCABULARY, **options: Any) -> ServerTeacher:
        endpoints = [server if isinstance(server, str) else server.address for server in servers]
        settings = {"timeout_seconds": 5.0, "retries": 2, "key": None, "connections": 4, **options}
        client = ServerClient(endpoints, **settings)
        teachers.append(ServerTeacher(client, "teacher", k=k, classes=classes, requests_at_once=4))
        return teachers[-1]

    yield to
    for teacher in teachers:
        teacher.close()


def faults(*first: Fault | None) -> Callable[[int], Fault | None]:
    """For the first requests; later ones are answered."""
    return lambda number: first[number] if number < len(first) else None


def batch() -> Batch:
    return Batch.of(documents())


def expected(model: Any, k: int = K) -> TopKTargets:
    """From whole logits of one document at a time."""
    rows = []
    for tokens, labels in documents():
        with torch.no_grad():
            rows.append(model(input_ids=tokens[None]).logits[0][labels != IGNORED])
    log_probs = torch.log_softmax(torch.cat(rows), dim=1)
    largest = log_probs.topk(k, dim=1)
    tail = log_probs.scatter(1, largest.indices, -math.inf).logsumexp(dim=1)
    return TopKTargets(largest.indices, largest.values.float(), tail.float())


def assert_same(told: TopKTargets, wanted: TopKTargets) -> None:
    assert torch.equal(told.ids, wanted.ids)
    torch.testing.assert_close(told.log_probs, wanted.log_probs, rtol=0, atol=1e-6)
    torch.testing.assert_close(told.tail, wanted.tail, rtol=0, atol=1e-6)


def test_targets_are_those_of_the_model_itself(model: Any, serve: Serve, connect: Connect) -> None:
    teacher = connect(serve())
    told = teacher.ask([batch(), Batch.of([]), batch()])
    assert_same(told[0], expected(model))
    assert_same(told[2], expected(model))
    assert (len(told[1]), told[1].ids.shape) == (0, (0, K))


def test_a_k_as_large_as_the_vocabulary_leaves_nothing(model: Any, serve: Serve, connect: Connect) -> None:
    (told,) = connect(serve(most=VOCABULARY), k=VOCABULARY).ask([batch()])
    assert float(told.tail.exp().max()) < 1e-6
    assert float((told.log_probs.double().exp().sum(1) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize(
    "fault",
    [
        failing(500),
        failing(503, Retry_After="0"),
        failing(429),
        failing(408),
        dropping,
        cutting,
        garbled,
        changing(lambda choice: choice.pop("prompt_logprobs")),
        changing(lambda choice: choice["prompt_logprobs"].pop()),
        changing(lambda choice: choice["prompt_logprobs"].__setitem__(-1, None)),
    ],
    ids=["500", "503", "429", "408", "dropped", "cut", "no JSON", "missing", "short", "null"],
)
def test_a_failure_that_may_pass_is_asked_again(model: Any, serve: Serve, connect: Connect, fault: Fault) -> None:
    server = serve(fault=faults(None, fault, None, fault))
    (told,) = connect(server).ask([batch()])
    assert_same(told, expected(model))


@pytest.mark.parametrize("fault", [hanging, late(2.0), dripping], ids=["hang", "late", "dripping"])
def test_an_answer_that_takes_too_long_is_asked_for_again(
    model: Any, serve: Serve, connect: Connect, fault: Fault
) -> None:
    (told,) = connect(serve(fault=faults(fault)), timeout_seconds=0.4).ask([batch()])
    assert_same(told, expected(model))


def test_every_endpoint_has_its_turn_and_one_that_is_gone_is_passed_over(
    model: Any, serve: Serve, connect: Connect
) -> None:
    first, second, gone = serve(), serve(), serve()
    gone.close()
    said: list[str] = []
    teacher = connect(first, gone, second, retries=1, say=said.append)
    for _ in range(4):
        assert_same(teacher.ask([batch()])[0], expected(model))
    assert min(len(first.prompts), len(second.prompts)) >= 3
    (line,) = said
    assert line.startswith(f"{gone.address} cannot be reached (")


def test_an_endpoint_that_comes_back_is_asked_again_and_that_is_said(
    model: Any, serve: Serve, connect: Connect
) -> None:
    said: list[str] = []
    server = serve(fault=faults(failing(500), failing(500), failing(500)))
    teacher = connect(server, retries=6, say=said.append)
    assert_same(teacher.ask([batch()])[0], expected(model))
    assert said == [
        f"{server.address} answered with status 500 (busy); it is asked again",
        f"{server.address} answers again",
    ]


def test_a_wait_that_a_server_asks_for_is_kept(serve: Serve, connect: Connect) -> None:
    began: list[float] = []

    def fault(number: int) -> Fault | None:
        began.append(time.monotonic())
        return failing(429, Retry_After="1") if number == 0 else None

    tokens, labels = documents()[0]
    connect(serve(fault=fault)).document(tokens, labels != IGNORED)
    assert began[1] - began[0] >= 1.0


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (failing(500), "answered with status 500 (busy)"),
        (hanging, "gave no answer within 0.2 seconds"),
        (dropping, "broke off ("),
        (garbled, "gave an answer that is no JSON"),
        (
            changing(lambda choice: choice.pop("prompt_logprobs")),
            "gave no log-probabilities of the prompt (prompt_logprobs)",
        ),
        (
            changing(lambda choice: choice["prompt_logprobs"].pop()),
            "gave log-probabilities of 8 tokens for a prompt of 9",
        ),
        (
            changing(lambda choice: choice["prompt_logprobs"].__setitem__(-1, {"1": {"logprob": -1.0}})),
            "gave log-probabilities of 1 tokens at a position where 8 were asked for",
        ),
        (
            changing(lambda choice: choice["prompt_logprobs"][-1].__setitem__("64", {"logprob": -0.1})),
            "gave a token beyond the teacher's 64",
        ),
        (
            changing(lambda choice: choice["prompt_logprobs"][-1].__setitem__("1", {"logprob": 0.5})),
            "gave a log-probability that is none",
        ),
        (
            changing(lambda choice: choice["prompt_logprobs"][-1].__setitem__("1", {"logprob": math.inf})),
            "gave a log-probability that is none",
        ),
        (
            changing(
                lambda choice: choice["prompt_logprobs"].__setitem__(-1, {str(i): {"logprob": -0.1} for i in range(9)})
            ),
            "gave probabilities that sum to 7.239",
        ),
        (
            changing(lambda choice: choice["prompt_logprobs"][-1].__setitem__("one", {"logprob": -0.1})),
            "gave log-probabilities in another form than vLLM's",
        ),
    ],
)
def test_one_that_goes_on_failing_is_named_with_the_cause(
    serve: Serve, connect: Connect, fault: Fault, what: str
) -> None:
    server = serve(fault=lambda number: fault)
    tokens, labels = documents()[0]
    with pytest.raises(LostServerError) as caught:
        connect(server, retries=1, timeout_seconds=0.2).document(tokens, labels != IGNORED)
    assert str(caught.value).startswith(f"{server.address} {what}")


@pytest.mark.parametrize(
    ("options", "changed", "said"),
    [
        ({"most": 5}, {}, "(Requested prompt logprobs of 8, which is greater than max allowed: 5); ask for a smaller"),
        ({"name": "other"}, {}, "status 404 (The model `teacher` does not exist.); say in `model` under what name"),
        ({"key": KEY}, {}, "status 401 (Unauthorized); set the environment variable UNDERSTUDY_TEACHER_API_KEY"),
        ({}, {"path": "/v2"}, "status 404 (Not Found); correct the address, which usually ends in /v1"),
    ],
    ids=["k", "model", "key", "address"],
)
def test_what_a_server_refuses_is_not_asked_again_and_has_a_fix(
    serve: Serve, connect: Connect, options: dict[str, Any], changed: dict[str, str], said: str
) -> None:
    server = serve(**options)
    address = server.address.replace("/v1", changed.get("path", "/v1"))
    tokens, labels = documents()[0]
    with pytest.raises(RefusedRequestError) as caught:
        connect(address).document(tokens, labels != IGNORED)
    assert f"{address}/completions refuses with " in str(caught.value)
    assert said in str(caught.value)
    assert server.number() == 1


def test_a_document_that_is_too_long_for_the_server_has_a_fix(serve: Serve, connect: Connect) -> None:
    with pytest.raises(RefusedRequestError, match=r"lower data\.max_length, or start it with a larger --max-model-len"):
        connect(serve()).document(torch.ones(64, dtype=torch.int64), torch.arange(64) == 62)


def test_the_key_goes_along_and_stands_in_no_message(model: Any, serve: Serve, connect: Connect) -> None:
    assert_same(connect(serve(key=KEY), key=KEY).ask([batch()])[0], expected(model))
    said: list[str] = []
    with pytest.raises(LostServerError) as caught:
        connect(serve(fault=lambda number: dropping), key=KEY, say=said.append).ask([batch()])
    assert KEY not in "".join([*said, str(caught.value), repr(caught.value.__cause__)])


def test_addresses_that_speak_something_else_are_told_apart(serve: Serve, connect: Connect) -> None:
    server = serve()
    tokens, labels = documents()[0]
    with pytest.raises(LostServerError, match="does not speak TLS; say http:// in place of https://"):
        connect(server.address.replace("http:", "https:")).document(tokens, labels != IGNORED)
    server.close()
    with pytest.raises(LostServerError, match=r"/v1 cannot be reached \(.*Connection refused\)"):
        connect(server).document(tokens, labels != IGNORED)


def test_requests_at_once_are_bounded(model: Any, serve: Serve, connect: Connect) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def fault(handler: Any, content: bytes) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        handler.send(200, content)

    for told in connect(serve(fault=lambda number: fault)).ask([batch()] * 5):
        assert_same(told, expected(model))
    assert 1 < most <= 4


def test_what_is_impossible_to_a_server_has_no_mass() -> None:
    """vLLM writes -9999 for minus infinity, which JSON does not have."""
    entry = {"3": {"logprob": 0.0, "rank": 1}, "5": {"logprob": -9999.0, "rank": 2}, "1": {"logprob": -9999.0}}
    told = read_answer({"choices": [{"prompt_logprobs": [None, entry]}]}, 2, [0], k=2, classes=10)
    assert told.ids.tolist() == [[3, 5]]
    assert told.log_probs.exp().tolist() == [[1.0, 0.0]]
    assert told.tail.tolist() == [-math.inf]
