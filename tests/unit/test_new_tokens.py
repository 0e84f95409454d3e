"""`model.new_tokens`: the tokenizer knows them, embeddings and head have rows for them, and somebody learns them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.small_run import write_tokenizer
from tests.small_models import GPT2_SIZES, SIZES, load, recipe
from understudy.contracts import IGNORED, Batch
from understudy.devices.cpu import CPU
from understudy.errors import UserError
from understudy.models import vocabulary_growth
from understudy.models.adapters.freeze import freeze
from understudy.models.adapters.new_tokens import require_trained_vocabulary
from understudy.models.architecture import load_config
from understudy.models.build import make_language_model, open_weights
from understudy.models.initialization import materialize_random
from understudy.models.tokenizer import load_tokenizer, prepared_tokenizer, vocabulary_of
from understudy.models.vocabulary_growth import Growth, grow_vocabulary, mean_row, read_growth
from understudy.models.weights import NEW_ROWS, WeightReader
from understudy.recipe.adapters import IA3, Adapter, Freeze, LoRA
from understudy.recipe.schema import Model

pytestmark = pytest.mark.unit

OWN = 13
"""Tokens of the tokenizer before."""
TOKENS = ("<tool>", "<call>", "<result>")
SMALL: dict[str, Any] = {**SIZES, "vocab_size": OWN}
# Architecture, and the parameters that have a row for each token.
MODELS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "untied": ("llama", SMALL, {"model.embed_tokens.weight", "lm_head.weight"}),
    "tied": ("llama", {**SMALL, "tie_word_embeddings": True}, {"model.embed_tokens.weight"}),
    "gpt2": (
        "gpt2",
        {**GPT2_SIZES, "vocab_size": OWN, "bos_token_id": 1, "eos_token_id": 2},
        {"transformer.wte.weight"},
    ),
    "head with a bias": ("phi", SMALL, {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}),
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def with_tokens(tokenizer: Path, *tokens: str) -> Model:
    return Model(init="random", tokenizer=str(tokenizer), new_tokens=tokens)


def grown(name: str, tokenizer: Path, cache: Path) -> tuple[Path, Path, Model]:
    """The model before, the model after, and the recipe's section for it."""
    architecture, config, _ = MODELS[name]
    model = recipe(architecture, config).model_copy(update={"tokenizer": str(tokenizer), "new_tokens": TOKENS})
    directory = materialize_random(model, 1, cache)
    return directory, grow_vocabulary(directory, model, prepared_tokenizer(model, cache), CPU(), cache=cache), model


def test_new_tokens_become_special_tokens_behind_the_others(tokenizer: Path, tmp_path: Path) -> None:
    before = AutoTokenizer.from_pretrained(tokenizer)
    made = prepared_tokenizer(with_tokens(tokenizer, *TOKENS), tmp_path)
    after = load_tokenizer(made)
    assert [after.convert_tokens_to_ids(token) for token in TOKENS] == [OWN, OWN + 1, OWN + 2]
    assert vocabulary_of(after) == OWN + 3
    assert set(TOKENS) <= set(after.all_special_tokens)
    assert set(before.all_special_tokens) <= set(after.all_special_tokens)
    assert after("one <call> two").input_ids == [*before("one").input_ids, OWN + 1, *before("two").input_ids]
    assert after.decode(after("one <call> two").input_ids, skip_special_tokens=True).split() == ["one", "two"]
    assert after.chat_template == before.chat_template


def test_tokens_that_the_tokenizer_has_are_left_as_they_are(tokenizer: Path, tmp_path: Path) -> None:
    before = AutoTokenizer.from_pretrained(tokenizer)
    after = load_tokenizer(prepared_tokenizer(with_tokens(tokenizer, "three", "<user>", "<tool>"), tmp_path))
    assert {**before.get_vocab(), "<tool>": OWN} == after.get_vocab()
    assert "three" not in after.all_special_tokens
    assert prepared_tokenizer(with_tokens(tokenizer, "three", "<user>"), tmp_path) == tokenizer
    assert prepared_tokenizer(with_tokens(tokenizer), tmp_path) == tokenizer


