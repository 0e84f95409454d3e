"""Weights read by name and by slice, whatever saved them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming

from tests.small_models import CONFIGS, load, recipe
from understudy.devices.cpu import CPU
from understudy.errors import UserError
from understudy.models import build
from understudy.models.build import make_language_model, open_weights
from understudy.models.initialization import materialize_random
from understudy.models.weights import WeightReader

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def llama(cache: Path, tmp_path: Path) -> Path:
    """A copy of a small model that a test may damage."""
    directory = tmp_path / "model"
    shutil.copytree(materialize_random(recipe("llama", CONFIGS["llama"]), 1, cache), directory)
    return directory


def stored(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def store(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def open_as_llama(directory: Path, **config: Any) -> WeightReader:
    model = recipe("llama", CONFIGS["llama"] | config)
    return open_weights(directory, make_language_model(directory, model, CPU()))


def test_slices_are_parts_of_the_stored_tensor(tmp_path: Path) -> None:
    tensors = {"matrix": torch.randn(5, 7).bfloat16(), "vector": torch.arange(4), "scalar": torch.tensor(3.0)}
    store(tmp_path, tensors)
    read = WeightReader(tmp_path)
    assert torch.equal(read("matrix")[1:4, 2:], tensors["matrix"][1:4, 2:])
    assert torch.equal(read("matrix")[1:4], tensors["matrix"][1:4])
    assert torch.equal(read("matrix")[2:2], tensors["matrix"][2:2])
    for name, tensor in tensors.items():
        assert torch.equal(read(name)[:], tensor)
        assert (read(name).shape, read(name).dtype) == (tuple(tensor.shape), tensor.dtype)


def test_shards_are_found_through_their_index(llama: Path) -> None:
    tensors = stored(llama)
    network = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    (llama / "model.safetensors").unlink()
    network.save_pretrained(llama, max_shard_size="10KB")
    assert (llama / "model.safetensors.index.json").is_file()
    read = open_as_llama(llama)
    assert all(torch.equal(read(name)[:], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("change", [lambda name: name.removeprefix("model."), lambda name: f"model.{name}"])
def test_a_base_models_prefix_may_be_missing_or_too_many(change: Any, llama: Path) -> None:
    tensors = stored(llama)
    store(llama, {change(name): tensor for name, tensor in tensors.items()})
    read = open_as_llama(llama)
    assert all(torch.equal(read(name)[:], tensor) for name, tensor in tensors.items())


def test_either_name_of_a_tied_weight_will_do(cache: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    model = recipe("llama", CONFIGS["llama-tied"])
    shutil.copytree(materialize_random(model, 1, cache), directory)
    tensors = stored(directory)
    assert "lm_head.weight" not in tensors
    embedding = tensors.pop("model.embed_tokens.weight")
    store(directory, tensors | {"lm_head.weight": embedding})
    built = load(directory, model)
    names = [name for name, _ in built.network.named_parameters()]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert built.head.weight is built.network.get_input_embeddings().weight
    assert torch.equal(built.head.weight, embedding)


def test_weights_that_transformers_renames_as_it_loads_are_found(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = stored(llama)
    store(llama, {name.replace("mlp.gate_proj", "feed_forward.w1"): tensor for name, tensor in tensors.items()})
    renaming = WeightRenaming("feed_forward.w1", "mlp.gate_proj")
    monkeypatch.setattr(build, "get_model_conversion_mapping", lambda network: [renaming])
    read = open_as_llama(llama)
    assert all(torch.equal(read(name)[:], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2", "opt"])
def test_transformers_loads_random_weights_as_they_are(name: str, cache: Path) -> None:
    model = recipe(name, CONFIGS[name])
    directory = materialize_random(model, 1, cache)
    built = load(directory, model)
    theirs = dict(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).named_parameters())
    ours = dict(built.network.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(parameter, theirs[key]) for key, parameter in ours.items())


def test_constants_of_a_checkpoint_are_loaded_and_offered_for_saving(cache: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    model = recipe("apertus", CONFIGS["apertus"])
    shutil.copytree(materialize_random(model, 1, cache), directory)
    tensors = stored(directory)
    store(directory, tensors | {"model.layers.1.mlp.act_fn.beta": torch.tensor(0.75)})
    constants = make_language_model(directory, model, CPU()).persistent_buffers()
    assert constants.keys() <= tensors.keys()
    assert constants["model.layers.1.mlp.act_fn.beta"] == 0.75
    assert constants["model.layers.0.mlp.act_fn.beta"] == tensors["model.layers.0.mlp.act_fn.beta"]


def test_every_missing_weight_is_counted(llama: Path) -> None:
    tensors = stored(llama)
    for name in [name for name in tensors if "mlp" in name]:
        del tensors[name]
    store(llama, tensors)
    with pytest.raises(UserError, match=r"lacks model\.layers\.0\.mlp.* and 3 more"):
        open_as_llama(llama)


def test_a_shape_that_contradicts_the_configuration_is_named(llama: Path) -> None:
    with pytest.raises(UserError, match=r"lm_head\.weight is \[61, 32\], not \[62, 32\]"):
        open_as_llama(llama, vocab_size=62)


def test_a_truncated_file_is_named(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged") as caught:
        WeightReader(llama)
    assert caught.value.file == str(file)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights"):
        WeightReader(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_refused(text: str, llama: Path) -> None:
    (llama / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="index"):
        WeightReader(llama)


def test_a_shard_that_the_index_names_must_be_there(llama: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-00001-of-00002\.safetensors"):
        WeightReader(llama)
