"""Adapters put around a model: what they name, what they begin with, and what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.small_models import assert_decodes_as_it_reads
from understudy.contracts import Batch
from understudy.errors import UserError
from understudy.models.adapters.directory import CONFIG, WEIGHTS, read_base
from understudy.models.identity import model_digest
from understudy.models.language_model import LanguageModel
from understudy.models.names import canonical_name
from understudy.models.prompted import Prompted
from understudy.recipe.schema import Recipe
from understudy.training.adapting import adapted_model, find_adapter
from understudy.training.existing_adapter import require_same_adapter

pytestmark = pytest.mark.unit

DOCUMENTS = (torch.arange(3, 12), torch.arange(20, 25))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))


def recipe(base: Path, adapter: dict[str, Any], **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "output_dir": "unused",
            "model": {"path": str(base)},
            "data": {"train": [{"path": "unused"}]},
            "training": {"precision": "fp32", **training},
            "adapter": adapter,
        }
    )


def first_values(base: Path, adapter: dict[str, Any], **training: Any) -> Path:
    directory = find_adapter(recipe(base, adapter, **training), base, base)
    assert directory is not None
    return directory


def loaded(base: Path, adapter: dict[str, Any], directory: Path | None) -> LanguageModel:
    adapted = adapted_model(recipe(base, adapter), base, directory)
    for module in adapted.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            path = next(n for n, p in adapted.model.named_parameters() if p is parameter)
            values = adapted.read(canonical_name(path))[:].float().clone()
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    return adapted.model.eval()


def logits(base: Path, adapter: dict[str, Any], directory: Path | None) -> torch.Tensor:
    """Ours, of `DOCUMENTS` packed."""
    batch = Batch.of([(tokens, torch.full_like(tokens, -100)) for tokens in DOCUMENTS])
    with torch.no_grad():
        result: torch.Tensor = loaded(base, adapter, directory)(batch, logits_at=torch.arange(len(batch.tokens)))
    return result


def plain_logits(base: Path, directory: Path | None) -> torch.Tensor:
    """transformers' and peft's, one document at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if directory is not None:
        model = peft.PeftModel.from_pretrained(model, str(directory))
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=t[None]).logits[0, -len(t) :] for t in DOCUMENTS])


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "lora", "rank": 4},
        {"kind": "lora", "rank": 4, "init": "gaussian", "rank_stabilized": True, "layers": [1]},
        {"kind": "lora", "rank": 4, "init": "pissa", "rank_stabilized": True},
        {"kind": "dora", "rank": 4, "init": "olora"},
        {"kind": "dora", "rank": 4, "targets": r".*\.(q|v)_proj"},
        {"kind": "ia3"},
        {"kind": "vera", "rank": 8, "targets": ["q_proj", "o_proj"]},
        {"kind": "llama_adapter", "tokens": 3},
    ],
    ids=str,
)
def test_an_adapter_adds_nothing_at_first_here_and_in_peft(base: Path, adapter: dict[str, Any]) -> None:
    directory = first_values(base, adapter)
    expected = plain_logits(base, None)
    torch.testing.assert_close(logits(base, adapter, directory), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(plain_logits(base, directory), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "vera", "llama_adapter", "prompt_tuning"])
