"""Loads a trained model to try it: whole, or a base and adapters."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from understudy.checkpoint.reloading import UNLOADABLE, reload_adapter
from understudy.data.template import RENDERING_ERRORS
from understudy.devices.device import find_device
from understudy.errors import UserError
from understudy.models.adapters.directory import adapter_settings
from understudy.training.answering import Answered, Sampling, answer_stream
from understudy.training.named_model import NamedModel, locate_model

__all__ = [
    "Conversation",
    "LoadedModel",
    "end_tokens",
    "load_adapters",
    "load_located",
    "load_model",
    "load_network",
    "prompt_tokens",
    "quiet_transformers",
    "seed_sampling",
]

Message = Mapping[str, Any]
_IN_FRONT = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")
"""Kinds of adapters that put vectors in front of the text."""
_PARTS_OF_RUNS = ("model", "checkpoints", "/")


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device in eval mode, its tokenizer, and the tokens that end an answer."""

    name: str
    """As the user named it."""
    network: Any
    """A transformers causal language model, with peft's adapters around it where there are any."""
    tokenizer: Any
    """A transformers tokenizer."""
    ends: frozenset[int]
    vectors: int = 0
    """Positions in front of the text that an adapter takes."""
    adapter: str | None = None
    """The one of the network's adapters that this is, where it has several."""

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def prompt_of(self, messages: Sequence[Message]) -> list[int]:
        """As `prompt_tokens`; raises `UserError` without a chat template too."""
        if not self.has_chat_template:
            raise UserError(
                f"{self.name} has no chat template, so it takes no conversations; "
                "complete a text with `understudy generate --raw`."
            )
        return prompt_tokens(self.tokenizer, self.name, messages)

    def answer(self, tokens: Sequence[int], sampling: Sampling, on_text: Callable[[str], None]) -> Answered:
        """Continues `tokens`, handing out text as it forms. Raises `UserError` when they leave the model no room."""
        if not (room := self.room(tokens, sampling.max_new_tokens)):
            raise UserError(
                f"the text has {len(tokens)} tokens, which leaves no room for an answer in the positions that "
                f"{self.name} has; shorten it."
            )
        if not tokens:
            raise UserError("the prompt is empty, and this model's tokenizer adds no token to begin with; give a text.")
        self.activate()
        return answer_stream(
            self.network, self.tokenizer, tokens, replace(sampling, max_new_tokens=room), self.ends, on_text
        )

    def room(self, tokens: Sequence[int], wanted: int) -> int:
        """New tokens, at most `wanted`, for which the model has positions behind `tokens`."""
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        return wanted if limit is None else max(0, min(wanted, limit - self.vectors - len(tokens)))

    def activate(self) -> None:
        """Makes its adapter the one that `network` runs with, where several share it."""
        if self.adapter is not None:
            self.network.set_adapter(self.adapter)


class Conversation:
    """Several turns with a model that has a chat template."""

    def __init__(self, model: LoadedModel, sampling: Sampling, system: str | None = None) -> None:
        self._sampling = sampling
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)
        self.switch(model)

    def switch(self, model: LoadedModel) -> None:
        """From now on `model` answers; the turns so far stay. Raises `UserError` where it cannot render them."""
        model.prompt_of([*self._messages, {"role": "user", "content": "…"}])
        self._model = model

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


def load_model(named: str, report: Callable[[str], None] = lambda line: None, base: str | None = None) -> LoadedModel:
    """Loads onto this machine's device, in the dtype the device prefers. Code that ships with a model is never run.
    `named`, `report` and `base` are as in `locate_model`. Raises `UserError` when it cannot be loaded."""
    quiet_transformers()
    return load_located(locate_model(named, report, base))


def load_located(found: NamedModel) -> LoadedModel:
    """`load_model` of what was found already."""
    network = load_network(found.weights, find_device().compute_dtypes[0])
    if found.adapter is not None:
        network = reload_adapter(network, found.adapter)
    return _loaded(found, network.to(find_device().torch_device(0)).eval())


