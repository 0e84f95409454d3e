"""What benchmarks compare is comparable, and their commands refuse what they cannot measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import side_by_side
from benchmarks.adapters import lora, qlora
from benchmarks.bare_loop import make_model, train
from benchmarks.side_by_side import STREAM, Extent, Method, Outcome, Side, compare_sides, comparison_rows
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.small_models import SIZES

pytestmark = pytest.mark.unit

TOKENS = list(range(3, 19))
BATCH = [(TOKENS, TOKENS), (TOKENS[::-1], TOKENS[::-1])]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    # Widths that blocks of 64 four-bit numbers fill.
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 128}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(directory)
    return directory


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", [lora("fp32"), lora("bf16"), qlora("fp32"), qlora("bf16")])
def test_the_bare_loop_trains_fp32_matrices_beside_every_linear_layer_but_the_head(small: Path, method: Method) -> None:
    model = make_model(small, precision=method.precision, **method.bare)
    names = trained(model)
    assert len(names) == 2 * 7 * SIZES["num_hidden_layers"]
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    weights = [p for name, p in model.named_parameters() if name.endswith("q_proj.base_layer.weight")]
    held = (
        torch.uint8
        if method.bare["quantized"]
        else getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[method.precision])
    )
    assert {weight.dtype for weight in weights} == {held}


def test_the_bare_loop_begins_at_the_loss_of_the_model_that_it_adapts(small: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    ids = torch.tensor([tokens for tokens, _ in BATCH])
    expected = plain(input_ids=ids, labels=ids).loss.item()
    for method, tolerance in ((lora("fp32"), 1e-6), (lora("bf16"), 1e-2), (qlora("fp32"), 0.2)):
        model = make_model(small, precision=method.precision, **method.bare)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        done = train(model, [BATCH] * 3, 1e-2, method.precision)
        assert done["losses"][0] == pytest.approx(expected, rel=tolerance)
        assert done["losses"][-1] < done["losses"][0]
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == trained(model)


def measured(seconds: list[float], loss: float = 2.0) -> dict[str, Any]:
    return {"step_seconds": seconds, "losses": [loss] * len(seconds), "memory_peak_bytes": 2**30}


def test_sides_take_turns_in_going_first_and_first_steps_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def ours(*_: Any) -> dict[str, Any]:
        order.append("ours")
        return measured([100.0, 1.0, 2.0])

    def bare(*_: Any) -> dict[str, Any]:
        order.append("bare")
        return measured([100.0, 2.0, 4.0])

    monkeypatch.setattr(side_by_side, "_train", ours)
    monkeypatch.setattr(side_by_side, "measure", bare)
    monkeypatch.setattr(side_by_side, "_write_recipe", lambda *_: tmp_path / "recipe.json")
    monkeypatch.setattr(side_by_side, "_batches", lambda *_: [BATCH] * 3)
    outcome = compare_sides(STREAM, lora("fp32"), tmp_path, tmp_path, tmp_path / "made", Extent(steps=3, rounds=3))
    assert order == ["bare", "ours", "ours", "bare", "bare", "ours"]
    assert outcome.ours.tokens_per_second == pytest.approx(24.0)  # the median of 32 / 1 and 32 / 2
    assert outcome.speed_ratio == pytest.approx(2.0)


def test_sides_that_compute_other_losses_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_train", lambda *_: measured([1.0, 1.0], loss=2.0))
    monkeypatch.setattr(side_by_side, "measure", lambda *_: measured([1.0, 1.0], loss=2.1))
    monkeypatch.setattr(side_by_side, "_write_recipe", lambda *_: tmp_path / "recipe.json")
    monkeypatch.setattr(side_by_side, "_batches", lambda *_: [BATCH] * 2)
    with pytest.raises(SystemExit, match="do not compute the same"):
        compare_sides(STREAM, lora("bf16"), tmp_path, tmp_path, tmp_path / "made", Extent(steps=2, rounds=1))


def test_a_goal_is_reached_at_its_bound_and_missed_past_it() -> None:
    side = Side(tokens_per_second=97.0, memory_peak_bytes=100, first_loss=1.0)
    outcome = Outcome(side, replace(side, tokens_per_second=100.0), 10.0)
    assert [row.verdict for row in comparison_rows("", outcome, speed_goal=0.97, memory_goal=1.0)] == ["reached"] * 2
    assert [row.verdict for row in comparison_rows("", outcome, speed_goal=0.98, memory_goal=0.99)] == ["MISSED"] * 2
    assert [row.verdict for row in comparison_rows("", outcome)] == ["", ""]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["adapter"], "there is no benchmark adapter; there are startup"),
        (["adapters", "--steps", "1"], "--steps is at least 2"),
        (["adapters", "--rounds", "0"], "--rounds at least 1"),
    ],
)
def test_the_command_refuses_what_it_cannot_measure(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert said in capsys.readouterr().err
