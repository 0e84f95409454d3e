"""export of adapters: as they are, and merged into their base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.small_adapters import CONFIGS, VOCABULARY, peft_network, write_adapter, write_model, write_trained
from understudy.checkpoint import merged_model
from understudy.checkpoint.merged_model import Merged, export_merged
from understudy.cli.main import exit_status
from understudy.recipe.schema import Quantization

pytestmark = pytest.mark.unit

TOKENS = torch.tensor([[2, 6, 9, 4, 3, 8, 4]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True)


def merge(source: Path, out: Path, **options: Any) -> Merged:
    return export_merged(
        source, out, **{"base": None, "dtype": None, "trust_remote_code": False, "report": lambda line: None, **options}
    )


def weights_in(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(network: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = network(input_ids=TOKENS).logits.double()
    return found


def assert_merged(out: Path, base: Path, adapter: Path, tolerance: float = 1e-5) -> None:
    """Against peft alone, in fp64: weights and logits."""
    reference = peft_network(base, adapter)
    expected = logits(reference)
    found = logits(AutoModelForCausalLM.from_pretrained(out))
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
    whole = reference.merge_and_unload().state_dict()
    for name, tensor in weights_in(out).items():
        torch.testing.assert_close(tensor.double(), whole[name], rtol=tolerance, atol=tolerance)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that is refused."""
    assert exit_status(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "ia3", "vera", "vera-stored", "whole"])
def test_a_merged_model_computes_what_peft_computes_with_base_and_adapter(
    base: Path, tmp_path: Path, kind: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, CONFIGS[kind])
    merged = merge(adapter, tmp_path / "out")
    assert merged.difference < 1e-5
    assert_merged(tmp_path / "out", base, adapter)
    assert weights_in(tmp_path / "out").keys() == weights_in(base).keys()
    assert not torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(base)),
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
    )


@pytest.mark.parametrize(
    ("model_type", "config", "adapter"),
    [
        (
            "gpt2",
            {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
            peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_proj"]),
        ),
        (
            "qwen2",
            {},
            peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], feedforward_modules=[]),
        ),
    ],
)
def test_transposed_weights_and_biases_merge_too(
    tmp_path: Path, model_type: str, config: dict[str, Any], adapter: peft.PeftConfig
) -> None:
    base = write_model(tmp_path / "base", model_type, **config)
    write_adapter(tmp_path / "adapter", base, adapter)
    merge(tmp_path / "adapter", tmp_path / "out")
    assert_merged(tmp_path / "out", base, tmp_path / "adapter")


