"""The proof after saving: it passes for the trained model and for nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from understudy.training.proof import TOLERANCES, Proof, UnprovenModelError, prove_model

pytestmark = pytest.mark.unit

DOCUMENTS = [torch.tensor([3, 4, 5, 6]), torch.tensor([7, 3])]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", "<pad>", *"abcdefghijklm"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", pad_token="<pad>")
    fast.chat_template = "{{ messages }}"
    return fast


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A model directory and the logits of the model that was saved there, one document after the other."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with torch.no_grad():
        return tmp_path, torch.cat([model(input_ids=tokens[None]).logits[0] for tokens in DOCUMENTS])


def prove(directory: Path, expected: torch.Tensor) -> Proof:
    return prove_model(
        directory,
        documents=DOCUMENTS,
        expected=expected,
        dtype=torch.float32,
        tokenizer=tokenizer(),
        trust_remote_code=False,
    )


def rewrite(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    file = directory / "model.safetensors"
    weights = {**load_file(file), **change}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, file, {"format": "pt"})


def test_the_trained_model_is_proved(saved: tuple[Path, torch.Tensor]) -> None:
    proof = prove(*saved)
    assert proof.difference <= proof.tolerance == TOLERANCES[torch.float32]
    assert proof.tokens == 6


def test_one_other_weight_is_noticed(saved: tuple[Path, torch.Tensor]) -> None:
    directory, expected = saved
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(directory, {name: load_file(directory / "model.safetensors")[name] + 0.01})
    with pytest.raises(UnprovenModelError, match="its logits differ from the trained model's by"):
        prove(directory, expected)


def test_a_missing_weight_is_named(saved: tuple[Path, torch.Tensor]) -> None:
    rewrite(saved[0], {"model.norm.weight": None})
    with pytest.raises(UnprovenModelError, match=r"missing_keys: \['model.norm.weight'\]"):
        prove(*saved)


def test_logits_that_are_no_numbers_prove_nothing(saved: tuple[Path, torch.Tensor]) -> None:
    directory, expected = saved
    with pytest.raises(UnprovenModelError, match="differ"):
        prove(directory, torch.full_like(expected, float("nan")))


def test_another_chat_template_is_noticed(saved: tuple[Path, torch.Tensor]) -> None:
    (saved[0] / "chat_template.jinja").write_text("{{ messages[0] }}")
    with pytest.raises(UnprovenModelError, match="another chat template"):
        prove(*saved)


def test_a_tokenizer_that_splits_otherwise_is_noticed(saved: tuple[Path, torch.Tensor]) -> None:
    file = saved[0] / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(values))
    with pytest.raises(UnprovenModelError, match="splits a training text in another way"):
        prove(*saved)
