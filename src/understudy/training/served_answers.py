"""A student's answers from a server that serves it, in place of generating them in these processes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from understudy.errors import UserError
from understudy.objectives.teachers.server_client import ServerClient, ServerError
from understudy.parallel.world import World
from understudy.recipe.environment import teacher_key
from understudy.recipe.objectives import OnPolicy
from understudy.recipe.schema import Recipe
from understudy.training.asking import AgreedWaiting

__all__ = ["ServedAnswers", "require_student_server", "served_name"]

REQUESTS_AT_ONCE = 32
"""Of each process: a server batches what it has at one time."""
_SEEDS = 2**31


class ServedAnswers:
    """Asks an OpenAI-compatible endpoint to go on with prompts. It must give the ids of the tokens that it drew, as
    vLLM does from 0.10.2 on: their text may be read as other tokens. The key is the teacher's
    (`UNDERSTUDY_TEACHER_API_KEY`)."""

    def __init__(self, settings: OnPolicy, name: str, stops: frozenset[int], waiting: AgreedWaiting, world: World):
        self._settings = settings
        self._name = name
        self._stops = stops
        self._waiting = waiting
        self._world = world
        self._client = _client(settings, settings.retries)
        self._pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="answers")

    def __call__(
        self, prompts: Sequence[Tensor], room: Sequence[int], seeds: Sequence[tuple[int, ...]]
    ) -> list[list[int]]:
        """See `on_policy.Answers`. Raises `LostTeacherError` and `StoppedWaitingError` on all ranks alike."""
        mine = range(self._world.rank, len(prompts), self._world.size)
        questions = [
            _question(self._settings, self._name, self._stops, prompts[i].tolist(), room[i], seeds[i]) for i in mine
        ]
        told = self._waiting.wait(self._waiting.begin(lambda: list(self._pool.map(self._answer, questions))))
        shares: list[list[list[int]]] = [[] for _ in range(self._world.size)]
        dist.all_gather_object(shares, told)
        return [shares[i % self._world.size][i // self._world.size] for i in range(len(prompts))]

    def _answer(self, question: dict[str, Any]) -> list[int]:
        return self._client.post("/completions", question, lambda told: _read(told, question))


def require_student_server(recipe: Recipe, settings: OnPolicy, key: str) -> None:
    """Asks once for one token, so that an endpoint that would fail later fails now. Raises `UserError`."""
    client = _client(settings, min(settings.retries, 2))
    question = _question(settings, served_name(recipe, settings), frozenset(), [0], 1, (0,))
    try:
        client.post("/completions", question, lambda told: _read(told, question))
    except ServerError as error:
        raise UserError(f"the student cannot be asked for answers: {error}.", key=key) from error
    finally:
        client.close()


def served_name(recipe: Recipe, settings: OnPolicy) -> str:
    """Under which the endpoint serves the student."""
    return settings.model or recipe.model.path or recipe.name


def _client(settings: OnPolicy, retries: int) -> ServerClient:
    assert settings.endpoint is not None, "somebody else answers"
    return ServerClient(
        [settings.endpoint],
        timeout_seconds=settings.timeout,
        retries=retries,
        key=teacher_key(),
        connections=REQUESTS_AT_ONCE,
    )


def _question(
    settings: OnPolicy, name: str, stops: frozenset[int], prompt: list[int], room: int, seed: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "model": name,
        "prompt": prompt,
        "max_tokens": room,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": int(np.random.SeedSequence(seed).generate_state(1)[0]) % _SEEDS,
        "stop_token_ids": sorted(stops),
        "return_token_ids": True,
    }


def _read(told: Any, question: dict[str, Any]) -> list[int]:
    """The tokens of an answer. Raises `ValueError`, which says what the server did."""
    try:
        tokens = told["choices"][0]["token_ids"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("gave no `token_ids`, which vLLM gives from 0.10.2 on") from None
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise ValueError("gave `token_ids` that are no list of numbers")
    if len(tokens) > question["max_tokens"]:
        raise ValueError(f"gave {len(tokens)} tokens where {question['max_tokens']} were asked for")
    return tokens