def test_tied_embeddings_stay_tied_unless_the_adapter_has_them_apart(tied: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tied, CONFIGS["whole"])  # as peft trains them: each by itself
    merge(adapter, tmp_path / "apart")
    assert json.loads((tmp_path / "apart" / "config.json").read_text())["tie_word_embeddings"] is False
    assert_merged(tmp_path / "apart", tied, adapter)
    file = adapter / "adapter_model.safetensors"
    stored = load_file(file)
    head, table = (f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
    save_file({**stored, head: stored[table].clone()}, file, {"format": "pt"})
    merge(adapter, tmp_path / "together")
    assert json.loads((tmp_path / "together" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in weights_in(tmp_path / "together")
    assert_merged(tmp_path / "together", tied, adapter)


def test_a_vocabulary_that_the_adapter_grew_stays_grown(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, CONFIGS["whole"], tokens=VOCABULARY + 3)
    merge(adapter, tmp_path / "out")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert network.config.vocab_size == VOCABULARY + 3
    stored = weights_in(adapter)["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(network.get_input_embeddings().weight, stored)


def test_a_quantized_base_is_dequantized_to_the_values_that_it_stands_for(
    base: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, CONFIGS["lora"])
    write_trained(adapter, base, cache, quantization=Quantization(bits=4).model_dump(mode="json"))
    arguments = ["export", str(adapter), str(tmp_path / "out"), "--merge"]
    capsys.readouterr()
    assert "merging dequantizes it; say in which dtype" in refusal(arguments, capsys)
    assert exit_status([*arguments, "--dtype", "fp32"]) == 0
    assert "in float32, dequantized from nf4, " in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(base)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = dequantized(module.weight.data)
    shutil.copytree(base, tmp_path / "rounded")
    plain.save_pretrained(tmp_path / "rounded")
    assert_merged(tmp_path / "out", tmp_path / "rounded", adapter)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def dequantized(weight: Tensor) -> Tensor:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    return bnb.dequantize_4bit(packed, state)


def test_the_dtype_is_fp32_unless_asked_for_and_the_line_says_so(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = AutoModelForCausalLM.from_pretrained(base).bfloat16()
    shutil.copytree(base, tmp_path / "base")
    small.save_pretrained(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "base", CONFIGS["lora"])
    assert exit_status(["export", str(adapter), str(tmp_path / "exact"), "--merge"]) == 0
    line = capsys.readouterr().out
    assert "tensors in float32, " in line
    assert "(--dtype bf16 halves them)" in line
    assert_merged(tmp_path / "exact", tmp_path / "base", adapter)
    assert exit_status(["export", str(adapter), str(tmp_path / "half"), "--merge", "--dtype", "bf16", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["dtypes"], said["base"], said["dequantized"]) == (["bfloat16"], str(tmp_path / "base"), None)
    assert said["difference"] <= said["tolerance"] == 5e-2
    assert said["bytes"] == sum(file.stat().st_size for file in (tmp_path / "half").iterdir())
    exact = weights_in(tmp_path / "exact")
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in weights_in(tmp_path / "half").items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tokenizer_and_generation_defaults_are_the_adapters_where_it_has_some(
    base: Path, tmp_path: Path, cache: Path
) -> None:
    adapter = write_trained(write_adapter(tmp_path / "adapter", base, CONFIGS["lora"]), base, cache)
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (adapter / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    merge(adapter, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[0].content }}"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [4, 5]}
    assert not list((tmp_path / "out").glob("adapter*")) + list((tmp_path / "out").glob("base_model*"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"init_lora_weights": "pissa"}, "belongs to a base from which peft took a part"),
        ({"bias": "all"}, "sets bias, which cannot be merged"),
        ({"peft_type": "LOHA"}, "only lora, dora, ia3 and vera are merged"),
    ],
)
def test_what_peft_alone_understands_is_not_merged(
    base: Path, tmp_path: Path, changed: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, CONFIGS["lora"])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **changed}))
    capsys.readouterr()
    assert words in refusal(["export", str(adapter), str(tmp_path / "out"), "--merge"], capsys)


@pytest.mark.parametrize("kind", ["llama_adapter", "prompt_tuning"])
def test_what_is_no_part_of_any_weight_is_not_merged_but_exported(
    base: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, CONFIGS[kind])
    assert "cannot be merged: it holds" in refusal(["export", str(adapter), str(tmp_path / "out"), "--merge"], capsys)
    assert exit_status(["export", str(adapter), str(tmp_path / "out")]) == 0


def test_an_exported_adapter_is_the_same_bit_for_bit_and_cast_on_request(
    base: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_trained(write_adapter(tmp_path / "adapter", base, CONFIGS["dora"]), base, cache)
    assert exit_status(["export", str(adapter), str(tmp_path / "same")]) == 0
    assert f"read back bit for bit, and loads with peft onto {base}" in capsys.readouterr().out
    stored, copied = weights_in(adapter), weights_in(tmp_path / "same")
    assert stored.keys() == copied.keys()
    assert all(torch.equal(tensor, copied[name]) for name, tensor in stored.items())
    for file in adapter.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes()
    assert exit_status(["export", str(adapter), str(tmp_path / "cast"), "--dtype", "bf16"]) == 0
    assert all(torch.equal(tensor, stored[name].bfloat16()) for name, tensor in weights_in(tmp_path / "cast").items())
    assert logits(peft_network(base, tmp_path / "cast")).isfinite().all()


def test_what_cannot_be_merged_or_written_is_refused_and_leaves_nothing(
    base: Path, tied: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_trained(write_adapter(tmp_path / "adapter", base, CONFIGS["lora"]), base, cache)
    before = sorted(path.name for path in tmp_path.iterdir())

    def says(source: Path, out: Path, *options: str) -> str:
        return refusal(["export", str(source), str(out), *options], capsys)

    out = tmp_path / "out"
    assert "is a whole model, so there is nothing to merge" in says(base, out, "--merge")
    assert "so no base goes with it" in says(base, out, "--base", str(tied))
    assert "exists, and nothing is overwritten" in says(adapter, base, "--merge")
    assert "is inside" in says(adapter, adapter / "out", "--merge")
    assert "is inside" in says(adapter, base / "out", "--merge")
    assert "its weights are others" in says(adapter, out, "--merge", "--base", str(tied))
    assert "--dtype" in says(adapter, out, "--merge", "--dtype", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_merge_that_computes_something_else_is_no_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, CONFIGS["lora"])
    merged = merged_model.MergedWeights.__call__
    monkeypatch.setattr(merged_model.MergedWeights, "__call__", lambda self, name: merged(self, name) * 1.001)
    assert exit_status(["export", str(adapter), str(tmp_path / "out"), "--merge"]) == 1
    assert "computes other logits than base and adapter do" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_large_merged_models_are_stored_in_several_files(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, CONFIGS["lora"])
    merge(adapter, tmp_path / "out", shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert_merged(tmp_path / "out", base, adapter)
