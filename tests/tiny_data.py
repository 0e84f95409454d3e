"""A tiny tokenizer, recipes around small files, and token caches made of plain lists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.chat_templates import CHATML
from understudy.data.builder import TokenChunk, open_or_build
from understudy.data.cache import TokenCache
from understudy.data.prepare import PreparedData, prepare_data
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap

SPECIAL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|end_header|>", "<|eot|>",
                  "<start_of_turn>", "<end_of_turn>")  # fmt: skip
_TEXT = "the quick brown fox asks the assistant what the user said; the assistant answers the user.\n" * 4


@cache
def tokenizer_json(*, add_bos: bool = False) -> str:
    """A byte-level BPE of some 300 tokens; GPT-2's kind of offsets, white space left out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    byte_level = processors.ByteLevel(trim_offsets=True)
    if add_bos:
        bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
        tokenizer.post_processor = processors.Sequence([byte_level, bos])
    else:
        tokenizer.post_processor = byte_level
    return tokenizer.to_str()


def write_tokenizer(directory: Path, *, chat_template: str | None = CHATML, add_bos: bool = False) -> Path:
    """A tokenizer directory as `save_pretrained` leaves it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_json(add_bos=add_bos))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(*paths: Path | str, model: str = "unused", seed: int = 0, **data: Any) -> Recipe:
    """A recipe that trains on `paths`; a dictionary among them gives the whole source."""
    train = [path if isinstance(path, dict) else {"path": str(path)} for path in paths]
    return Recipe.model_validate(
        {
            "name": "tiny",
            "output_dir": "runs/tiny",
            "model": {"path": model},
            "data": {"train": train, "max_length": 256, "num_workers": 1, **data},
            "training": {"seed": seed},
        }
    )


def prepare(made: Recipe, tokenizer: Path, cache_dir: Path, **options: Any) -> PreparedData:
    lines = {"data": 3, "data.train": 4, "data.max_length": 9, "model": 1, "model.path": 2}
    lines |= {f"data.train.{number}.path": 5 + number for number in range(3)}
    settings = {"vocab_size": None, "report": lambda line: None, **options}
    return prepare_data(made, SourceMap("recipe.yaml", lines), tokenizer_dir=tokenizer, cache_dir=cache_dir, **settings)


def cache_of(root: Path, examples: Sequence[tuple[Sequence[int], Sequence[int]]], key: str = "key") -> TokenCache:
    """A token cache of (tokens, supervised flags), with the source of each its index modulo 2."""

    def fill(writer: Any) -> dict[str, Any]:
        for number, (tokens, flags) in enumerate(examples):
            writer.append(
                TokenChunk(
                    tokens=np.array(tokens, np.int32),
                    supervised=np.array(flags, np.uint8),
                    lengths=np.array([len(tokens)], np.int32),
                    num_supervised=np.array([sum(flags[1:])], np.int32),
                    row=np.array([number]),
                    source=number % 2,
                )
            )
        return {}

    return open_or_build(root, key, fill, lambda line: None)
