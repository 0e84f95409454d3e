"""A student's answers from a server: those that its model gives, and a sentence where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.scenario import write_model
from tests.teacher_server import TeacherServer, failing, garbled
from understudy.errors import LostTeacherError, UserError
from understudy.objectives.teachers import server_client
from understudy.parallel.world import World, process_group
from understudy.recipe.environment import ProcessEnvironment
from understudy.recipe.objectives import OnPolicy
from understudy.recipe.schema import Recipe
from understudy.training.asking import AgreedWaiting
from understudy.training.served_answers import ServedAnswers, require_student_server, served_name
from understudy.training.stopping import StopRequest

pytestmark = pytest.mark.unit

PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([9]), torch.tensor([3, 11])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("models") / "student"
    write_model(directory, tied=False)
    return AutoModelForCausalLM.from_pretrained(directory).double()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(server_client, "FIRST_WAIT_SECONDS", 0.01)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0" if name != "WORLD_SIZE" else "1")
    alone = ProcessEnvironment(0, 1, 0, 1, f"file://{tmp_path}/rendezvous")
    with process_group(alone, torch.device("cpu"), "gloo") as world:
        yield world


def served(server: TeacherServer, world: World, stops: frozenset[int] = frozenset(), **settings: Any) -> ServedAnswers:
    section = OnPolicy(endpoint=server.address, **settings)
    return ServedAnswers(section, "student", stops, AgreedWaiting(StopRequest(), "the server of the student"), world)


def likeliest(model: Any, prompt: torch.Tensor, room: int) -> list[int]:
    tokens: list[int] = prompt.tolist()
    with torch.no_grad():
        for _ in range(room):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_they_are_what_the_served_model_says(model: Any, world: World) -> None:
    room, seeds = [4, 6, 1], [(7, 0, i) for i in range(3)]
    with TeacherServer(model, name="student", fault=lambda number: failing(503) if number == 1 else None) as server:
        assert served(server, world)(PROMPTS, room, seeds) == [
            likeliest(model, prompt, most) for prompt, most in zip(PROMPTS, room)
        ]
        first = likeliest(model, PROMPTS[0], 1)
        stopped = served(server, world, frozenset(first))(PROMPTS[:1], [4], seeds[:1])
        assert stopped == [first], "its stop token ends an answer, and is part of it"


@pytest.mark.parametrize(
    ("fault", "words"),
    [(failing(500), "answered with status 500"), (garbled, "no JSON")],
)
def test_a_server_that_gives_none_is_lost_to_all(fault: Any, words: str, model: Any, world: World) -> None:
    with (
        TeacherServer(model, name="student", fault=lambda number: fault) as server,
        pytest.raises(LostTeacherError, match=f"the server of the student cannot be asked: .*{words}"),
    ):
        served(server, world, retries=1)(PROMPTS, [1, 1, 1], [(0,)] * 3)


def recipe(**settings: Any) -> tuple[Recipe, OnPolicy]:
    objective = {
        "kind": "distillation",
        "teacher": {"kind": "resident", "path": "teacher"},
        "on_policy_fraction": 0.5,
        "on_policy": settings,
    }
    values = {
        "name": "test",
        "output_dir": "unused",
        "model": {"path": "student"},
        "data": {"train": [{"path": "unused"}]},
        "objective": objective,
    }
    whole: Any = Recipe.model_validate(values)
    return whole, whole.objective.on_policy


def test_what_would_fail_later_fails_before_the_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_WAIT_SECONDS", 0.01)
    with TeacherServer(model, name="student") as server:
        whole, settings = recipe(endpoint=server.address)
        assert served_name(whole, settings) == "student"
        require_student_server(whole, settings, "key")
        whole, settings = recipe(endpoint=server.address, model="another")
        with pytest.raises(UserError, match=r"cannot be asked for answers: .*another. does not exist"):
            require_student_server(whole, settings, "key")
    whole, settings = recipe(endpoint=server.address, retries=0)
    with pytest.raises(UserError, match="cannot be reached"):
        require_student_server(whole, settings, "key")
