"""A recipe file becomes a frozen recipe, or a sentence for everything that is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from understudy.errors import RecipeError, UserError
from understudy.recipe.dump import dump_recipe
from understudy.recipe.json_schema import recipe_json_schema
from understudy.recipe.load import load_recipe
from understudy.recipe.schema import DeepSpeed, Optimizer, Recipe
from understudy.recipe.yaml_text import parse_yaml

pytestmark = pytest.mark.unit

MINIMAL = """\
model: {path: some/model}
data:
  train:
    - path: a.json
"""


def write(directory: Path, text: str | bytes, name: str = "tiny.yaml") -> Path:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(directory: Path, text: str | bytes, name: str = "tiny.yaml", *overrides: str) -> Recipe:
    return load_recipe(write(directory, text, name), overrides)[0]


def messages(directory: Path, text: str | bytes, name: str = "tiny.yaml", *overrides: str) -> list[str]:
    """Each line of the error, from the file's name on."""
    with pytest.raises(UserError) as caught:
        load(directory, text, name, *overrides)
    return [line.removeprefix(f"{directory}/") for line in str(caught.value).splitlines()]


def test_name_and_output_directory_come_from_the_file(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert (recipe.name, recipe.output_dir) == ("tiny", "runs/tiny")
    assert load(tmp_path, MINIMAL + "name: other").output_dir == "runs/other"


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, MINIMAL).training.epochs = 1  # type: ignore[misc]


def test_an_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "optimizer: {learning_rate: 1e-4}").optimizer.learning_rate == 1e-4


ADAPTERS = "lora, dora, ia3, vera, llama_adapter, prompt_tuning or freeze"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("010", 10),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("~", None),
        ("2026-01-01", "2026-01-01"),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        ("1:30", "1:30"),
        ("TRUE", True),
        ("'1'", "1"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    assert parse_yaml(f"key: {text}", "f")[0] == {"key": value}


def test_environment_variables_are_not_expanded(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL.replace("some/model", "'${HOME}/m'")).model.path == "${HOME}/m"


def test_the_three_formats_read_alike(tmp_path: Path) -> None:
    values = {
        "model": {"path": "m", "config": {"num_hidden_layers": 2}},
        "data": {"train": [{"path": "a.json", "weight": 2.0}, {"path": "b.json"}]},
        "optimizer": {"learning_rate": 1e-4, "betas": [0.9, 0.99]},
        "strategy": "zero2",
    }
    toml = """
strategy = "zero2"
[model]
path = "m"
config.num_hidden_layers = 2
[[data.train]]
path = "a.json"
weight = 2.0
[[data.train]]
path = "b.json"
[optimizer]
learning_rate = 1e-4
betas = [0.9, 0.99]
"""
    from_json = load(tmp_path, json.dumps(values), "r.json")
    from_yaml = load(tmp_path, "{" + json.dumps(values)[1:], "r.yaml")
    assert from_json == from_yaml == load(tmp_path, toml, "r.toml")
    assert from_json.strategy == DeepSpeed(stage=2)


@pytest.mark.parametrize("text", ["cosine", "{kind: cosine}"])
def test_a_bare_kind_stands_for_a_mapping(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, MINIMAL + f"schedule: {text}\noptimizer: sgd").optimizer == Optimizer(kind="sgd")


def test_every_violation_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    text = MINIMAL + "training:\n  epochs: three\n  max_step: 3\nstrategy: zero4\n"
    assert messages(tmp_path, text) == [
        "tiny.yaml:6: `training.epochs` must be a number, not 'three'.",
        "tiny.yaml:7: unknown key `max_step` in `training`; did you mean `max_steps`?",
        "tiny.yaml:8: `strategy` must be auto, ddp, fsdp, fsdp-offload, zero0, zero1, zero2, zero2-offload, zero3, "
        "zero3-offload or a mapping with `kind`, not 'zero4'; did you mean zero3?",
    ]


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("learning_rate: 1", "unknown key `learning_rate`; did you mean `optimizer.learning_rate`?"),
        ("logging: {zzzz: 1}", "unknown key `zzzz` in `logging`; known there: every, sinks."),
        ("strategy: {kind: fsdp, offlod: true}", "unknown key `offlod` in `strategy`; did you mean `offload`?"),
        ("strategy: {kind: fdsp}", "`strategy.kind` must be ddp, fsdp or deepspeed, not 'fdsp'; did you mean fsdp?"),
        ("strategy: {offload: true}", "`strategy.kind` is missing; it must be ddp, fsdp or deepspeed."),
        (
            "adapter: lorra",
            f"`adapter` must be {ADAPTERS}, not 'lorra'; did you mean lora?",
        ),
        (
            "adapter: {kind: lorra}",
            f"`adapter.kind` must be {ADAPTERS}, not 'lorra'; did you mean lora?",
        ),
        (
            "adapter: {rank: 8}",
            "`adapter.kind` is missing; it must be lora, dora, ia3, vera, llama_adapter, prompt_tuning or freeze.",
        ),
        ("adapter: {kind: lora, rank: 0}", "`adapter.rank` must be more than 0, not 0."),
        ("adapter: {kind: freeze, rank: 8}", "unknown key `rank` in `adapter`"),
        ("strategy: {kind: deepspeed, stage: 4}", "`strategy.stage` must be 0, 1, 2 or 3, not 4."),
        ("training: {micro_batch_tokens: 0}", "`training.micro_batch_tokens` must be more than 0 or auto, not 0."),
        ("training: {compile: yes}", "`training.compile` must be true or false, not 'yes'."),
        ("training: 3", "`training` must be a mapping of keys, not 3."),
        ("optimizer: {betas: [0.9]}", "`optimizer.betas.1` is missing and has no default; add it."),
        ("optimizer: {betas: [0.9, 1.5]}", "`optimizer.betas.1` must be less than 1, not 1.5."),
        ("optimizer: {betas: [1, 0.95]}", "`optimizer.betas.0` must be less than 1, not 1."),
        ("optimizer: {eps: .inf}", "`optimizer.eps` must be a finite number, not inf."),
        (
            "optimizer: adm",
            "`optimizer` must be adamw, adamw_bf16, adamw_8bit, adafactor, lion, muon or sgd, not 'adm'",
        ),
        ("evaluation: {every: 5.0}", "`evaluation.every` must be a whole number or less than 1, not 5.0."),
    ],
)
def test_a_wrong_value_says_what_is_expected(tmp_path: Path, added: str, message: str) -> None:
    [line] = messages(tmp_path, MINIMAL + added)
    assert line.startswith(f"tiny.yaml:5: {message.rstrip()}")


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    assert messages(tmp_path, "model: {path: m}") == ["tiny.yaml:1: `data` is missing and has no default; add it."]