def test_a_tokenizer_is_made_once_and_named_by_its_contents(tokenizer: Path, tmp_path: Path) -> None:
    made = prepared_tokenizer(with_tokens(tokenizer, "<tool>"), tmp_path / "cache")
    assert prepared_tokenizer(with_tokens(tokenizer, "<tool>"), tmp_path / "cache") == made
    assert prepared_tokenizer(with_tokens(tokenizer, "<tool>"), tmp_path / "other").name == made.name
    other = prepared_tokenizer(with_tokens(tokenizer, "<call>"), tmp_path / "cache")
    assert sorted(made.parent.iterdir()) == sorted([made, other])
    assert prepared_tokenizer(with_tokens(made, "<tool>"), tmp_path / "cache") == made


@pytest.mark.parametrize("name", MODELS)
def test_a_grown_model_computes_what_transformers_does_with_mean_rows(
    name: str, tokenizer: Path, tmp_path: Path
) -> None:
    directory, larger, model = grown(name, tokenizer, tmp_path / "cache")
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    means = {name: p.double().mean(dim=0).float() for name, p in reference.named_parameters() if len(p) == OWN}
    reference.resize_token_embeddings(OWN + len(TOKENS), mean_resizing=False)
    with torch.no_grad():
        for parameter, mean in means.items():
            reference.get_parameter(parameter)[OWN:] = mean
    assert means.keys() == MODELS[name][2]
    ours = load(larger, model)
    document = torch.tensor([3, OWN, 5, OWN + 2, 7, OWN + 1, 4])
    batch = Batch.of([(document, torch.full_like(document, IGNORED))])
    with torch.no_grad():
        expected = reference.eval()(input_ids=document.unsqueeze(0)).logits[0]
        logits = ours.eval()(batch, logits_at=torch.arange(len(document)))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    probability = logits.double().softmax(dim=1)[:, OWN:]
    assert float(probability.max()) <= 1 / (OWN + len(TOKENS)) + 1e-6  # Hewitt, 2021
    assert ours.config.vocab_size == OWN + len(TOKENS)


@pytest.mark.parametrize("name", MODELS)
def test_any_part_of_a_grown_tensor_is_that_part_of_the_whole(name: str, tokenizer: Path, tmp_path: Path) -> None:
    directory, larger, model = grown(name, tokenizer, tmp_path / "cache")
    read, stored = open_weights(larger, make_language_model(larger, model, CPU())), WeightReader(directory)
    for parameter in MODELS[name][2]:
        tensor, before = read(parameter), stored(parameter)[:]
        whole = torch.cat([before, *[before.double().mean(dim=0, keepdim=True).float()] * len(TOKENS)])
        assert tensor.shape == tuple(whole.shape)
        assert tensor.dtype == whole.dtype
        for rows in [
            (0, 4),
            (4, OWN),
            (OWN - 2, OWN + 1),
            (OWN, OWN + 3),
            (OWN + 1, OWN + 2),
            (0, 0),
            (15, 15),
            (9, 99),
        ]:
            assert_equal(tensor[slice(*rows)], whole[slice(*rows)])
            if whole.ndim == 2:
                columns = slice(3, 11)
                assert_equal(tensor[slice(*rows), columns], whole[slice(*rows), columns])
        for everything in (slice(None), (), (slice(-2, None),)):
            assert_equal(tensor[everything], whole[everything])


def assert_equal(part: Tensor, expected: Tensor) -> None:
    assert part.shape == expected.shape
    torch.testing.assert_close(part, expected, atol=1e-7, rtol=0)


