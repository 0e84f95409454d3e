"""Loads a trained model to try it: a Hugging Face directory, a Hub id, or the directory of a run or a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from understudy.checkpoint.places import find_model
from understudy.checkpoint.reloading import UNLOADABLE
from understudy.devices.device import find_device
from understudy.errors import UserError
from understudy.models.source import model_directory
from understudy.recipe.schema import Model
from understudy.training.answering import Answered, Sampling, answer_stream

__all__ = [
    "Conversation",
    "LoadedModel",
    "end_tokens",
    "load_model",
    "locate_model",
    "quiet_transformers",
    "seed_sampling",
]

Message = Mapping[str, str]


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device in eval mode, its tokenizer, and the tokens that end an answer."""

    name: str
    """As the user named it."""
    network: Any
    """A transformers causal language model."""
    tokenizer: Any
    """A transformers tokenizer."""
    ends: frozenset[int]

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def prompt_of(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins. Raises `UserError` without a chat
        template, and when the template refuses the conversation."""
        if not self.has_chat_template:
            raise UserError(
                f"{self.name} has no chat template, so it takes no conversations; "
                "complete a text with `understudy generate --raw`."
            )
        try:
            tokens: list[int] = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_dict=False
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template of {self.name} refuses the roles {roles}: {error}") from error
        return tokens

    def answer(self, tokens: Sequence[int], sampling: Sampling, on_text: Callable[[str], None]) -> Answered:
        """Continues `tokens`, handing out text as it forms. Raises `UserError` when they leave the model no room."""
        if not (room := self.room(tokens, sampling.max_new_tokens)):
            raise UserError(
                f"the text has {len(tokens)} tokens, which leaves no room for an answer in the positions that "
                f"{self.name} has; shorten it."
            )
        if not tokens:
            raise UserError("the prompt is empty, and this model's tokenizer adds no token to begin with; give a text.")
        return answer_stream(
            self.network, self.tokenizer, tokens, replace(sampling, max_new_tokens=room), self.ends, on_text
        )

    def room(self, tokens: Sequence[int], wanted: int) -> int:
        """New tokens, at most `wanted`, for which the model has positions behind `tokens`."""
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        return wanted if limit is None else max(0, min(wanted, limit - len(tokens)))


class Conversation:
    """Several turns with a model that has a chat template."""

    def __init__(self, model: LoadedModel, sampling: Sampling, system: str | None = None) -> None:
        self._model = model
        self._sampling = sampling
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)
        model.prompt_of([*self._opening, {"role": "user", "content": "…"}])  # refuses early what it cannot render

    def ask(self, question: str, on_text: Callable[[str], None]) -> Answered:
        """The model's answer, remembered for later turns. An answer cut short by KeyboardInterrupt is remembered as far
        as it came; a question that raises `UserError` is not."""
        messages = [*self._messages, {"role": "user", "content": question}]
        answered = self._model.answer(self._model.prompt_of(messages), self._sampling, on_text)
        self._messages = [*messages, {"role": "assistant", "content": answered.text}]
        return answered

    def reset(self) -> None:
        """Forgets all turns; the system message stays."""
        self._messages = list(self._opening)


def locate_model(named: str, report: Callable[[str], None]) -> Path:
    """The directory of a model, tokenizer included: what `find_model` makes of a directory; a Hub id is downloaded.

    `report` is told which checkpoint was chosen, where there is a choice. Raises `UserError` when there is no such
    model or it is not whole.
    """
    path = Path(named).expanduser()
    if path.is_dir():
        path = find_model(path, report).directory
    elif not path.exists() and (path.is_absolute() or named.startswith((".", "~")) or named.count("/") > 1):
        raise UserError(
            f"there is no directory {named}; name that of a model, a run or a checkpoint, or a Hub id (owner/name)."
        )
    directory = model_directory(Model(path=str(path) if path.exists() else named))
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(f"{directory} has no tokenizer (tokenizer.json); save the model's tokenizer beside it.")
    return directory


def load_model(named: str, report: Callable[[str], None] = lambda line: None) -> LoadedModel:
    """Loads onto this machine's device, in the dtype the device prefers. Code that ships with a model is never run.
    `named` and `report` are as in `locate_model`. Raises `UserError` when it cannot be loaded."""
    quiet_transformers()
    directory = locate_model(named, report)
    device = find_device()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        network, loading = AutoModelForCausalLM.from_pretrained(
            directory, dtype=device.compute_dtypes[0], output_loading_info=True
        )
    except UNLOADABLE as error:
        raise UserError(
            f"the model cannot be loaded: {_first_line(error).rstrip('.')}; name a whole model, or get it again.",
            file=directory,
        ) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"{named} lacks {len(missing)} of its weights, such as {missing[0]}; save or download it again."
        )
    ends = end_tokens(tokenizer, directory)
    # The model's own sampling habits (top_k, repetition penalties …) would mix with what the user asks for.
    network.generation_config = GenerationConfig()
    return LoadedModel(named, network.to(device.torch_device(0)).eval(), tokenizer, ends)


def end_tokens(tokenizer: Any, directory: Path) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's end of sequence, those in `directory`'s generation_config.json, and
    the special token that the chat template puts behind an assistant's words."""
    ends = {tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    file = directory / "generation_config.json"
    if file.is_file():
        try:
            stored = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UserError(f"is not a JSON object ({error}); save or download the model again.", file=file) from error
        ends |= set(stored) if isinstance(stored, list) else {stored}
    return frozenset(token for token in ends if token is not None)


def quiet_transformers() -> None:
    """Keeps transformers' progress bars and advice out of what a command prints; errors still show."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def seed_sampling(seed: int | None) -> None:
    """Makes the random draws that follow repeatable; None leaves them to chance."""
    if seed is not None:
        find_device().seed(seed)


def _end_of_turn(tokenizer: Any) -> int | None:
    if not tokenizer.chat_template:
        return None
    words = "understudy"
    turns = [{"role": "user", "content": "…"}, {"role": "assistant", "content": words}]
    try:
        rendered: str = tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError:
        return None  # a template that refuses this says so when it is asked for a real conversation
    behind = rendered.rpartition(words)[2]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in tokenizer.encode(behind, add_special_tokens=False) if token in special), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
