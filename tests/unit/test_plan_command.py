"""`understudy plan`: what it answers, what it refuses, and that it needs no torch."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.test_cli_front import BLOCK
from understudy.cli.main import exit_status
from understudy.plan.hardware.hardware import parse_hardware
from understudy.plan.outcome import Plan
from understudy.plan.search import best
from understudy.plan.shape.model import model_shape
from understudy.recipe.presets import STRATEGY_PRESETS
from understudy.recipe.schema import Recipe

pytestmark = pytest.mark.unit

SMALL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
LLAMA_8B = {
    **SMALL,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_1B = {**LLAMA_8B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}


def write_model(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on a model of this configuration, with these sections in the recipe; status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')

    def call(config: dict[str, Any], *arguments: str, **sections: Any) -> tuple[int, str, str]:
        if not (tmp_path / "m").exists():
            write_model(tmp_path / "m", config)
        recipe: dict[str, Any] = {"name": "r", "output_dir": "o", "model": {"path": "m"}}
        recipe |= {"data": {"train": [{"path": "a.jsonl"}], "max_length": 1024}, "training": {"global_batch_size": 64}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, **sections}))
        status = exit_status(["plan", "r.yaml", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_json_is_one_object_with_a_row_for_every_preset(run: Any) -> None:
    status, out, _ = run(LLAMA_8B, "--hardware", "8xA100-80GB", "--json")
    plan = json.loads(out)
    assert status == 0
    assert plan["hardware"].items() >= {"name": "A100-80GB", "devices": 8, "device_bytes": 80 * 2**30}.items()
    assert [row["name"] for row in plan["strategies"]] == list(STRATEGY_PRESETS)
    assert plan["chosen"] in STRATEGY_PRESETS
    for row in plan["strategies"]:
        assert isinstance(row["fits"], bool)
        assert (row["reason"] is None) == row["fits"]
        assert row["micro_batch_tokens"] >= 1024
        assert row["activation_checkpointing"] in ("none", "selective", "full")
        assert row["bound"] in ("compute", "memory bandwidth", "interconnect", "host link")
        assert row["tokens_per_second_per_device"] > 0
        assert {"weights", "gradients", "moments", "activations"} <= set(row["breakdown_bytes"])
        assert sum(row["breakdown_bytes"].values()) == row["device_peak_bytes"]
        if row["fits"]:
            assert row["device_peak_bytes"] <= plan["hardware"]["usable_bytes"]
    chosen = next(row for row in plan["strategies"] if row["name"] == plan["chosen"])
    fastest = max(row["tokens_per_second_per_device"] for row in plan["strategies"] if row["fits"])
    assert chosen["fits"]
    assert chosen["tokens_per_second_per_device"] >= 0.98 * fastest
    assert plan["why"].startswith("the fastest that fits: ")


def test_the_table_names_every_strategy_and_says_why(run: Any) -> None:
    status, out, _ = run(LLAMA_8B, "--hardware", "4xL40S", "--nodes", "2")
    assert status == 0
    assert "8 × L40S on 2 hosts" in out
    assert "8,030,261,248 parameters in 32 layers" in out
    for name in STRATEGY_PRESETS:
        assert re.search(rf"^(→| ) {name} ", out, re.MULTILINE)
    assert len(re.findall("^→", out, re.MULTILINE)) == 1
    assert "The fastest that fits: " in out


def test_this_machine_is_planned_for_without_being_named(run: Any) -> None:
    status, out, _ = run(SMALL, "--json")
    hardware = json.loads(out)["hardware"]
    assert status == 0
    assert hardware["device_bytes"] > 0
    assert hardware["host_bytes"] > 0


def plan_of(config: dict[str, Any], hardware: str, teachers: Any = (), **sections: Any) -> Plan:
    values: dict[str, Any] = {"name": "r", "output_dir": "o", "model": {"path": "m"}}
    values["data"] = {"train": [{"path": "a"}], "max_length": 1024}
    values["training"] = {"global_batch_size": 64}
    recipe = Recipe.model_validate({**values, **sections})
    return best(recipe, parse_hardware(hardware), model_shape(config), teachers=teachers)


def test_what_the_recipe_fixes_is_kept() -> None:
    training = {"global_batch_size": 64, "micro_batch_tokens": 2048, "activation_checkpointing": "full"}
    plan = plan_of(LLAMA_8B, "8xH100", strategy="zero3", training={**training, "precision": "bf16"})
    assert {row.micro_batch_tokens for row in plan.rows} == {2048}
    assert {row.activation_checkpointing for row in plan.rows} == {"full"}
    assert plan.chosen is not None
    assert plan.chosen.name == "zero3"
    assert [row.name for row in plan.rows] == list(STRATEGY_PRESETS)
    # A strategy with settings of its own has a row beside the presets'.
    own = plan_of(LLAMA_8B, "8xH100", strategy={"kind": "fsdp", "sharding": "shard_grad_op"})
    assert len(own.rows) == len(STRATEGY_PRESETS) + 1
    assert own.chosen is own.rows[-1]


def test_a_micro_batch_is_the_largest_that_fits() -> None:
    plan = plan_of(LLAMA_8B, "4xA100-40GB")
    for row in plan.rows:
        if row.fits and row.micro_batches > 1:
            training = {
                "global_batch_size": 64,
                "micro_batch_tokens": row.micro_batch_tokens + 256,
                "activation_checkpointing": row.activation_checkpointing,
            }
            more = plan_of(LLAMA_8B, "4xA100-40GB", training=training)
            assert not next(one for one in more.rows if one.name == row.name).fits


def test_when_nothing_fits_the_answer_is_the_next_lever_and_status_0(run: Any) -> None:
    status, out, _ = run(LLAMA_8B, "--hardware", "2xRTX-4090", "--json", strategy="zero2")
    plan = json.loads(out)
    assert status == 0
    assert plan["chosen"] is None
    assert plan["why"].startswith("nothing fits: zero2 ")
    assert plan["lever"]
    status, out, _ = run(LLAMA_8B, "--hardware", "2xRTX-4090", strategy="zero2")
    assert status == 0
    assert "What would fit: " in out


@pytest.mark.parametrize(
    ("sections", "hardware", "said"),
    [
        ({"strategy": "zero2"}, "4xRTX-3090", "set `strategy: auto`"),
        (
            {"training": {"global_batch_size": 64, "activation_checkpointing": "none", "micro_batch_tokens": 8192}},
            "8xA100-40GB",
            "set `training.activation_checkpointing: full`",
        ),
        ({"data": {"train": [{"path": "a"}], "max_length": 131072}}, "4xA100-40GB", "set `data.max_length: "),
        ({}, "cpu:40GiB", "set `adapter: lora` ("),
        ({}, "cpu:20GiB", "set `adapter: lora` and `quantization: {bits: 4}`"),
        ({"adapter": "lora"}, "cpu:20GiB", "set `quantization: {bits: 4}`"),
        ({"adapter": "lora", "quantization": {"bits": 4}}, "cpu:6GiB", "take 16 hosts"),
        ({"strategy": "fsdp"}, "A100-40GB", "set `strategy: auto`"),
    ],
)
def test_the_lever_makes_it_fit(sections: dict[str, Any], hardware: str, said: str) -> None:
    plan = plan_of(LLAMA_8B, hardware, **sections)
    assert plan.chosen is None
    assert plan.lever is not None
    assert said in plan.lever


DISTILLATION = {"kind": "distillation", "cross_entropy_weight": 0.5}


def test_teachers_are_counted_by_their_kind() -> None:
    teacher = model_shape(LLAMA_8B)
    trained = {"global_batch_size": 64, "micro_batch_tokens": 4096, "activation_checkpointing": "full"}

    def taught(section: Any, shapes: Any = (teacher,)) -> Any:
        plan = plan_of(
            LLAMA_1B, "8xA100-80GB", shapes, objective={**DISTILLATION, "teacher": section}, training=trained
        )
        return next(row for row in plan.rows if row.name == "fsdp")

    alone = next(row for row in plan_of(LLAMA_1B, "8xA100-80GB", training=trained).rows if row.name == "fsdp")
    resident = taught({"kind": "resident", "path": "t"})
    sharded = taught({"kind": "sharded", "path": "t"})
    packed = taught({"kind": "resident", "path": "t", "quantization": {"bits": 4}})
    hosted = taught({"kind": "resident", "path": "t", "device": "host"})
    cached = taught({"kind": "cache", "path": "t"}, (None,))
    served = taught({"kind": "server", "path": "t", "endpoints": ["http://127.0.0.1:1/v1"]}, (None,))
    both = taught({"kind": "several", "teachers": [{"kind": "resident", "path": "t"}] * 2}, (teacher, teacher))
    count, outside = teacher.count, 2 * LLAMA_8B["vocab_size"] * LLAMA_8B["hidden_size"]
    said = 4096 * (4096 * 2)  # hidden states of a micro-batch
    assert resident.breakdown["teacher"] == pytest.approx(2 * count + said, rel=0.001)
    assert sharded.breakdown["teacher"] >= 2 * outside + 2 * (count - outside) // 8
    assert sharded.breakdown["teacher"] < 0.5 * resident.breakdown["teacher"]
    # NF4 with nested scales: 4.127 bits a weight of the layers.
    assert packed.breakdown["teacher"] == pytest.approx(2 * outside + 0.516 * (count - outside) + said, rel=0.01)
    assert hosted.breakdown["teacher"] == pytest.approx(outside + said, rel=0.001)  # its head
    assert hosted.host_peak_bytes >= alone.host_peak_bytes + 8 * 2 * count
    assert cached.breakdown["teacher"] == 4096 * 64 * 12
    assert served.breakdown["teacher"] == 4096 * 20 * 12
    assert both.breakdown["teacher"] == pytest.approx(2 * resident.breakdown["teacher"], rel=0.001)
    # A teacher's forward pass costs time, a cache's answers hardly any.
    assert resident.tokens_per_second_per_device < 0.5 * alone.tokens_per_second_per_device
    assert cached.tokens_per_second_per_device == pytest.approx(alone.tokens_per_second_per_device, rel=0.02)


def test_hidden_states_that_are_matched_are_counted_with_their_maps() -> None:
    teacher = model_shape(LLAMA_8B)
    trained = {"global_batch_size": 64, "micro_batch_tokens": 4096, "activation_checkpointing": "full"}
    objective = {**DISTILLATION, "teacher": {"kind": "resident", "path": "t"}}
    plain = plan_of(LLAMA_1B, "8xA100-80GB", (teacher,), objective=objective, training=trained)
    objective["hidden_states"] = {"layers": [[0, 1], [15, 31]]}
    matched = plan_of(LLAMA_1B, "8xA100-80GB", (teacher,), objective=objective, training=trained)
    assert matched.trained == plain.trained + 2 * 4096 * 2048
    more = matched.rows[1].breakdown["teacher"] - plain.rows[1].breakdown["teacher"]
    assert more == 4096 * 2 * (4096 + 2048) * 2


def test_a_teacher_of_ones_own_base_costs_a_pass_and_no_weights() -> None:
    objective = {**DISTILLATION, "teacher": "base"}
    plan = plan_of(LLAMA_1B, "H100", (None,), objective=objective, adapter="lora")
    row = next(row for row in plan.rows if row.name == "ddp")
    assert row.breakdown["teacher"] < 2**30


def test_a_teacher_with_a_device_for_itself_takes_half_of_them(run: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "t", LLAMA_8B)
    teacher = {"kind": "resident", "path": str(tmp_path / "t"), "device": "other"}
    objective = {**DISTILLATION, "teacher": teacher}
    status, out, _ = run(LLAMA_1B, "--hardware", "8xA100-80GB", "--json", objective=objective)
    assert status == 0
    assert json.loads(out)["hardware"]["devices"] == 4
    status, out, _ = run(LLAMA_1B, "--hardware", "4xT4", "--json", objective=objective)
    assert {row["fits"] for row in json.loads(out)["strategies"]} == {False}
    assert "of the teacher's own device" in out


def test_a_pruned_student_is_smaller(run: Any) -> None:
    _, out, _ = run(LLAMA_8B, "--hardware", "8xH100", "--json")
    whole = json.loads(out)["model"]["parameters"]
    pruned = {"path": "m", "init": "pruned", "layers": "uniform", "keep_layers": 16}
    status, out, _ = run(LLAMA_8B, "--hardware", "8xH100", "--json", model=pruned)
    assert status == 0
    layer = 4096 * (4096 * 2 + 1024 * 2 + 3 * 14336 + 2)
    assert json.loads(out)["model"]["parameters"] == whole - 16 * layer


@pytest.mark.parametrize(
    ("config", "arguments", "said"),
    [
        (SMALL, ["--hardware", "8xA101-80GB"], "did you mean A100-80GB?"),
        (SMALL, ["--hardware", "cpu"], "write cpu:24GiB"),
        ({"model_type": "llama"}, ["--hardware", "H100"], "hidden_size"),
        ({"model_type": "perceiver", "hidden_size": 64}, ["--hardware", "H100"], "perceiver"),
        (SMALL, ["--hardware", "H100", "--picture", "plan.gif"], "is .html or .png"),
        (SMALL, ["--hardware", "H100", "--picture", "nowhere/plan.html"], "cannot be written"),
        (SMALL, ["--hardware", "8xH100", "--nodes", "16"], "more than a batch of 64"),
        (SMALL, ["--hardware", "H100", "training.micro_batch_tokens=many"], "micro_batch_tokens"),
        (SMALL, ["--hardware", "H100", "--nodes", "0"], "nodes"),
    ],
)
def test_bad_input_is_refused_in_a_sentence_with_status_2(run: Any, config: Any, arguments: Any, said: str) -> None:
    status, out, err = run(config, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_a_picture_is_one_page_that_needs_nothing_else(run: Any, tmp_path: Path) -> None:
    status, _, _ = run(LLAMA_8B, "--hardware", "8xA100-80GB", "--picture", "plan.html")
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert status == 0
    assert not re.search(r"<script|https?://|src=|@import|url\(", page)
    for name in STRATEGY_PRESETS:
        assert f">{name}</text>" in page
    assert page.count("<rect") > 3 * len(STRATEGY_PRESETS)


def test_a_png_without_matplotlib_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
    )
    status, _, err = run(SMALL, "--hardware", "H100", "--picture", "plan.png")
    assert status == 2
    assert "pip install matplotlib" in err


def test_it_runs_without_torch_and_its_time_is_printed(run: Any, tmp_path: Path) -> None:
    run(LLAMA_8B, "--hardware", "8xA100-80GB")
    script = BLOCK + "from understudy.cli.main import exit_status\nsys.exit(exit_status(sys.argv[1:]))"
    arguments = ["plan", "r.yaml", "--hardware", "8xA100-80GB", "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chosen"]
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"\nunderstudy plan of an 8B model: {spent:.2f} s of processor time")  # noqa: T201
