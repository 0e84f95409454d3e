"""generate, chat, evaluate and verify of adapters, and how their base is found."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.small_run import WORDS
from tests.small_adapters import CONFIGS, VOCABULARY, peft_network, write_adapter, write_model, write_trained
from understudy.checkpoint.adapter_base import BaseNotFoundError, find_base
from understudy.checkpoint.places import examine, find_model
from understudy.cli.main import exit_status
from understudy.errors import UserError
from understudy.launch.run_lock import MARKER
from understudy.training.answering import Sampling
from understudy.training.inference import Conversation, load_adapters, load_model

pytestmark = pytest.mark.unit

KINDS = ("lora", "dora", "ia3", "llama_adapter", "prompt_tuning")
SAMPLING = Sampling(8)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setenv("UNDERSTUDY_CACHE", str(directory))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.setenv(name, "")  # so that undoing it removes what evaluate sets
            patch.delenv(name)
        yield directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained adapter a kind, and a second LoRA."""
    directory = tmp_path_factory.mktemp("adapters")
    for kind in KINDS:
        write_trained(write_adapter(directory / kind, base, CONFIGS[kind]), base, cache)
    write_trained(write_adapter(directory / "other", base, CONFIGS["lora"], seed=3), base, cache)
    return directory


@pytest.fixture
def adapter(adapters: Path, tmp_path: Path) -> Path:
    """A LoRA to do anything with."""
    return Path(shutil.copytree(adapters / "lora", tmp_path / "adapter"))


