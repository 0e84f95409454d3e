"""A teacher's answers to what the training data asks, as data to train on: sequence-level distillation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from understudy.data.prompts import Prompt, Prompts, training_prompts
from understudy.devices.detect import detect_machine
from understudy.errors import UserError
from understudy.launch.run_directory import RunDirectory
from understudy.models.identity import model_digest
from understudy.models.source import tokenizer_directory
from understudy.models.tokenizer import prepared_tokenizer
from understudy.plan.machine import Machine
from understudy.recipe.environment import cache_directory
from understudy.recipe.objectives import Distillation
from understudy.recipe.rules import check_processes
from understudy.recipe.schema import Model, Recipe
from understudy.recipe.source_map import SourceMap
from understudy.recipe.teachers import BaseTeacher, LocalTeacher, ResidentTeacher
from understudy.strategies.precision import precision_of
from understudy.training.answer_parts import ABOUT, Answer, AnswerKey, AnswerParts
from understudy.training.answerers import AnsweringModel, ConversationReading
from understudy.training.answering import Sampling, batches
from understudy.training.choosing import choose_as_usual
from understudy.training.prepare import data_preparer, grown_model, materialized_model, quantized_model
from understudy.training.start import chosen_processes
from understudy.training.teacher_model import TEACHER, find_directory, teacher_dtype
from understudy.training.teacher_processes import process_directory, run_teacher_processes, stopping_on_request

__all__ = ["AnswersJob", "AnswersWanted", "generate_answers", "key_of"]

TRAINING_TOKENS = 8
"""A text that is answered takes about an eighth of the memory of one that is trained on, or less: of what a layer
computes, keys and values alone are kept."""
MOST_TOGETHER = 64
"""Prompts. More are hardly faster, and a process that is killed loses them."""
FEWEST_BATCHES = 8
"""Where there are so many prompts, so that several processes have something to do with few of them."""


@dataclass(frozen=True)
class AnswersWanted:
    sampling: Sampling
    seed: int | None = None
    """Of draws; `training.seed` when None."""
    max_samples: int | None = None
    """Prompts of the data to answer, the first ones; all when None."""
    drop_unfinished: bool = False
    """Leave out what did not end by itself."""


def generate_answers(
    recipe: Recipe, sources: SourceMap, output: Path, wanted: AnswersWanted, say: Callable[[str], None]
) -> None:
    """Has the recipe's teacher answer the prompts of its training data, in as many processes as training would have,
    and writes `output`: JSON lines in the data's order, each the messages of its row before the last assistant turn and
    the answer. What was answered before an interruption stays, see `AnswerParts`.

    `output` is not there yet, see `require_new_file`. Raises `UserError` at the recipe's line where there is no teacher
    that can answer or no prompt, and where `output` cannot be written; `StoppedError` when asked to stop.
    """
    with stopping_on_request() as requests, ExitStack() as stack:
        with requests.interruptible():
            machine = detect_machine()
            processes = chosen_processes(recipe, sources, machine)
            check_processes(recipe, processes, sources)
            recipe = choose_as_usual(recipe, machine, processes).recipe
            model = _answering_model(recipe, sources, say)
            with sources.placing(TEACHER):
                reading = model.reading()
            prompts = training_prompts(recipe, sources, cache_directory(), wanted.max_samples, say)
            with sources.placing(TEACHER):
                plan = _plan(recipe, reading, prompts.asked, wanted.sampling)
            seed = recipe.training.seed if wanted.seed is None else wanted.seed
            parts = AnswerParts(output)
            stack.enter_context(parts.claimed(_settings(recipe, model, reading, prompts, wanted, seed)))
            answered = parts.answers()
            _say_first(say, model, prompts, plan, len(answered))
        job = AnswersJob(model, output, wanted.sampling, seed, _batch_tokens(recipe))
        _answer(
            job, [batch for batch in plan if any(key_of(each) not in answered for each in batch)], processes, machine
        )
        answered = parts.answers()
        planned = {key_of(each) for batch in plan for each in batch}
        rows = [(each, answered[key]) for each in prompts.asked if (key := key_of(each)) in planned]
        _finish(parts, rows, wanted, say)


@dataclass(frozen=True)
class AnswersJob:
    """What each process is told, beside the batches that are left."""

    model: AnsweringModel
    output: Path
    sampling: Sampling
    seed: int
    batch_tokens: int

    def write(self, directory: RunDirectory, left: Sequence[Sequence[Prompt]]) -> None:
        values = {
            "model": self.model.to_json(),
            "output": str(self.output.absolute()),
            "sampling": asdict(self.sampling),
            "seed": self.seed,
            "batch_tokens": self.batch_tokens,
        }
        directory.job.write_text(json.dumps(values), encoding="utf-8")
        with _batches_file(directory).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps([asdict(prompt) for prompt in batch]) + "\n" for batch in left)

    @staticmethod
    def read(directory: RunDirectory, rank: int, world_size: int) -> tuple[AnswersJob, list[list[Prompt]]]:
        """And the batches of one process."""
        values = json.loads(directory.job.read_text(encoding="utf-8"))
        job = AnswersJob(
            model=AnsweringModel.of_json(values["model"]),
            output=Path(values["output"]),
            sampling=Sampling(**values["sampling"]),
            seed=values["seed"],
            batch_tokens=values["batch_tokens"],
        )
        with _batches_file(directory).open(encoding="utf-8") as file:
            mine = [json.loads(line) for number, line in enumerate(file) if number % world_size == rank]
        return job, [[Prompt(**prompt) for prompt in batch] for batch in mine]


def _batches_file(directory: RunDirectory) -> Path:
    """A line a batch."""
    return directory.path / "batches.jsonl"


def key_of(prompt: Prompt) -> AnswerKey:
    return AnswerKey(prompt.source, prompt.row)


def _answering_model(recipe: Recipe, sources: SourceMap, say: Callable[[str], None]) -> AnsweringModel:
    """The recipe's teacher as a whole model, whatever holds it in training."""
    objective = recipe.objective
    if not isinstance(objective, Distillation):
        raise sources.error(
            "objective",
            "this recipe names no teacher that could answer; say `objective: {kind: distillation, teacher: {kind: "
            "resident, path: …}}`.",
        )
    section = objective.teacher
    if isinstance(section, BaseTeacher):
        return _base(recipe, sources, say)
    if not isinstance(section, LocalTeacher):
        raise sources.error(
            TEACHER,
            f"a teacher of the kind {section.kind} cannot be asked for answers; name one model: `{{kind: resident, "
            "path: …}`.",
        )
    with sources.placing(TEACHER):
        directory = find_directory(section, say)
        on_host = isinstance(section, ResidentTeacher) and section.device == "host"
        dtype, tokenizer = teacher_dtype(recipe, section), tokenizer_directory(Model(path=str(directory)))
        return AnsweringModel(section.path, directory, tokenizer, None, dtype, on_host)