def test_a_mean_is_exact_whatever_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(1001, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(vocabulary_growth, "_CHUNK_ELEMENTS", 64)
    assert torch.equal(mean_row(table), table.double().mean(dim=0).bfloat16())
    assert torch.equal(mean_row(table[:, 0]), table[:, 0].double().mean().bfloat16())


def test_the_grown_directory_is_made_once_and_holds_no_copy_of_the_weights(tokenizer: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    directory, larger, model = grown("untied", tokenizer, cache)
    assert grow_vocabulary(directory, model, prepared_tokenizer(model, cache), CPU(), cache=cache) == larger
    assert read_growth(larger) == Growth(directory.resolve(), OWN + len(TOKENS))
    assert read_growth(directory) is None
    assert (larger / "model.safetensors").resolve() == (directory / "model.safetensors").resolve()
    with safe_open(larger / NEW_ROWS, framework="pt") as rows:
        shapes = {key: tuple(rows.get_tensor(key).shape) for key in rows.keys()}  # noqa: SIM118  # no mapping
    assert shapes == dict.fromkeys(MODELS["untied"][2], (SIZES["hidden_size"],))


def test_rows_that_pad_the_vocabulary_are_used_first(tokenizer: Path, tmp_path: Path) -> None:
    def grow(vocabulary: int) -> tuple[Path, Path]:
        model = recipe("llama", {**SMALL, "vocab_size": vocabulary}).model_copy(
            update={"tokenizer": str(tokenizer), "new_tokens": TOKENS}
        )
        directory = materialize_random(model, 1, tmp_path)
        return directory, grow_vocabulary(directory, model, prepared_tokenizer(model, tmp_path), CPU(), cache=tmp_path)

    directory, same = grow(OWN + 3)
    assert same == directory
    directory, larger = grow(OWN + 2)
    assert WeightReader(larger)("lm_head.weight").shape[0] == WeightReader(directory)("lm_head.weight").shape[0] + 1


def test_a_vocabulary_that_grew_is_not_made_smaller_again_by_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 16}))
    before = {"vocab_size": 13}
    assert load_config(tmp_path, Model(config=before, new_tokens=("<tool>",))).vocab_size == 16
    assert load_config(tmp_path, Model(config={"vocab_size": 20}, new_tokens=("<tool>",))).vocab_size == 20
    assert load_config(tmp_path, Model(config=before)).vocab_size == 13


def test_embeddings_that_are_no_table_are_refused(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Projected(nn.Module):
        weight = nn.Parameter(torch.zeros(OWN, 2))

    def with_other_embeddings(*arguments: Any) -> Any:
        built = make_language_model(*arguments)
        built.network.set_input_embeddings(Projected())
        return built

    monkeypatch.setattr(vocabulary_growth, "make_language_model", with_other_embeddings)
    with pytest.raises(UserError, match=r"embeddings of llama cannot grow .* one table with a row for each token"):
        grown("untied", tokenizer, tmp_path)


def test_another_parameter_that_follows_the_vocabulary_is_refused(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_another(*arguments: Any) -> Any:
        built = make_language_model(*arguments)
        built.network.extra = nn.Parameter(torch.zeros(built.config.vocab_size))
        return built

    monkeypatch.setattr(vocabulary_growth, "make_language_model", with_another)
    with pytest.raises(UserError, match="extra does not follow the vocabulary as they do; use tokens that"):
        grown("untied", tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("name", "adapter", "key", "advice"),
    [
        ("untied", LoRA(), "adapter", r"`adapter.train: \[embeddings, head\]`"),
        ("tied", LoRA(kind="dora"), "adapter", r"`adapter.train: \[embeddings\]`"),
        ("tied", LoRA(path="there"), "adapter", r"train a new adapter with `train: \[embeddings\]`"),
        ("untied", IA3(), "adapter", r"take lora or dora with `train: \[embeddings, head\]`"),
        (
            "untied",
            Freeze(last_layers=1),
            "adapter",
            r"'model\\.embed_tokens\\.weight', 'lm_head\\.weight' to `adapter",
        ),
        ("untied", Freeze(parameters=("embed_tokens",)), "adapter.parameters", r"add 'lm_head\\.weight' to `adapter"),
    ],
)
def test_new_tokens_that_nobody_would_learn_are_refused_with_what_to_add(
    name: str, adapter: Adapter, key: str, advice: str, tmp_path: Path
) -> None:
    architecture, config, _ = MODELS[name]
    model = recipe(architecture, config)
    built = make_language_model(materialize_random(model, 1, tmp_path), model, CPU())
    if isinstance(adapter, Freeze):
        freeze(built, adapter)
    else:
        built.requires_grad_(False)
    with pytest.raises(UserError, match=rf"would never be learned.*{advice}") as caught:
        require_trained_vocabulary(built, adapter)
    assert caught.value.key == key


def test_new_tokens_that_are_learned_are_accepted(tmp_path: Path) -> None:
    model = recipe("llama", SMALL)
    built = make_language_model(materialize_random(model, 1, tmp_path), model, CPU())
    require_trained_vocabulary(built, None)
    adapter = Freeze(parameters=("embed_tokens", "lm_head"))
    freeze(built, adapter)
    require_trained_vocabulary(built, adapter)
