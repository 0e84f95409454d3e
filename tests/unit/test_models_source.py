"""From a recipe's `model` section to a directory, a configuration and a tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.small_models import CONFIGS, recipe
from understudy.devices.cpu import CPU
from understudy.errors import UserError
from understudy.models.build import make_language_model
from understudy.models.initialization import materialize_random
from understudy.models.source import model_directory, read_config, tokenizer_directory
from understudy.models.tokenizer import load_tokenizer
from understudy.recipe.schema import Model

pytestmark = pytest.mark.unit


def make_directory(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text('{"model_type": "llama", "hidden_size": 8}')
    return path


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "model", "config.json", "model.safetensors", "tokenizer.json")
    model = Model(path=str(directory))
    assert model_directory(model) == directory
    assert tokenizer_directory(model) == directory


def test_the_tokenizer_may_come_from_elsewhere(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "tokenizer", "tokenizer.json")
    assert tokenizer_directory(Model(path="some/model", tokenizer=str(directory))) == directory


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.safetensors"], "no config.json"),
        (["config.json"], "no weights"),
        (["config.json", "pytorch_model.bin"], "convert it .*save_pretrained"),
        (["config.json", "model.gguf"], "convert it"),
    ],
)
def test_an_incomplete_directory_is_refused(files: list[str], message: str, tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "model", *files)
    with pytest.raises(UserError, match=message):
        model_directory(Model(path=str(directory)))


def test_random_weights_need_only_a_configuration(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "model", "config.json")
    assert model_directory(Model(path=str(directory), init="random")) == directory


@pytest.mark.parametrize("path", ["/no/such/directory", "./model", "a/b/c", "~/no-such-model"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(UserError, match="there is no directory"):
        model_directory(Model(path=path))


def test_only_what_is_needed_is_downloaded_at_the_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "snapshot", "config.json", "model.safetensors")
    asked: dict[str, Any] = {}

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_directory(Model(path="owner/name", revision="v2")) == directory
    assert (asked["name"], asked["revision"]) == ("owner/name", "v2")
    assert "*.safetensors" in asked["patterns"]
    assert not any("bin" in pattern for pattern in asked["patterns"])


def test_without_network_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="owner/name is not a directory here, and the Hub cannot be reached"):
        model_directory(Model(path="owner/name"))


def test_overrides_lie_over_the_stored_configuration(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "model", "config.json")
    merged = read_config(Model(path=str(directory), config={"hidden_size": 16, "vocab_size": 5}))
    assert merged == {"model_type": "llama", "hidden_size": 16, "vocab_size": 5}


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_configuration_is_named(text: str, tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "model")
    (directory / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="JSON") as caught:
        read_config(Model(path=str(directory)))
    assert caught.value.file == str(directory / "config.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 8}, "names no model_type"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "llama", "hiden_size": 8}, "hiden_size is no field of llama; did you mean 'hidden_size'"),
        ({"model_type": "llama", "hidden_size": "wide"}, "can build no"),
        (CONFIGS["llama"] | {"model_type": "llama", "num_attention_heads": 3}, "can build no"),
        (CONFIGS["gemma2"] | {"model_type": "gemma2", "layer_types": ["full_attention"]}, "can build no"),
        ({"model_type": "vit"}, "vit is no causal language model"),
    ],
)
def test_a_configuration_of_no_model_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        materialize_random(Model(init="random", config=config), 0, tmp_path)
    assert not [path for path in (tmp_path / "models").glob("*") if path.is_dir()]


def test_random_weights_are_a_function_of_configuration_and_seed(tmp_path: Path) -> None:
    def weights(seed: int, cache: str) -> Any:
        directory = materialize_random(recipe("llama", CONFIGS["llama"]), seed, tmp_path / cache)
        return load_file(directory / "model.safetensors")["lm_head.weight"]

    state = torch.get_rng_state()
    first, again, other = weights(1, "a"), weights(1, "b"), weights(2, "a")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left alone"


def test_random_weights_are_made_once(tmp_path: Path) -> None:
    model = recipe("llama", CONFIGS["llama"])
    directory = materialize_random(model, 1, tmp_path)
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert materialize_random(model, 1, tmp_path) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in directory.parent.iterdir() if path.is_dir()] == [directory.name]


def test_parameters_are_on_meta_and_buffers_are_real(tmp_path: Path) -> None:
    model = recipe("llama", CONFIGS["llama"])
    built = make_language_model(materialize_random(model, 1, tmp_path), model, CPU())
    assert {(p.device.type, p.dtype) for p in built.parameters()} == {("meta", torch.float32)}
    assert {buffer.device.type for buffer in built.buffers()} == {"cpu"}
    assert [len(built.decoder_layers()), type(built.decoder_layers()[0]).__name__] == [2, "LlamaDecoderLayer"]


def make_tokenizer(directory: Path) -> Path:
    directory.mkdir()
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "own {{ messages }}"})
    )
    return directory


def test_a_chat_template_replaces_the_tokenizers_own(tmp_path: Path) -> None:
    directory = make_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "mine.jinja"
    file.write_text("file {{ messages }}")
    assert load_tokenizer(directory).chat_template == "own {{ messages }}"
    assert load_tokenizer(directory, "text {{ messages }}").chat_template == "text {{ messages }}"
    assert load_tokenizer(directory, str(file)).chat_template == "file {{ messages }}"
    with pytest.raises(UserError, match="no file, no Jinja string and no template of the tokenizer"):
        load_tokenizer(directory, "chatml")


def test_one_of_several_chat_templates_is_chosen_by_name(tmp_path: Path) -> None:
    directory = make_tokenizer(tmp_path / "tokenizer")
    named = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": named}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(directory, "rag").chat_template == "b"
    with pytest.raises(UserError, match="its templates are default, rag"):
        load_tokenizer(directory, "tool_use")


def test_a_directory_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory, which has no revisions") as caught:
        model_directory(Model(path=str(tmp_path), revision="main"))
    assert caught.value.key == "model.revision"


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_broken_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    directory = make_tokenizer(tmp_path / "tokenizer")
    (directory / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="no tokenizer that can be loaded"):
        load_tokenizer(directory)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        tokenizer_directory(Model(path=str(make_directory(tmp_path / "model", "config.json"))))


def test_source_and_detection_import_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import understudy.models.source, understudy.devices.detect"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
