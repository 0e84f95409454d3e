"""Who answers conversations: a model in this process, or whatever else can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from understudy.data.prompts import Prompt
from understudy.devices.device import find_device
from understudy.errors import OutOfMemoryError, UserError
from understudy.models.architecture import load_config
from understudy.models.tokenizer import load_tokenizer
from understudy.recipe.schema import Model
from understudy.training.answer_parts import Answer
from understudy.training.answering import Sampling, answer_all
from understudy.training.generation import Chance
from understudy.training.inference import end_tokens, load_network, prompt_tokens, quiet_transformers

__all__ = ["Answerer", "AnsweringModel", "ModelAnswerer"]


class Answerer(Protocol):
    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """The index of each of some conversations and what comes next in it, as they are done. The same answer for the
        same prompt, whoever is asked and whatever else is, as far as the arithmetic allows."""
        ...


@dataclass(frozen=True)
class AnsweringModel:
    """A model that answers, before it is loaded."""

    name: str
    """As the user named it."""
    directory: Path
    tokenizer: Path
    chat_template: str | None
    """In place of the tokenizer's own; see `load_tokenizer`."""
    dtype: torch.dtype
    on_host: bool = False
    """Computes on the host's processor, whatever other device there is."""

    def reading(self) -> ConversationReading:
        """Raises `UserError` when it reads no conversations."""
        tokenizer = load_tokenizer(self.tokenizer, self.chat_template)
        if not tokenizer.chat_template:
            raise UserError(
                f"the teacher {self.name} has no chat template, so it answers no conversations; name a model that was "
                "made for them."
            )
        config = load_config(self.directory, Model(path=str(self.directory))).get_text_config()
        return ConversationReading(self.name, tokenizer, getattr(config, "max_position_embeddings", None))

    def to_json(self) -> dict[str, Any]:
        paths = {"directory": str(self.directory), "tokenizer": str(self.tokenizer)}
        return {**asdict(self), **paths, "dtype": str(self.dtype).removeprefix("torch.")}

    @staticmethod
    def of_json(values: Mapping[str, Any]) -> AnsweringModel:
        paths = {name: Path(values[name]) for name in ("directory", "tokenizer")}
        return AnsweringModel(**{**values, **paths, "dtype": getattr(torch, values["dtype"])})


@dataclass(frozen=True)
class ConversationReading:
    """How a model reads what it is to answer."""

    name: str
    tokenizer: Any
    positions: int | None
    """That the model has; None where it has no limit."""

    def tokens(self, prompt: Prompt) -> list[int]:
        """Raises `UserError` when the chat template refuses the conversation."""
        return prompt_tokens(self.tokenizer, self.name, prompt.messages, prompt.tools)

    @property
    def identity(self) -> list[Any]:
        """What decides it, as JSON."""
        return [self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template, self.positions]

    def room(self, length: int, wanted: int) -> int:
        """New tokens, at most `wanted`, for which there are positions behind so many."""
        return wanted if self.positions is None else max(0, min(wanted, self.positions - length))


class ModelAnswerer:
    """Answers with a whole model on this process's device. Draws are seeded by `seed` and a prompt's place in the data,
    so that they depend on nothing else."""

    def __init__(
        self, model: AnsweringModel, local_rank: int, sampling: Sampling, seed: int, batch_tokens: int
    ) -> None:
        """Raises `UserError` when the model cannot be loaded."""
        quiet_transformers()
        device = torch.device("cpu") if model.on_host else find_device().torch_device(local_rank)
        self._network = load_network(model.directory, model.dtype).to(device).eval()
        self._reading = model.reading()
        self._ends = end_tokens(self._reading.tokenizer, model.directory)
        self._sampling = sampling
        self._seed = seed
        self._batch_tokens = batch_tokens

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """Of prompts that the memory does not hold together, one half after the other."""
        try:
            answered = self._together(prompts)
        except torch.OutOfMemoryError as error:
            if len(prompts) == 1:
                raise OutOfMemoryError(
                    "the device ran out of memory over a single answer; lower --max-new-tokens, or take a smaller "
                    "teacher."
                ) from error
        else:
            yield from answered
            return
        middle = len(prompts) // 2  # out of the handler, which keeps alive what filled the memory
        yield from self.answers(prompts[:middle])
        yield from ((middle + i, answer) for i, answer in self.answers(prompts[middle:]))

    def _together(self, prompts: Sequence[Prompt]) -> list[tuple[int, Answer]]:
        tokenizer = self._reading.tokenizer
        tokens = [self._reading.tokens(prompt) for prompt in prompts]
        seeds = [(self._seed, prompt.source, prompt.row) for prompt in prompts]
        chance = Chance(self._sampling.temperature, self._sampling.top_p, seeds)
        answered = []
        for i, new in answer_all(
            self._network,
            tokenizer,
            tokens,
            [self._reading.room(len(prompt), self._sampling.max_new_tokens) for prompt in tokens],
            ends=self._ends,
            batch_tokens=self._batch_tokens,
            chance=chance if self._sampling.temperature else None,
        ):
            finished = bool(new) and new[-1] in self._ends
            said = tokenizer.decode(new[:-1] if finished else new, skip_special_tokens=True)
            answered.append((i, Answer(said, len(new), finished)))
        return answered
