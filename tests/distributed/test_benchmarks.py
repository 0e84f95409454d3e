"""Adapters are measured from end to end, on a model that takes no time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.adapters import compare, qlora
from benchmarks.side_by_side import Extent, Workload
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.small_models import SIZES
from tests.tiny_data import write_lines, write_tokenizer

pytestmark = pytest.mark.distributed


def test_qlora_is_measured_on_both_sides_which_begin_at_the_same_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    model = write_tokenizer(tmp_path / "model")
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(model)
    text = "the quick brown fox asks the assistant what the user said. " * 8
    write_lines(tmp_path / "texts.jsonl", [{"text": f"{number} {text}"} for number in range(4)])
    workload = Workload("texts", "texts.jsonl", batch=2, length=48)
    compare(model, tmp_path, Extent(steps=2, rounds=1), methods=[qlora("bf16")], workload=workload)
    table = capsys.readouterr().out
    assert "QLoRA, bf16: tokens/s" in table
    assert "QLoRA, bf16: peak memory" in table
