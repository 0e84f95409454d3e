"""`plan --exact`: simulated steps, what was counted in them, and what cannot be simulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from understudy.cli.main import exit_status
from understudy.models.quantization.codecs.bitsandbytes_4bit import dynamic_map
from understudy.simulation.live_tensors import LiveTensors

pytestmark = pytest.mark.unit

SMALL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`plan --exact` of a small model with these sections in the recipe; status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')

    def call(*arguments: str, **sections: Any) -> tuple[int, str, str]:
        recipe: dict[str, Any] = {"name": "r", "output_dir": "o", "model": {"path": "m"}, "strategy": "fsdp"}
        recipe |= {"data": {"train": [{"path": "a.jsonl"}], "max_length": 512}}
        recipe |= {"training": {"global_batch_size": 16, "micro_batch_tokens": 512}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, **sections}))
        status = exit_status(["plan", "r.yaml", "--exact", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def exact_of(run: Any, *arguments: str, **sections: Any) -> dict[str, Any]:
    status, out, err = run("--json", *arguments, **sections)
    assert status == 0, err
    plan = json.loads(out)
    exact: dict[str, Any] = plan["exact"]
    exact["planned"] = next(row for row in plan["strategies"] if row["name"] == plan["chosen"])["tensor_peak_bytes"]
    return exact


def test_the_timeline_and_what_is_alive_add_up_to_the_peak(run: Any) -> None:
    exact = exact_of(run, "--hardware", "8xA100-80GB", "--nodes", "64", "training.global_batch_size=512")
    assert (exact["strategy"], exact["processes"]) == ("fsdp", 512)
    assert exact["tensor_peak_bytes"] == max(moment["peak_bytes"] for moment in exact["timeline"])
    assert exact["tensor_peak_bytes"] == sum(one["bytes"] for one in exact["alive_at_peak"])
    assert exact["device_peak_bytes"] > exact["tensor_peak_bytes"]
    names = [moment["moment"] for moment in exact["timeline"]]
    once = ["forward layer 0", "forward layer 1", "forward head", "backward head", "backward layer 1"]
    assert names == ["start", *once, "backward layer 0", "optimizer", "end"]
    assert 0.97 <= exact["planned"] / exact["tensor_peak_bytes"] <= 1.05


@pytest.mark.parametrize(
    "sections",
    [{"adapter": "lora"}, {"adapter": "lora", "quantization": {"bits": 4}}, {"adapter": {"kind": "freeze"}}],
    ids=["LoRA", "QLoRA", "freeze"],
)
def test_adapters_and_quantized_bases_are_simulated_as_they_train(run: Any, sections: dict[str, Any]) -> None:
    exact = exact_of(run, "--hardware", "2xA100-80GB", **sections)
    assert 0.97 <= exact["planned"] / exact["tensor_peak_bytes"] <= 1.05


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_simulation_leaves_no_tables_of_zeros_behind(run: Any, optimizer: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    quantization = {"bits": 4, "double": True}
    exact_of(run, "--hardware", "2xA100-80GB", adapter="lora", quantization=quantization, optimizer=optimizer)
    expected = functional.create_dynamic_map()
    assert torch.equal(dynamic_map(torch.device("cpu")), expected)
    assert all(table.equal(expected) for name, table in functional.name2qmap.items() if name == "dynamic")


def test_a_teacher_in_the_same_process_is_counted(run: Any) -> None:
    alone = exact_of(run, "--hardware", "2xA100-80GB")
    teacher = {"kind": "resident", "path": "m"}
    taught = exact_of(run, "--hardware", "2xA100-80GB", objective={"kind": "distillation", "teacher": teacher})
    weights = 2 * sum(parameter.numel() for parameter in _model().parameters())
    assert taught["tensor_peak_bytes"] - alone["tensor_peak_bytes"] >= weights
    assert taught["planned"] >= 0.97 * taught["tensor_peak_bytes"]


def _model() -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    return model


def test_the_terminal_shows_the_course_of_a_step_and_what_was_there(run: Any) -> None:
    status, out, _ = run("--hardware", "4xA100-80GB")
    assert status == 0
    said = out[out.index("Simulated, fsdp on 4 processes: tensors take ") :]
    assert "of what was planned; with context and fragmentation" in said
    assert "forward layers" in said
    assert "GiB at the peak  tensors  made by" in said


@pytest.mark.parametrize(
    ("arguments", "sections", "said"),
    [
        (["--hardware", "8xA100-80GB", "--nodes", "200"], {"training": {"global_batch_size": 3200}}, "up to 1,024"),
        (
            ["--hardware", "2xA100-80GB"],
            {"objective": {"kind": "distillation", "teacher": {"kind": "cache", "path": "m"}}},
            "leave out --exact",
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_sentence(
    run: Any, arguments: list[str], sections: dict[str, Any], said: str
) -> None:
    status, _, err = run(*arguments, **sections)
    assert status == 2
    assert said in err
    assert "Traceback" not in err


def test_storages_count_while_they_live_and_with_the_size_they_have() -> None:
    with LiveTensors() as live:
        live.mark("here")
        first = torch.zeros(1000, dtype=torch.uint8)
        view = first[10:]
        second = torch.zeros(500, dtype=torch.uint8)
        assert live.now == 1500
        first.untyped_storage().resize_(0)
        assert live.now == 500
        first.untyped_storage().resize_(2000)
        del second
        assert live.now == 2000
        del first, view
        assert live.now == 0
    assert live.moments[-1].peak_bytes == 2500
    assert [(one.count, one.bytes) for one in live.alive_at(live.moments[-1].peak_time)] == [(2, 2500)]


def test_two_gradients_of_one_tensor_take_the_room_of_one() -> None:
    """As autograd does it where nobody counts: the second is added to the first."""
    weight = torch.ones(1000, 100, requires_grad=True)
    with LiveTensors() as live:
        loss = (weight * 2).sum() + (weight * 3).sum()
        live.mark("backward")
        before = live.now
        torch.autograd.backward(loss)
    # Both gradients before they are one.
    assert live.moments[-1].peak_bytes - before <= 3 * weight.nbytes
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full_like(weight, 5.0))


def test_what_gloo_copies_to_sum_and_deal_out_is_counted_on_processors_alone(run: Any) -> None:
    short: dict[str, Any] = {"data": {"train": [{"path": "a.jsonl"}], "max_length": 16}}
    training = {"precision": "bf16", "micro_batch_tokens": 16, "activation_checkpointing": "none"}
    peaks = {}
    for hardware in ("2xcpu:8GiB", "2xA100-40GB"):
        moments = exact_of(run, "--hardware", hardware, training=training, **short)["timeline"]
        peaks[hardware] = max(moment["peak_bytes"] for moment in moments if moment["moment"] == "backward layer 0")
    copied = 4 * SMALL["vocab_size"] * SMALL["hidden_size"]
    assert peaks["2xcpu:8GiB"] - peaks["2xA100-40GB"] >= copied


def test_a_simulation_compiles_nothing(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for compiler in ("CC", "CXX"):
        monkeypatch.setenv(compiler, str(tmp_path / "no-compiler"))
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "operators"))
    assert exact_of(run, "--hardware", "2xA100-80GB", strategy="zero3-offload")["tensor_peak_bytes"] > 0