def likeliest(base: Path, adapter: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by whole forward passes through peft in fp64, without a cache."""
    network, tokens = peft_network(base, adapter), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(network(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that is refused."""
    capsys.readouterr()
    assert exit_status(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def point_elsewhere(adapter: Path, place: str) -> None:
    for name, key in (("base_model.json", "path"), ("adapter_config.json", "base_model_name_or_path")):
        if (adapter / name).is_file():
            values = json.loads((adapter / name).read_text())
            (adapter / name).write_text(json.dumps({**values, key: place}))


# Answers


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_answers_as_peft_computes_it(base: Path, adapters: Path, kind: str) -> None:
    loaded = load_model(str(adapters / kind))
    prompt = loaded.prompt_of([{"role": "user", "content": "three"}])
    expected = likeliest(base, adapters / kind, prompt, 8)
    ends = [i for i, token in enumerate(expected) if token in loaded.ends]
    answered = loaded.answer(prompt, SAMPLING, lambda text: None)
    assert list(answered.tokens) == expected[: ends[0] + 1 if ends else None]


def test_vectors_in_front_of_the_text_take_positions(adapters: Path) -> None:
    assert load_model(str(adapters / "prompt_tuning")).room([1] * 100, 999) == 128 - 100 - 3
    assert load_model(str(adapters / "lora")).room([1] * 100, 999) == 128 - 100


def test_adapters_that_share_a_base_compute_what_each_computes_alone(base: Path, adapters: Path) -> None:
    tokens = torch.tensor([[2, 6, 9, 4, 3, 8]])
    names = ["lora", "dora", "other"]
    shared = load_adapters(str(base), [str(adapters / name) for name in names])
    assert [model.name for model in shared] == names
    assert len({id(model.network) for model in shared}) == 1
    alone = {name: load_model(str(adapters / name)).network(input_ids=tokens).logits for name in names}
    for model in [*shared, *reversed(shared)]:
        model.activate()
        assert torch.equal(model.network(input_ids=tokens).logits, alone[model.name])
    assert not torch.allclose(alone["lora"], alone["other"])


def test_generate_gives_each_adapters_answer_under_its_name(
    base: Path, adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "three", "--max-new-tokens", "8"]
    alone = {}
    for name in ("lora", "other"):
        assert exit_status(["generate", str(adapters / name), *options]) == 0
        alone[name] = capsys.readouterr().out
    both = ["--adapter", str(adapters / "lora"), "--adapter", str(adapters / "other")]
    assert exit_status(["generate", str(base), *both, *options]) == 0
    assert capsys.readouterr().out == f"lora:\n{alone['lora']}other:\n{alone['other']}"
    assert exit_status(["generate", str(base), *both, *options, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [(a["adapter"], a["text"]) for a in answers] == [(name, alone[name][:-1]) for name in alone]


def test_chat_switches_adapters_and_keeps_the_conversation(
    base: Path, adapters: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [str(adapters / name) for name in ("lora", "other")]
    first, second = load_adapters(str(base), places)
    conversation = Conversation(first, SAMPLING)
    expected = [conversation.ask("three", lambda text: None).text]
    conversation.switch(second)
    expected.append(conversation.ask("four", lambda text: None).text)
    monkeypatch.setattr("sys.stdin", io.StringIO("three\n/adapter other\nfour\n/adapter third\n"))
    arguments = ["chat", str(base), "--adapter", places[0], "--adapter", places[1], "--max-new-tokens", "8"]
    assert exit_status(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{text}\n" for text in expected)
    assert "there is no adapter 'third'; its name must be one of lora, other" in captured.err


# evaluate


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_an_adapter_is_that_of_peft_over_each_example_alone(
    base: Path, adapters: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": WORDS[i], "output": " ".join(WORDS[i + 1 : i + 3])} for i in range(5)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        "model: {path: some/other-model}\n"
        "adapter: lora\n"
        f"data: {{train: [{{path: {tmp_path}/no.jsonl}}], eval: [{{path: {tmp_path}/eval.jsonl, format: alpaca}}], "
        "max_length: 16}\n"
        "training: {micro_batch_tokens: 20, precision: fp32}\n"
    )
    capsys.readouterr()
    assert exit_status(["evaluate", str(adapters / kind), str(tmp_path / "recipe.yaml"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    network, tokenizer = peft_network(base, adapters / kind), load_model(str(base)).tokenizer
    loss, count = 0.0, 0
    for row in rows:
        prompt = tokenizer.encode(f"<user> {row['instruction']} <end> <assistant>")
        tokens = torch.tensor([prompt + tokenizer.encode(f"{row['output']} <end>")])
        with torch.no_grad():
            predicted = network(input_ids=tokens).logits[0, -tokens.shape[1] :][len(prompt) - 1 : -1]
        answer = tokens[0, len(prompt) :]
        loss += float(torch.nn.functional.cross_entropy(predicted, answer, reduction="sum"))
        count += len(answer)
    assert scores["supervised_tokens"] == count
    assert scores["loss"] == pytest.approx(loss / count, rel=1e-5)


# The base


def test_every_way_to_name_an_adapter_leads_to_its_directory(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / MARKER).write_text("{}")
    shutil.copytree(adapter, run / "model")
    for path in (run, run / "model"):
        assert find_model(path, lambda line: None).directory == run / "model"
    renamed = adapter.rename(tmp_path / "step-00000500")
    assert examine(renamed).model == renamed


def test_a_base_is_found_by_reference_by_pefts_own_or_where_it_is_named(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    def found(named: str | None = None) -> Path:
        return find_base(adapter, named, lambda line: None).original

    assert found() == base
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    assert found(str(moved)) == moved
    point_elsewhere(adapter, str(tmp_path / "gone"))
    with pytest.raises(BaseNotFoundError, match=r"there is no directory .*gone.*with --base"):
        found()
    assert found(str(moved)) == moved
    (adapter / "base_model.json").unlink()
    point_elsewhere(adapter, str(moved))
    assert found() == moved
    point_elsewhere(adapter, "")
    with pytest.raises(BaseNotFoundError, match="names no model that it belongs to"):
        found()


def test_a_base_with_other_weights_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    point_elsewhere(adapter, str(moved))
    find_base(adapter, None, lambda line: None)
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseNotFoundError, match="whose weights were others than they are there now"):
        find_base(adapter, None, lambda line: None)
    with pytest.raises(UserError, match="its weights are others; name that model as the base"):
        find_base(adapter, str(moved), lambda line: None)


def test_a_quantized_base_is_made_again(base: Path, adapter: Path, cache: Path) -> None:
    write_trained(adapter, base, cache, quantization={"bits": 4, "type": "nf4", "double": True})
    said: list[str] = []
    found = find_base(adapter, None, said.append)
    assert found.original == base
    assert "quantization_config" in json.loads((found.directory / "config.json").read_text())
    assert [line.split()[0] for line in said] == ["quantizing"]
    network = load_model(str(adapter)).network
    assert type(network.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"


def test_embeddings_grow_to_those_of_the_adapter(base: Path, cache: Path, tmp_path: Path) -> None:
    grown = write_adapter(tmp_path / "grown", base, CONFIGS["whole"], tokens=VOCABULARY + 3)
    write_trained(grown, base, cache, new_tokens=("<a>", "<b>", "<c>"))
    network = load_model(str(grown)).network
    assert network.get_input_embeddings().weight.shape[0] == VOCABULARY + 3


def without(name: str) -> Any:
    return lambda directory: (directory / name).unlink()


def truncate(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


def drop_a_parameter(directory: Path) -> None:
    stored = load_file(directory / "adapter_model.safetensors")
    del stored[sorted(stored)[0]]
    save_file(stored, directory / "adapter_model.safetensors", {"format": "pt"})


def rename_a_parameter(directory: Path) -> None:
    stored = load_file(directory / "adapter_model.safetensors")
    stored["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(stored, directory / "adapter_model.safetensors", {"format": "pt"})


DAMAGES = [
    (without("adapter_model.safetensors"), "is an adapter without weights"),
    (truncate, "cannot be read as safetensors"),
    (drop_a_parameter, "lacks base_model.model.model.layers.0.mlp.down_proj.lora_A.weight, of 28 parameters"),
    (rename_a_parameter, "which no module of LlamaForCausalLM takes"),
    (lambda directory: (directory / "adapter_config.json").write_text("{"), "is not valid JSON"),
    (lambda directory: (directory / "adapter_config.json").write_text("{}"), "names no peft_type"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_damaged_adapter_is_a_sentence_everywhere(
    adapter: Path, tmp_path: Path, damage: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(adapter)
    assert words in refusal(["generate", str(adapter), "--prompt", "x"], capsys)
    assert words in refusal(["verify", str(adapter)], capsys)
    for options in ([], ["--merge"]):
        assert words in refusal(["export", str(adapter), str(tmp_path / "out"), *options], capsys)


def test_adapters_that_cannot_share_a_base_are_refused(
    base: Path, adapters: Path, adapter: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(model: Path, *named: Path) -> str:
        options = [part for name in named for part in ("--adapter", str(name))]
        return refusal(["generate", str(model), "--prompt", "x", *options], capsys)

    assert "twice; name each adapter once" in says(base, adapters / "lora", adapters / "lora")
    assert "cannot share a base in memory" in says(base, adapters / "lora", adapters / "ia3")
    assert "is an adapter itself" in says(adapters / "other", adapters / "lora")
    assert "is a whole model, not an adapter" in says(base, base)
    assert "no place for --base" in refusal(
        ["generate", str(base), "--prompt", "x", "--adapter", str(adapter), "--base", str(base)], capsys
    )
    assert "so no base goes with it" in refusal(["generate", str(base), "--prompt", "x", "--base", str(base)], capsys)
    write_trained(adapter, base, cache, quantization={"bits": 4, "type": "nf4", "double": True})
    find_base(adapter, None, lambda line: None)
    assert "differently quantized" in says(base, adapters / "lora", adapter)


# verify


def test_verify_loads_an_adapter_onto_its_base_or_says_that_it_could_not(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(["verify", str(adapter)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{adapter}: loads, ")
    assert "note" not in captured.err
    point_elsewhere(adapter, str(tmp_path / "gone"))
    assert exit_status(["verify", str(adapter), "--json"]) == 0
    captured = capsys.readouterr()
    row = json.loads(captured.out)["verified"][0]
    assert row["problem"] is None
    assert "not loaded onto its base" in row["note"]
    assert captured.err == f"note: {row['note']}\n"
    assert exit_status(["verify", str(adapter), "--base", str(base)]) == 0
    assert ": loads, " in capsys.readouterr().out
    assert "there is no directory" in refusal(["verify", str(adapter), "--base", str(tmp_path / "gone")], capsys)
    assert "holds no adapter" in refusal(["verify", str(base), "--base", str(base)], capsys)