def test_remote_code_is_honoured_from_the_command_line_only(tmp_path: Path) -> None:
    text = MINIMAL.replace("some/model", "some/model, trust_remote_code: true")
    [line] = messages(tmp_path, text)
    assert line.startswith("tiny.yaml:1: `model.trust_remote_code` is not honoured from a file;")
    assert load(tmp_path, text, "tiny.yaml", "model.trust_remote_code=true").model.trust_remote_code


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "r.yaml", "r.yaml:1: the recipe is empty; check the path."),
        (" \n\t\n", "r.yaml", "r.yaml:1: the recipe is empty; check the path."),
        ("# nothing", "r.yaml", "r.yaml:1: a recipe is a mapping of keys; begin with `model:`, `data:`."),
        ("- a\n- b", "r.yaml", "r.yaml:1: a recipe is a mapping of keys"),
        (b"model:\n  path: \xff\xfe", "r.yaml", "r.yaml:2: the recipe is not UTF-8 text; save it as UTF-8."),
        ("a: 1\nb: [1", "r.yaml", "r.yaml:2: not valid YAML: while parsing a flow sequence"),
        ("a: 1\nb: 2\na: 3", "r.yaml", "r.yaml:3: the key `a` was given before, in line 1; remove one of them."),
        ("a: 1\nb: \x07", "r.yaml", "r.yaml:2: a control character stands in this line; remove it."),
        ("a: &x [*x]", "r.yaml", "r.yaml:1: an alias (*) refers to the mapping it stands in"),
        ("a: !!python/name:os.system x", "r.yaml", "r.yaml:1: 'x' cannot be read: the tag"),
        ("[" * 3000, "r.yaml", "r.yaml: mappings are nested too deeply"),
        ("a: 1\n---\nb: 1", "r.yaml", "r.yaml:2: not valid YAML"),
        ('{"a": 1,\n"b": ', "r.json", "r.json:2: not valid JSON: expecting value at column 6"),
        ('{"a": 1,\n "a": 2}', "r.json", "r.json:2: the key `a` was given before, in line 1"),
        ("[" * 100_000, "r.json", "r.json: mappings are nested too deeply"),
        ("a = 1\nb = ", "r.toml", "r.toml:2: not valid TOML"),
        ("a = 1\n[b\n", "r.toml", "r.toml:2: not valid TOML"),
    ],
)
def test_text_that_is_no_recipe_is_refused_with_its_line(tmp_path: Path, text: str, name: str, message: str) -> None:
    [line] = messages(tmp_path, text, name)
    assert line.startswith(message)


def test_a_recipe_that_is_missing_or_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: the recipe does not exist; check the path"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="the recipe is a directory; name a file in it"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("r.json", '{"model": {"path": "m"},\n "data": {"train": [{"path": "a"},\n  {"path": "b",\n "wight": 2}]}}', 4),
        ("r.toml", '[model]\npath = "m"\n[[data.train]]\npath = "a"\n[[data.train]]\npath = "b"\nwight = 2\n', 7),
        ("r.yaml", "model: {path: m}\ndata:\n  train:\n  - path: a\n  - path: b\n    wight: 2\n", 6),
    ],
)
def test_lines_are_right_in_every_format(tmp_path: Path, name: str, text: str, line: int) -> None:
    expected = f"{name}:{line}: unknown key `wight` in `data.train.1`; did you mean `weight`?"
    assert messages(tmp_path, text, name) == [expected]