def test_any_values_mean_the_same_here_and_in_peft(base: Path, kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "moved"
    shutil.copytree(first_values(base, {"kind": kind}), directory)
    generator = torch.Generator().manual_seed(0)
    moved = {
        key: value + 0.1 * torch.randn(value.shape, generator=generator)
        for key, value in sorted(load_file(directory / WEIGHTS).items())
    }
    save_file(moved, directory / WEIGHTS, {"format": "pt"})
    ours = logits(base, {"kind": kind}, directory)
    assert (ours - plain_logits(base, None)).abs().max() > 1e-3
    torch.testing.assert_close(ours, plain_logits(base, directory), rtol=0, atol=2e-5)
    assert_decodes_as_it_reads(loaded(base, {"kind": kind}, directory))


def test_first_values_depend_on_the_seed_alone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = load_file(first_values(base, {"kind": "lora"}) / WEIGHTS)
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "another"))
    again = load_file(first_values(base, {"kind": "lora"}) / WEIGHTS)
    other = load_file(first_values(base, {"kind": "lora"}, seed=7) / WEIGHTS)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_the_digest_of_a_base_tells_weights_and_not_places(base: Path, tmp_path: Path) -> None:
    moved, changed = tmp_path / "moved", tmp_path / "changed"
    shutil.copytree(base, moved)
    shutil.copytree(base, changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    cache = tmp_path / "digests"
    assert model_digest(base, cache) == model_digest(moved, cache) != model_digest(changed, cache)
    weights["model.norm.weight"][3] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    assert model_digest(changed, cache) == model_digest(changed, tmp_path / "no memory of the file before")


def test_a_prompt_stands_in_front_of_every_document() -> None:
    batch = Batch.of([(torch.arange(2), torch.arange(2)), (torch.arange(3), torch.arange(3))])
    prompted = Prompted.of(batch, 2)
    assert prompted.document_offsets.tolist() == [0, 4, 9]
    assert prompted.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert prompted.rows.tolist() == [2, 3, 6, 7, 8]
    joined = prompted.join(torch.tensor([[-1.0], [-2.0]]), torch.arange(5.0)[:, None])
    assert joined[:, 0].tolist() == [-1, -2, 0, 1, -1, -2, 2, 3, 4]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"kind": "lora", "targets": ["q_prj"]}, r"names q_prj, which no module .* did you mean q_proj\?"),
        ({"kind": "lora", "targets": "nothing.*"}, "names nothing.*, which no module"),
        ({"kind": "lora", "targets": "(q_proj"}, "no regular expression"),
        ({"kind": "lora", "targets": ["q_proj", "lm_head"]}, "the vocabulary head"),
        ({"kind": "lora", "targets": ["norm"]}, "model.norm, which is no linear layer"),
        ({"kind": "lora", "layers": [0, 5]}, "names 5, and the targets are in layers 0 to 1"),
        ({"kind": "dora", "init": "pissa", "rank": 17}, "has 16 directions to begin with"),
        ({"kind": "llama_adapter", "adapted_layers": 3}, "the model has 2 layers"),
        ({"kind": "lora", "path": "/nowhere"}, "/nowhere is no directory"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused(base: Path, adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        first_values(base, adapter)


def without_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


def with_half_a_file(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:100])


def without_configuration(directory: Path) -> None:
    (directory / CONFIG).unlink()


def with_a_broken_configuration(directory: Path) -> None:
    (directory / CONFIG).write_text("{")


def with_less(directory: Path) -> None:
    values = load_file(directory / WEIGHTS)
    del values[min(values)]
    save_file(values, directory / WEIGHTS)


def with_more(directory: Path) -> None:
    save_file({**load_file(directory / WEIGHTS), "base_model.model.extra": torch.zeros(1)}, directory / WEIGHTS)


def of_another_base(directory: Path) -> None:
    values = json.loads((directory / "base_model.json").read_text())
    (directory / "base_model.json").write_text(json.dumps({**values, "digest": "0" * 64, "path": "somebody/else"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, "an adapter without weights"),
        (with_half_a_file, "truncated or damaged"),
        (without_configuration, "is no adapter"),
        (with_a_broken_configuration, "is not valid JSON"),
        (with_less, "adapter of another model .* lacks"),
        (with_more, "for no module of it, extra"),
        (of_another_base, "was trained on somebody/else"),
    ],
)
def test_a_damaged_or_foreign_adapter_is_refused(
    base: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    directory = tmp_path / "adapter"
    shutil.copytree(first_values(base, {"kind": "lora", "rank": 4}), directory)
    damage(directory)
    adapter = {"kind": "lora", "path": str(directory)}
    with pytest.raises(UserError, match=message):
        adapted_model(recipe(base, adapter), base, find_adapter(recipe(base, adapter), base, base))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"kind": "dora"}, "is an adapter of the kind lora, not dora"),
        ({"kind": "ia3"}, "is an adapter of the kind lora, not ia3"),
        ({"kind": "lora", "rank": 8}, "`adapter.rank` is settled by the adapter in .* whose r is 4; remove it"),
        ({"kind": "lora", "init": "pissa"}, "has begun already; remove `adapter.init`"),
    ],
    ids=str,
)
def test_what_an_existing_adapter_has_settled_is_not_said_again(
    base: Path, adapter: dict[str, Any], message: str
) -> None:
    directory = first_values(base, {"kind": "lora", "rank": 4})
    with pytest.raises(UserError, match=message):
        find_adapter(recipe(base, {**adapter, "path": str(directory)}), base, base)
    assert find_adapter(recipe(base, {"kind": "lora", "rank": 4, "path": str(directory)}), base, base) == directory


def test_the_base_is_written_down(base: Path) -> None:
    known = read_base(first_values(base, {"kind": "lora"}))
    assert known is not None
    assert (known.path, known.revision, known.quantization) == (str(base), None, None)
    configuration = json.loads((first_values(base, {"kind": "lora"}) / CONFIG).read_text())
    assert configuration["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"kind": "lora", "rank": 8}, "the r of its adapter is 4, and the recipe's is 8"),
        ({"kind": "lora", "rank": 4, "alpha": 64}, "the lora_alpha of its adapter is 32, and the recipe's is 64"),
        ({"kind": "lora", "rank": 4, "rank_stabilized": True}, "the use_rslora of its adapter is False"),
        ({"kind": "lora", "rank": 4, "targets": ["q_proj"]}, "the target_modules of its adapter is .*'down_proj'"),
        ({"kind": "lora", "rank": 4, "layers": [0]}, "the layers_to_transform of its adapter is None"),
        ({"kind": "lora", "rank": 4, "train": ["head"]}, "the modules_to_save of its adapter is None"),
        ({"kind": "lora", "rank": 2, "alpha": 16, "init": "pissa"}, "its adapter began otherwise"),
        ({"kind": "dora", "rank": 4}, "an adapter of the kind lora, and the recipe trains dora"),
        ({"kind": "ia3"}, "an adapter of the kind lora, and the recipe trains ia3"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_adapter_is_told_apart(base: Path, other: dict[str, Any], message: str) -> None:
    stored = first_values(base, {"kind": "lora", "rank": 4})
    with pytest.raises(UserError, match=message):
        require_same_adapter(stored, first_values(base, other))
    # Dropout and another draw of first values change the training, not what the weights mean.
    require_same_adapter(stored, first_values(base, {"kind": "lora", "rank": 4, "dropout": 0.5, "init": "gaussian"}))
