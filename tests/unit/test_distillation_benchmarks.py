"""The sides of the distillation benchmark compute the same, and its tables say what was measured."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks import distillation, teacher_cache
from benchmarks.distillation import Case, Measured
from benchmarks.distillation_sides import SIDES, make_inputs, measure_side
from benchmarks.teacher_cache_worker import measure_case
from torch import Tensor

from tests.divergence_formulas import formula

pytestmark = pytest.mark.unit

CASE = Case(300, tokens=17, width=16)
CASES = {
    "forward KL": CASE,
    "JSD": replace(CASE, divergence="jsd"),
    "bf16": replace(CASE, precision="bf16"),
    "top k": replace(CASE, kept=8),
}


class Trainer:
    """Takes logits as TRL's trainer of that name does."""

    @staticmethod
    def generalized_jsd_loss(student: Tensor, teacher: Tensor, *, beta: float, reduction: str) -> Tensor:
        assert reduction == "sum"
        p, q = torch.log_softmax(teacher, dim=-1), torch.log_softmax(student, dim=-1)
        return formula("jsd" if beta else "forward_kl", beta=beta)(p, q).sum()


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name: ModuleType(name) for name in ("trl", "trl.experimental", "trl.experimental.gkd")}
    modules["trl.experimental.gkd"].GKDTrainer = Trainer  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "path", list(sys.path))


def computed(side: str, case: Case) -> tuple[Tensor, ...]:
    """Loss, and gradients of the student's hidden states and head."""
    inputs = make_inputs(case)
    loss = SIDES[side](case, inputs)()
    loss.backward()
    return (loss.detach(), *inputs.gradients())


@pytest.mark.usefixtures("trl")
@pytest.mark.parametrize("name", CASES)
def test_all_sides_compute_the_same_loss_and_gradient(name: str) -> None:
    case = CASES[name]
    tolerance = {"fp32": {"rtol": 1e-4, "atol": 1e-5}, "bf16": {"rtol": 2e-2, "atol": 1e-2}}[case.precision]
    ours = computed("ours", case)
    for side in SIDES.keys() - {"ours", *(["trl"] if case.kept else [])}:
        for mine, theirs in zip(ours, computed(side, case)):
            torch.testing.assert_close(mine, theirs, **tolerance)


def test_a_side_is_measured_beyond_its_inputs_and_gradients() -> None:
    sides = {side: measure_side(side, CASE, steps=2) for side in ("ours", "naive")}
    assert sides["ours"].difference(sides["naive"]) < distillation.AGREE["fp32"]
    loss, hidden, head = computed("ours", CASE)
    assert sides["ours"].loss == pytest.approx(loss.item() / CASE.tokens)
    assert sides["ours"].hidden_norm == pytest.approx(hidden.norm().item())
    assert sides["ours"].head_norm == pytest.approx(head.norm().item())
    assert sides["ours"].seconds > 0


def made_up(_: str, settings: Mapping[str, Any], __: Mapping[str, str]) -> dict[str, float]:
    """A child process's answer: understudy takes half a GiB, the others more with each token."""
    num_bytes = 2**29 if settings["side"] == "ours" else 2**30 * settings["case"]["tokens"]
    return asdict(Measured(1.0, num_bytes, 2.0, 3.0, 4.0))


def tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str | None) -> str:
    monkeypatch.setattr(distillation, "_trl_version", lambda: version)
    distillation.compare(2, cases=[replace(CASE, tokens=16)])
    return capsys.readouterr().out


def test_memory_is_said_to_have_grown_or_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distillation, "measure", made_up)
    grown = tables(monkeypatch, capsys, "1.2.3").split("As tokens grow")[1]
    assert [line.split("|")[1:4] for line in grown.splitlines() if "V = 300" in line] == [
        [" V = 300, 4 tokens  ", "   0.50 GiB ", "   4.00 GiB "],
        [" V = 300, 16 tokens ", "   0.50 GiB ", "  16.00 GiB "],
        [" V = 300, 64 tokens ", "   0.50 GiB ", "            "],
    ]
    assert "reached" in grown
    assert "MISSED" not in grown
    monkeypatch.setattr(distillation, "measure", lambda *given: {**made_up(*given), "num_bytes": 2**30})
    assert "MISSED" in tables(monkeypatch, capsys, "1.2.3").split("As tokens grow")[1]


def test_where_trl_is_not_installed_its_table_says_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distillation, "measure", made_up)
    assert "pip install" not in tables(monkeypatch, capsys, "1.2.3")
    assert f"TRL is not installed | {distillation.INSTALL_TRL}" in tables(monkeypatch, capsys, None)


@pytest.mark.parametrize("differing", [{"loss": 2.1}, {"hidden_norm": 2.9}, {"head_norm": float("nan")}])
def test_sides_that_differ_are_not_compared(monkeypatch: pytest.MonkeyPatch, differing: dict[str, float]) -> None:
    monkeypatch.setattr(
        distillation,
        "measure",
        lambda *given: {**made_up(*given), **(differing if given[1]["side"] == "ours" else {})},
    )
    with pytest.raises(SystemExit, match="do not compute the same"):
        distillation.compare(2, cases=[CASE])


@pytest.mark.parametrize("case", teacher_cache.CASES[2:], ids=lambda case: case.kind)
def test_a_cache_is_measured_as_it_is_built_and_read(tmp_path: Path, case: teacher_cache.Case) -> None:
    small = replace(case, vocabulary=300, width=16, examples=8, supervised=6, asked=12)
    measured = measure_case(small, tmp_path, repetitions=1)
    per_position = {"top_k": 2 * 64 + 2 * 64 + 2, "samples": 2 * 12, "hidden": 2 * 16}[case.kind]
    assert measured.bytes_per_token > per_position
    assert measured.built < min(measured.kept, measured.written)
    assert measured.first_read > 0
    assert measured.read > 0