def test_a_path_that_exists_only_beside_the_recipe_is_taken_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "recipes", tmp_path / "here"
    for directory in (beside, here):
        directory.mkdir()
        (directory / "both.json").touch()
    (beside / "only.json").touch()
    monkeypatch.chdir(here)
    text = "model: {path: org/name}\ndata: {train: [{path: both.json}, {path: only.json}, {path: on*.json}, {path: x}]}"
    recipe = load(beside, text)
    assert [source.path for source in recipe.data.train] == [
        "both.json",
        str(beside / "only.json"),
        str(beside / "on*.json"),
        "x",
    ]
    assert recipe.model.path == "org/name"


def test_the_json_schema_admits_bare_strings_and_asks_for_no_name() -> None:
    schema = recipe_json_schema()
    assert schema["required"] == ["model", "data"]
    properties = schema["properties"]
    assert "zero3-offload" in properties["strategy"]["anyOf"][0]["enum"]
    assert "auto" in properties["strategy"]["anyOf"][0]["enum"]
    assert properties["optimizer"]["anyOf"][0]["enum"][0] == "adamw"
    assert properties["objective"]["anyOf"][0]["enum"] == ["causal_lm"]  # the others need a teacher
    assert {"lora", "dora", "ia3", "freeze"} <= set(properties["adapter"]["anyOf"][0]["enum"])
    assert {"type": "null"} in properties["adapter"]["anyOf"]
    assert schema["$defs"]["Training"]["properties"]["seed"]["description"]


# Properties

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(["kind", "path", "train", "config", "every", "0", "betas", "stage"]) | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
RECIPES = st.dictionaries(st.sampled_from(sorted(Recipe.model_fields)) | KEYS, VALUES, max_size=5)
ANY_CASE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ends_in_a_recipe_or_a_sentence(directory: Path, text: str | bytes, name: str) -> None:
    problem: UserError | None = None
    try:
        load(directory, text, name)
    except UserError as error:
        problem = error
    if problem is not None:
        lines = str(problem).splitlines()
        assert len(lines) == (len(problem.violations) if isinstance(problem, RecipeError) else 1)
        assert all(line.startswith(str(directory)) for line in lines)


@ANY_CASE
@given(text=st.text(max_size=60) | st.binary(max_size=60), name=st.sampled_from(["r.yaml", "r.json", "r.toml"]))
def test_any_text_ends_in_a_sentence(tmp_path: Path, text: str | bytes, name: str) -> None:
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    ends_in_a_recipe_or_a_sentence(tmp_path, content, name)


@ANY_CASE
@given(
    text=st.text(st.sampled_from("ab:-[]{},\"'\\ \n&*!|>#%@?=.01eE~"), max_size=40),
    name=st.sampled_from(["r.yaml", "r.json", "r.toml"]),
)
def test_any_punctuation_ends_in_a_sentence(tmp_path: Path, text: str, name: str) -> None:
    ends_in_a_recipe_or_a_sentence(tmp_path, text, name)


@ANY_CASE
@given(values=RECIPES)
def test_any_values_end_in_sentences(tmp_path: Path, values: dict[str, Any]) -> None:
    base = {"model": {"path": "m"}, "data": {"train": [{"path": "a"}]}}
    ends_in_a_recipe_or_a_sentence(tmp_path, json.dumps({**base, **values}), "r.json")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
WHOLE_RECIPES = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a", "1e-4", "no", "0o7", "~x", "true"]),
        "model": st.fixed_dictionaries(
            {
                "path": TEXT,
                "config": st.dictionaries(TEXT, TEXT | SCALARS.filter(lambda v: v == v and not isinstance(v, str))),
            }
        ),
        "data": st.fixed_dictionaries({"train": st.just([{"path": "a"}]), "chat_template": st.none() | TEXT}),
        "optimizer": st.sampled_from(["adamw", "sgd", {"kind": "lion", "learning_rate": 3e-7}]),
        "schedule": st.sampled_from(["wsd", "constant", {"kind": "polynomial", "power": 2}]),
        "strategy": st.sampled_from(["auto", "ddp", "zero3", {"kind": "fsdp", "offload": True}]),
        "training": st.sampled_from([{}, {"max_steps": 3}, {"epochs": 1.5, "max_grad_norm": None}]),
    }
)


@ANY_CASE
@given(values=WHOLE_RECIPES)
def test_a_dumped_recipe_reads_back_equal(tmp_path: Path, values: dict[str, Any]) -> None:
    recipe = load(tmp_path, json.dumps(values), "r.json")
    assert load(tmp_path, dump_recipe(recipe)) == recipe
