"""A teacher that is a model of its own: found, judged and opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from understudy.contracts import LazyTensor
from understudy.devices.device import find_device
from understudy.errors import UserError
from understudy.models.build import make_language_model, open_weights
from understudy.models.identity import model_digest
from understudy.models.language_model import LanguageModel
from understudy.models.quantization.materialize import materialize_quantized
from understudy.models.source import model_directory, read_config, tokenizer_directory
from understudy.models.tokenizer import load_tokenizer
from understudy.recipe.environment import cache_directory
from understudy.recipe.schema import Model, Recipe
from understudy.recipe.teachers import LocalTeacher, ResidentTeacher
from understudy.strategies.precision import precision_of

__all__ = [
    "TEACHER",
    "OpenedTeacher",
    "classes_of",
    "find_directory",
    "judge_teacher",
    "judge_tokenizer",
    "open_teacher",
    "require_positions",
    "teacher_dtype",
]

TEACHER = "objective.teacher"
"""Where a recipe names one."""


class OpenedTeacher(NamedTuple):
    directory: Path
    model: LanguageModel
    """On the meta device."""
    read: Callable[[str], LazyTensor]
    """Gives its weights."""


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def teacher_dtype(recipe: Recipe, section: LocalTeacher) -> torch.dtype:
    """What the teacher computes in."""
    return _DTYPES.get(section.precision) or precision_of(recipe.training.precision).compute


def find_directory(
    section: LocalTeacher, report: Callable[[str], None] = lambda line: None, key: str = TEACHER
) -> Path:
    """The teacher as it is loaded: found, and where the recipe asks for it quantized, once. Raises `UserError` when
    there is no such teacher; `key` is where the recipe names it."""
    try:
        directory = model_directory(Model(path=section.path, revision=section.revision))
    except UserError as error:  # which is about `model`, where another model stands
        if error.key is None or error.file is not None:
            raise
        message = error.message.replace(error.key, key + error.key.removeprefix("model"))
        raise UserError(message, key=key + error.key.removeprefix("model")) from error
    if not isinstance(section, ResidentTeacher) or section.quantization is None:
        return directory
    cache = cache_directory()
    return materialize_quantized(
        directory, section.quantization, identity=model_digest(directory, cache), cache=cache, report=report
    )


def open_teacher(directory: Path, dtype: torch.dtype) -> OpenedTeacher:
    """Raises `UserError` for what cannot be a teacher."""
    settings = Model(path=str(directory))
    model = make_language_model(directory, settings, find_device(), quantized_dtype=dtype)
    return OpenedTeacher(directory, model, open_weights(directory, model))


def judge_teacher(
    opened: OpenedTeacher, name: str, student_tokenizer: Any, student_classes: int | None, longest: int
) -> int:
    """How many of the first classes mean the same to the teacher, called `name`, and to the student. Raises `UserError`
    when the teacher does not read as the student does, or has fewer positions than the `longest` example."""
    require_positions(opened, longest)
    shared = judge_tokenizer(tokenizer_directory(Model(path=str(opened.directory))), name, student_tokenizer)
    # Of heads that are equally long the padding is alike too, and a student must learn never to say it.
    classes = int(opened.model.config.get_text_config().vocab_size)
    return classes if classes == student_classes else shared


def classes_of(recipe: Recipe) -> int | None:
    """Of the student's head; None where its tokenizer alone tells."""
    config = read_config(recipe.model)
    if recipe.model.new_tokens:
        return None
    size = (config.get("text_config") or config).get("vocab_size")
    return size if isinstance(size, int) else None


def require_positions(opened: OpenedTeacher, longest: int) -> None:
    """Raises `UserError` when the teacher has fewer positions than the `longest` example."""
    limit = opened.model.document_limit
    if limit is not None and longest > limit:
        raise UserError(
            f"the longest example has {longest:,} tokens, and the teacher has positions for {limit:,}; "
            "set data.max_length to at most that.",
            key="data.max_length",
        )


def judge_tokenizer(directory: Path, name: str, student_tokenizer: Any) -> int:
    """How many of the first tokens are the same to the tokenizer of the teacher called `name`, in `directory`, and to
    the student's. Raises `UserError` when it is not all that both have: their distributions are then over other
    things."""
    tokenizers = (load_tokenizer(directory), student_tokenizer)
    theirs, ours = ({token: text for text, token in tokenizer.get_vocab().items()} for tokenizer in tokenizers)
    common = int(min(max(theirs), max(ours))) + 1
    different = next((token for token in range(common) if theirs.get(token) != ours.get(token)), None)
    if different is not None:
        raise UserError(
            f"the teacher {name} has another tokenizer than the student: token {different:,} is "
            f"{theirs.get(different)!r} to it and {ours.get(different)!r} to the student; name a teacher of the same "
            "family, or set `objective.divergence: uld` with a resident or sharded one."
        )
    return common
