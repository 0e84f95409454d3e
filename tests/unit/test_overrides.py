"""`key.sub=value` arguments lie over the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.errors import UserError
from understudy.recipe.load import load_recipe
from understudy.recipe.overrides import apply_override, parse_override
from understudy.recipe.schema import FSDP, DataSource, DeepSpeed, Optimizer, Recipe, Schedule

pytestmark = pytest.mark.unit

FILE = """\
model: {path: m}
data:
  train:
    - path: a.json
training: {epochs: 3}
strategy: fsdp
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(FILE)
    return file


def load(path: Path, *overrides: str) -> Recipe:
    return load_recipe(path, overrides)[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("true", True),
        ("", None),
        ("null", None),
        ("[1, a]", [1, "a"]),
        ("{a: 1e-3}", {"a": 1e-3}),
        ("'1'", "1"),
        ("data/*.json", "data/*.json"),
        ("*.json", "*.json"),
        ("a=b: c", "a=b: c"),
        (" x ", "x"),
    ],
)
def test_a_value_is_a_yaml_scalar_or_flow(text: str, value: Any) -> None:
    assert parse_override(f"key={text}") == ("key", value)


def test_scalars_lists_and_mappings_are_set(path: Path) -> None:
    recipe = load(
        path,
        "training.epochs=1e-1",
        "data.train.0.path=b.json",
        "data.train.1.path=c.json",
        "data.eval.0.path=d.json",
        "optimizer.betas=[0.9, 0.99]",
        "model.config.rope_parameters.factor=2",
        "schedule=linear",
    )
    assert recipe.training.epochs == 0.1
    assert recipe.data.train == (DataSource(path="b.json"), DataSource(path="c.json"))
    assert recipe.data.eval == (DataSource(path="d.json"),)
    assert recipe.optimizer == Optimizer(betas=(0.9, 0.99))
    assert recipe.model.config == {"rope_parameters": {"factor": 2}}
    assert recipe.schedule == Schedule(kind="linear")


def test_a_preset_is_expanded_before_a_key_is_set_in_it(path: Path) -> None:
    assert load(path, "strategy.offload=true").strategy == FSDP(offload=True)
    assert load(path, "strategy=zero3").strategy == DeepSpeed(stage=3)
    assert load(path, "strategy=zero3", "strategy.offload_optimizer=cpu").strategy == DeepSpeed(
        stage=3, offload_optimizer="cpu"
    )
    assert load(path, "optimizer=sgd", "optimizer.momentum=0.9").optimizer == Optimizer(kind="sgd", momentum=0.9)


def test_the_command_line_chooses_between_steps_and_epochs(path: Path) -> None:
    assert load(path, "training.max_steps=7").training.max_steps == 7
    with pytest.raises(UserError, match="contradict each other"):
        load(path, "training.max_steps=7", "training.epochs=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "command line: 'epochs' is no override; write key=value, such as training.epochs=1."),
        ("=1", "command line: '=1' is no override"),
        ("a..b=1", "command line: 'a..b=1' is no override"),
        ("training.epochs=[1", "command line: the value of 'training.epochs' cannot be read"),
        ("training.epochs.x=1", "command line: 'training.epochs.x' cannot be set, because `training.epochs` is 3"),
        ("data.train.5.path=x", "command line: `data.train` is a list of 1; '5' is no index of it"),
        ("data.train.x=1", "command line: `data.train` is a list of 1; 'x' is no index of it"),
        ("trainig.epochs=1", "command line: unknown key `trainig`; did you mean `training`?"),
        ("training.epochs=x", "command line: `training.epochs` must be a number, not 'x'."),
        ("strategy.sharding=hybrid_shard", "command line: hybrid_shard needs `parallel.replicate` above 1"),
        ("training={epochs: 0}", "command line: `training.epochs` must be more than 0, not 0."),
    ],
)
def test_a_wrong_override_is_refused_where_it_stands(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(path, override)
    assert str(caught.value).startswith(message)


@settings(deadline=None)
@given(
    key=st.lists(
        st.sampled_from(["data", "train", "0", "1", "strategy", "kind", "model", "x"]), min_size=1, max_size=4
    ),
    text=st.text(st.sampled_from("ab01[]{}'\":,.-e "), max_size=8),
)
def test_any_override_is_applied_or_refused_in_a_sentence(key: list[str], text: str) -> None:
    values: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": [{"path": "a"}]}, "strategy": "ddp"}
    problem: UserError | None = None
    try:
        apply_override(values, *parse_override(f"{'.'.join(key)}={text}"))
    except UserError as error:
        problem = error
    assert problem is None or str(problem).startswith("command line: ")
