"""What is saved beside the weights: a model must stop where it was trained to stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from understudy.data.builder import CacheWriter, TokenChunk, open_or_build
from understudy.data.cache import TokenCache
from understudy.recipe.schema import Model
from understudy.training.companions import make_companions

pytestmark = pytest.mark.unit

SIZES = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
EOS, PAD, TURN_END, WORD = 1, 2, 3, 7


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "<pad>", "<turn_end>", *"abcdefghijkl"])}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    fast.add_tokens([AddedToken("<turn_end>", special=True)])  # a mark without a role, as Llama 3's end of turn
    return fast


def answers_that_end_with(token: int, tmp_path: Path) -> TokenCache:
    """Two examples: a prompt of two tokens and a supervised answer of two."""

    def fill(writer: CacheWriter) -> dict[str, Any]:
        tokens = np.array([4, 5, 6, token] * 2, np.int32)
        supervised = np.array([0, 0, 1, 1] * 2, np.uint8)
        lengths, counts = np.array([4, 4], np.int32), np.array([2, 2], np.int32)
        writer.append(TokenChunk(tokens, supervised, lengths, counts, np.arange(2, dtype=np.int64), 0))
        return {}

    return open_or_build(tmp_path / "cache", "a" * 64, fill, lambda _: None)


def model_directory(tmp_path: Path, eos: int | list[int]) -> Path:
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "model")
    GenerationConfig(eos_token_id=eos, temperature=0.5, do_sample=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_stops_at_its_own_ends_the_tokenizers_and_those_it_was_trained_on(tmp_path: Path) -> None:
    directory = model_directory(tmp_path, eos=9)
    cache = answers_that_end_with(TURN_END, tmp_path)
    companions = make_companions(directory, Model(path=str(directory)), tokenizer(), cache)
    assert companions.stops == {9, EOS, TURN_END}
    companions.write(tmp_path, architecture="LlamaForCausalLM", dtype=torch.bfloat16)
    written = GenerationConfig.from_pretrained(tmp_path)
    assert (written.eos_token_id, written.temperature, written.pad_token_id) == ([EOS, TURN_END, 9], 0.5, PAD)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])


def test_an_ordinary_word_at_the_end_of_an_answer_is_no_stop(tmp_path: Path) -> None:
    directory = model_directory(tmp_path, eos=EOS)
    cache = answers_that_end_with(WORD, tmp_path)
    assert make_companions(directory, Model(path=str(directory)), tokenizer(), cache).stops == {EOS}


def test_a_random_model_takes_the_tokenizers_special_tokens_unless_the_recipe_names_them(tmp_path: Path) -> None:
    directory = model_directory(tmp_path, eos=9)
    cache = answers_that_end_with(EOS, tmp_path)
    companions = make_companions(directory, Model(init="random", config=SIZES), tokenizer(), cache)
    assert (companions.config.eos_token_id, companions.config.pad_token_id, companions.stops) == (EOS, PAD, {EOS})
    named = Model(init="random", config={**SIZES, "eos_token_id": TURN_END})
    companions = make_companions(directory, named, tokenizer(), cache)
    assert companions.config.eos_token_id == TURN_END
    assert companions.stops == {EOS, TURN_END}


def test_overrides_of_the_configuration_are_saved(tmp_path: Path) -> None:
    directory = model_directory(tmp_path, eos=EOS)
    model = Model(path=str(directory), config={"attention_dropout": 0.25})
    make_companions(directory, model, tokenizer(), answers_that_end_with(EOS, tmp_path)).write(
        tmp_path, architecture="LlamaForCausalLM", dtype=torch.float32
    )
    assert LlamaConfig.from_pretrained(tmp_path).attention_dropout == 0.25