def load_adapters(
    named: str, adapters: Sequence[str], report: Callable[[str], None] = lambda line: None
) -> list[LoadedModel]:
    """One model for each of `adapters`, each named like a model; all share the base `named`, which is in memory once.

    Only one of them can answer at a time. Raises `UserError` when something cannot be loaded, and for adapters that
    cannot share a base: of several kinds, or trained on differently quantized ones.
    """
    quiet_transformers()
    names = _short_names(adapters)
    found = [locate_model(adapter, report, named) for adapter in adapters]
    _require_shared_base(found)
    network = load_network(found[0].weights, find_device().compute_dtypes[0])
    keys = [f"adapter{i}" for i in range(len(found))]
    for place, key in zip(found, keys):
        assert place.adapter is not None, "a whole model has no base"
        network = reload_adapter(network, place.adapter, name=key)
    network = network.to(find_device().torch_device(0)).eval()
    return [replace(_loaded(place, network), name=name, adapter=key) for place, name, key in zip(found, names, keys)]


def load_network(directory: Path, dtype: torch.dtype) -> Any:
    """The transformers model in `directory`, whole, without sampling habits of its own. Raises `UserError` when it
    cannot be loaded."""
    try:
        network, loading = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    except UNLOADABLE as error:
        raise _unloadable(directory, error) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"{directory} lacks {len(missing)} of its weights, such as {missing[0]}; save or download it again."
        )
    # The model's own sampling habits (top_k, repetition penalties …) would mix with what the user asks for.
    network.generation_config = GenerationConfig()
    return network


def _loaded(found: NamedModel, network: Any) -> LoadedModel:
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.tokenizer)
    except UNLOADABLE as error:
        raise _unloadable(found.tokenizer, error) from error
    vectors = 0
    if found.adapter is not None and adapter_settings(found.adapter)["peft_type"] in _IN_FRONT:
        vectors = int(adapter_settings(found.adapter)["num_virtual_tokens"])
    return LoadedModel(found.name, network, tokenizer, end_tokens(tokenizer, found.generation), vectors=vectors)


def _unloadable(directory: Path, error: BaseException) -> UserError:
    return UserError(
        f"the model cannot be loaded: {_first_line(error).rstrip('.')}; name a whole model, or get it again.",
        file=directory,
    )


def _short_names(adapters: Sequence[str]) -> list[str]:
    """The name of each adapter's run, or of its directory, where these differ; else what the user typed."""
    short = [
        next((part for part in reversed(Path(adapter).parts) if part not in _PARTS_OF_RUNS), adapter)
        for adapter in adapters
    ]
    names = short if len(set(short)) == len(short) else list(adapters)
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UserError(f"--adapter names {twice} twice; name each adapter once.")
    return names


def _require_shared_base(found: Sequence[NamedModel]) -> None:
    first = found[0]
    for other in found[1:]:
        if other.weights != first.weights:
            raise UserError(
                f"{first.name} and {other.name} were trained on differently quantized copies of their base, so they "
                "cannot share one; ask each alone."
            )
        kinds = [adapter_settings(place.directory)["peft_type"] for place in (first, other)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"{first.name} is an adapter of the kind {kinds[0].lower()} and {other.name} of the kind "
                f"{kinds[1].lower()}, which cannot share a base in memory; ask each alone."
            )


def prompt_tokens(
    tokenizer: Any, name: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins, in the chat template of `tokenizer`, which
    belongs to `name`. Raises `UserError` when the template refuses the conversation."""
    try:
        tokens: list[int] = tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=True, return_dict=False
        )
    except RENDERING_ERRORS as error:
        roles = ", ".join(message["role"] for message in messages)
        words = str(error).strip() or type(error).__name__
        raise UserError(f"the chat template of {name} refuses the roles {roles}: {words}") from error
    return tokens


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
    """Keeps transformers' and peft's progress bars and advice out of what a command prints; errors still show."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\.")
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
