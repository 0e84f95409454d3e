"""What stands beside the weights of a saved model: configuration, generation defaults, tokenizer, chat template."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from understudy.data.batching import prompt_and_answer
from understudy.data.cache import TokenCache
from understudy.errors import UserError
from understudy.models.adapters.directory import SETTINGS
from understudy.models.architecture import load_config
from understudy.recipe import schema

__all__ = ["Companions", "make_companions", "special_ids"]

EXAMINED_ANSWERS = 64
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Companions:
    config: PreTrainedConfig
    generation: GenerationConfig
    tokenizer: Any
    """The transformers tokenizer that training used, with its chat template."""
    code: tuple[Path, ...]
    """Modules of a model that ships its own; it does not load without them."""
    adapter: Path | None
    """The adapter directory that training began with, whose settings stand in place of the model's configuration."""

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ends = self.generation.eos_token_id
        return frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])

    def write(self, directory: Path, *, architecture: str, dtype: torch.dtype) -> None:
        """Writes all of it. `architecture` is the transformers class that loads the weights."""
        if self.adapter is None:
            self.config.architectures = [architecture]
            self.config.dtype = str(dtype).removeprefix("torch.")
            self.config.save_pretrained(directory)
        else:
            for name in SETTINGS:
                if (self.adapter / name).is_file():
                    shutil.copy(self.adapter / name, directory / name)
        self.generation.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        for source in self.code:
            shutil.copy(source, directory / source.name)


def make_companions(
    model_directory: Path, model: schema.Model, tokenizer: Any, train: TokenCache, adapter: Path | None = None
) -> Companions:
    """The companions of the model that is trained from `model_directory` on `train`, or of an `adapter` of it.

    A model that was trained to end its turns with a token must stop there when it generates: to the model's own end
    tokens come the tokenizer's and those that training answers end with. A random model has no special tokens of its
    own, so it gets the tokenizer's.
    """
    config = load_config(model_directory, model)
    if model.init == "random":
        for name in SPECIAL_TOKENS:
            if name not in model.config:
                setattr(config, name, getattr(tokenizer, name))
    generation = _stored_generation(model_directory) if model.init != "random" else None
    generation = generation or GenerationConfig.from_model_config(config)
    own = generation.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *_answer_ends(train, tokenizer)}
    known = sorted(token for token in ends if token is not None)
    generation.eos_token_id = known[0] if len(known) == 1 else known or None
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    code = tuple(model_directory.glob("*.py")) if getattr(config, "auto_map", None) else ()
    return Companions(config, generation, tokenizer, () if adapter else code, adapter)


def _stored_generation(model_directory: Path) -> GenerationConfig | None:
    file = model_directory / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(model_directory)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        words = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(f"holds no generation defaults ({words}); repair or remove it.", file=file) from error


def _answer_ends(train: TokenCache, tokenizer: Any) -> set[int]:
    """The special tokens that answers end with, such as a chat template's end of turn."""
    answers = [prompt_and_answer(train, i)[1] for i in range(min(EXAMINED_ANSWERS, len(train.lengths)))]
    return {int(answer[-1]) for answer in answers if len(answer)} & special_ids(tokenizer)


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that are marks, not text: those with a role, and added ones such as Llama 3's end of turn, which has
    none."""
    return {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}.union(
        tokenizer.all_special_ids
    )