def _base(recipe: Recipe, sources: SourceMap, say: Callable[[str], None]) -> AnsweringModel:
    """The model that the recipe trains an adapter of, as it is loaded for that, without one."""
    with sources.placing("model.tokenizer" if recipe.model.tokenizer else "model.path"):
        tokenizer = prepared_tokenizer(recipe.model, cache_directory())
    data = data_preparer(recipe, sources, tokenizer, say)
    with sources.placing("model.path" if recipe.model.path else "model"):
        whole = quantized_model(recipe, materialized_model(recipe, tokenizer, data, say), say)
        directory = grown_model(recipe, whole, tokenizer)
    name = recipe.model.path or str(directory)
    return AnsweringModel(
        name, directory, tokenizer, recipe.data.chat_template, precision_of(recipe.training.precision).compute
    )


def _batch_tokens(recipe: Recipe) -> int:
    assert recipe.training.micro_batch_tokens != "auto", "the recipe must be resolved first"
    return TRAINING_TOKENS * recipe.training.micro_batch_tokens


def _plan(
    recipe: Recipe, reading: ConversationReading, asked: Sequence[Prompt], sampling: Sampling
) -> list[list[Prompt]]:
    """Prompts that are answered together, the same whatever was answered before and by however many processes, so that
    answers are the same too where a batch's composition moves the arithmetic. Those that leave no room for an answer
    are in none. Raises `UserError` when the teacher's chat template refuses one, or none leaves room."""
    lengths = [_length(recipe, reading, prompt) for prompt in asked]
    room = [reading.room(length, sampling.max_new_tokens) for length in lengths]
    together = batches(lengths, room, _batch_tokens(recipe))
    most = min(MOST_TOGETHER, -(-len(asked) // FEWEST_BATCHES))
    plan = [[asked[i] for i in members[at : at + most]] for members in together for at in range(0, len(members), most)]
    if not plan:
        raise UserError(
            f"no prompt leaves room for an answer in the {reading.positions} positions that the teacher has."
        )
    return plan


def _length(recipe: Recipe, reading: ConversationReading, prompt: Prompt) -> int:
    try:
        return len(reading.tokens(prompt))
    except UserError as error:
        place = f"{recipe.data.train[prompt.source].path}, row {prompt.row + 1}"
        raise UserError(f"{place}: {error.message.rstrip('.')}; change the row, or name another teacher.") from error


def _settings(
    recipe: Recipe,
    model: AnsweringModel,
    reading: ConversationReading,
    prompts: Prompts,
    wanted: AnswersWanted,
    seed: int,
) -> dict[str, Any]:
    """What decides the answers."""
    weights, sampling = model_digest(model.directory, cache_directory()), wanted.sampling
    teacher = [weights, *reading.identity, str(model.dtype)]
    return {
        ABOUT: f"Answers of {model.name} to the training data of {recipe.name}, on their way into a file; "
        "`understudy teacher generate` goes on with them.",
        "teacher": _digest(teacher),
        "data": _digest([asdict(prompt) for prompt in prompts.asked]),
        "max_samples": wanted.max_samples,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        **({"top_p": sampling.top_p, "seed": seed} if sampling.temperature else {}),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _say_first(
    say: Callable[[str], None], model: AnsweringModel, prompts: Prompts, plan: Sequence[Sequence[Prompt]], there: int
) -> None:
    count = sum(map(len, plan))
    say(f"{model.name} answers {count:,} prompts" + (f", of which {there:,} are answered" if there else ""))
    if prompts.without:
        say(f"{prompts.without:,} rows have no prompt, and are left out")
    if longer := len(prompts.asked) - count:
        say(f"{longer:,} prompts leave no room for an answer in the positions that the teacher has, and are left out")


def _answer(job: AnswersJob, left: Sequence[Sequence[Prompt]], processes: int, machine: Machine) -> None:
    if not left:
        return
    with process_directory() as directory:
        job.write(directory, left)
        busy = min(processes, len(left))
        run_teacher_processes("understudy.training.teacher_answers_worker", busy, machine, directory)


def _finish(
    parts: AnswerParts, rows: Sequence[tuple[Prompt, Answer]], wanted: AnswersWanted, say: Callable[[str], None]
) -> None:
    unfinished = sum(not answer.finished for _, answer in rows)
    kept = [row for row in rows if row[1].finished] if wanted.drop_unfinished else rows
    if not kept:
        raise UserError("no answer ended by itself; leave out --drop-unfinished, or begin anew with --max-new-tokens.")
    count = parts.finish(_rows(kept))
    tokens = sum(answer.tokens for _, answer in kept) / count
    say(f"{parts.output}: {count:,} answers of {tokens:,.1f} tokens on average")
    if unfinished:
        what = "are left out" if wanted.drop_unfinished else "are among them; --drop-unfinished leaves such out"
        say(f"{unfinished:,} were cut off after {wanted.sampling.max_new_tokens:,} tokens, and {what}")


def _rows(answered: Sequence[tuple[Prompt, Answer]]) -> Iterator[Mapping[str, Any]]:
    """In the format `messages`."""
    for prompt, answer in answered:
        tools = {"tools": prompt.tools} if prompt.tools else {}
        yield {"messages": [*prompt.messages, {"role": "assistant", "content": answer.text}], **tools}
