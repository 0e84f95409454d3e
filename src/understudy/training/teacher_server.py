"""A teacher behind servers: found before any process starts by asking each of them once, and asked in each process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from understudy.data.cache import TokenCache
from understudy.errors import UserError
from understudy.models.source import read_config_file, tokenizer_directory
from understudy.models.tokenizer import load_tokenizer, vocabulary_of
from understudy.objectives.teachers.server_client import LostServerError, RefusedRequestError, ServerClient
from understudy.objectives.teachers.server_teacher import REQUESTS_AT_ONCE, ServerTeacher
from understudy.recipe.environment import teacher_key
from understudy.recipe.schema import Model
from understudy.recipe.teachers import ServerTeacher as Section
from understudy.training.job import TeacherPlace
from understudy.training.teacher_cache import Example, Examples
from understudy.training.teacher_model import judge_tokenizer

__all__ = ["find_server", "make_server_teacher"]

PROBE_RETRIES = 2
"""A server that is started first answers by then."""


def find_server(
    section: Section, student_tokenizer: Any, data: Sequence[TokenCache], key: str, report: Callable[[str], None]
) -> TeacherPlace:
    """Asks each endpoint about the longest example of `data`, so that one that would fail later fails now. `key` is
    where the recipe names the teacher. An endpoint that does not answer is left out, and `report` is told.

    Raises `UserError` when none answers, when one refuses, and when the teacher does not read as the student does.
    """
    directory = tokenizer_directory(Model(path=section.path, revision=section.revision))
    shared = judge_tokenizer(directory, section.path, student_tokenizer)
    place = TeacherPlace(None, None, shared, section.endpoints, _classes(directory))
    tokens, supervised = _longest(data)
    live: list[str] = []
    dead: list[str] = []
    for endpoint in section.endpoints:
        teacher = _teacher(section, place, (endpoint,), retries=min(section.retries, PROBE_RETRIES))
        try:
            teacher.document(torch.tensor(tokens), torch.tensor(supervised))
            live.append(endpoint)
        except LostServerError as error:
            dead.append(str(error))
        except RefusedRequestError as error:
            raise UserError(f"the teacher cannot be asked: {error}.", key=key) from error
        finally:
            teacher.close()
    if not live:
        raise UserError(
            f"the teacher cannot be asked: {'; '.join(dead)}. Start its server, or correct `endpoints`.",
            key=f"{key}.endpoints",
        )
    for what in dead:
        report(f"going on without an endpoint of the teacher: {what}")
    return TeacherPlace(None, None, shared, tuple(live), place.classes)


def make_server_teacher(section: Section, place: TeacherPlace, rank: int, say: Callable[[str], None]) -> ServerTeacher:
    """The teacher at `place`, as process `rank` asks it. `say` is told of endpoints that fail for a while."""
    return _teacher(section, place, place.endpoints, section.retries, rank, lambda line: say(f"teacher: {line}"))


def _teacher(
    section: Section,
    place: TeacherPlace,
    endpoints: Sequence[str],
    retries: int,
    turn: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> ServerTeacher:
    requests_at_once = REQUESTS_AT_ONCE * len(endpoints)
    client = ServerClient(
        endpoints,
        timeout_seconds=section.timeout,
        retries=retries,
        key=teacher_key(),
        connections=requests_at_once,
        turn=turn,
        say=say,
    )
    return ServerTeacher(
        client,
        section.model or section.path,
        # No more than there are.
        k=min(section.k, place.shared_classes),
        classes=place.classes,
        requests_at_once=requests_at_once,
    )


def _classes(directory: Path) -> int:
    """Of the teacher's head, which may be padded, as far as the files beside its tokenizer say."""
    config = read_config_file(directory) if (directory / "config.json").is_file() else {}
    stated = (config.get("text_config") or config).get("vocab_size", 0)
    return max(vocabulary_of(load_tokenizer(directory)), int(stated))


def _longest(data: Sequence[TokenCache]) -> Example:
    """Of the examples with anything supervised."""
    examples, longest, first = Examples(tuple(data)), (-1, 0), 0
    for cache in data:
        lengths = cache.lengths * (cache.num_supervised > 0)
        longest = max(longest, (int(lengths.max()), first + int(lengths.argmax())))
        first += len(cache)
    return examples[longest[1]]
