"""Whatever a stranger gives `understudy train`: one located sentence a mistake, status 2, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.tiny_data import write_lines, write_tokenizer
from understudy.cli.main import exit_status
from understudy.launch.cause import FailedRunError
from understudy.launch.run_claim import claim_run_directory
from understudy.plan.machine import Machine
from understudy.recipe.source_map import SourceMap
from understudy.training import job, start

pytestmark = pytest.mark.unit

RECIPE = """\
output_dir: out/run
model:
  path: model
data:
  train:
    - path: rows.jsonl
  max_length: 64
  num_workers: 1
training:
  max_steps: 2
  global_batch_size: 4
"""
ROWS = [{"instruction": f"number {i}", "output": "fine"} for i in range(8)]
SIZES = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LOCATED = re.compile(r"error: [^\n]+?(?::\d+)?: \S[^\n]*")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that is right."""
    from understudy.models.initialization import materialize_random
    from understudy.recipe.schema import Model

    directory = materialize_random(Model(init="random", config=SIZES), 0, tmp_path_factory.mktemp("models"))
    return write_tokenizer(directory)


@pytest.fixture
def place(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model and data; training itself is left out, and counts as success."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(start, "launch_local", lambda *arguments, **options: None)
    Path("model").symlink_to(model)
    write_lines(Path("rows.jsonl"), ROWS)
    return Path()


def train(recipe: str | bytes, *arguments: str) -> int:
    Path("r.yaml").write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    return exit_status(["train", "r.yaml", *arguments])


def files() -> dict[str, Any]:
    """Everything in the working directory, and what the cache holds half-built."""
    held = {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}
    cache = Path(os.environ["UNDERSTUDY_CACHE"])
    return held | {str(path): None for path in cache.glob("*/.*") if cache.is_dir()}


def refusal(
    capsys: pytest.CaptureFixture[str], recipe: str | bytes, *arguments: str, prepared: Callable[[], None] | None = None
) -> str:
    """What stderr says; checks that it is located sentences alone, that the status is 2 and nothing was written."""
    Path("r.yaml").write_bytes(b"")
    if prepared is not None:
        prepared()
    before = files()
    status = train(recipe, *arguments)
    Path("r.yaml").write_bytes(b"")
    errors = capsys.readouterr().err
    assert status == 2, errors
    assert all(LOCATED.fullmatch(line) for line in errors.splitlines()), errors
    assert files() == before
    return errors


def with_model(change: Callable[[Path], None]) -> Callable[[], None]:
    """Puts a copy of the model in its place and damages it."""

    def prepared() -> None:
        whole = Path("model").resolve()
        Path("model").unlink()
        Path("model").mkdir()
        for file in whole.iterdir():
            (Path("model") / file.name).write_bytes(file.read_bytes())
        change(Path("model"))

    return prepared


def test_the_recipe_that_the_others_are_made_from_is_right(place: Path) -> None:
    assert train(RECIPE) == 0
    assert Path("out/run/recipe.yaml").exists()


RECIPES: dict[str, tuple[str | bytes, str]] = {
    "unknown key": (RECIPE + "traning: 3\n", "r.yaml:12: unknown key `traning`; did you mean `training`?"),
    "wrong type": (RECIPE.replace("steps: 2", "steps: two"), "r.yaml:10: `training.max_steps` must be a whole number"),
    "a bool for a number": (RECIPE.replace("steps: 2", "steps: true"), "r.yaml:10: `training.max_steps` must be a"),
    "not a number": (RECIPE + "optimizer: {eps: .nan}\n", "r.yaml:12: `optimizer.eps` must be a finite number"),
    "negative": (RECIPE + "optimizer: {learning_rate: -1}\n", "r.yaml:12: `optimizer.learning_rate` must be more than"),
    "huge integer": (RECIPE.replace("steps: 2", "steps: " + "9" * 400), "r.yaml:10: `training.max_steps` must be less"),
    "huger integer": (RECIPE.replace("steps: 2", "steps: " + "9" * 9000), "it has 9,000 digits, too many"),
    "huge weight": (RECIPE.replace("rows.jsonl", "rows.jsonl\n      weight: 1e9"), "`data.train.0.weight` must be at"),
    "many processes": (RECIPE + "cluster: {processes: 9}\n", "r.yaml:11: 9 processes are more than a batch of 4"),
    "contradiction": (RECIPE.replace("steps: 2", "steps: 2\n  epochs: 1"), "`training.epochs` contradict each other"),
    "null everywhere": ("model: null\ndata: null\ntraining: null\n", "r.yaml:3: `training` must be a mapping of keys"),
    "a list for a mapping": ("model: [a]\ndata: {train: {}}\n", "r.yaml:2: `data.train` must be a list, not a mapping"),
    "merge key": (RECIPE + "optimizer: {<<: {eps: 1}}\n", "r.yaml:12: YAML 1.2 has no merge keys (<<); write the keys"),
    "python tag": (RECIPE + "optimizer: !!python/object:os.system {a: 1}\n", "the tag !!python/object:os.system means"),
    "list tag": (RECIPE + "logging: {sinks: !!set {a, b}}\n", "r.yaml:12: the tag !!set means nothing in a recipe"),
    "scalar tag": (RECIPE + "name: !mine x\n", "r.yaml:12: 'x' cannot be read: the tag !mine means nothing"),
    "no bool": (RECIPE + "name: !!bool maybe\n", "r.yaml:12: 'maybe' cannot be read: it is no bool."),
    "duplicate key": (RECIPE + "model: {path: m}\n", "r.yaml:12: the key `model` was given before, in line 2"),
    "tab": (RECIPE.replace("  max_steps", "\tmax_steps"), "r.yaml:10: not valid YAML"),
    "Windows line ends": ((RECIPE + "bad: 1\n").replace("\n", "\r\n"), "r.yaml:12: unknown key `bad`"),
    "byte order mark": ("\ufeff" + RECIPE + "bad: 1\n", "r.yaml:12: unknown key `bad`"),
    "UTF-16": (RECIPE.encode("utf-16"), "r.yaml:1: the recipe is not UTF-8 text"),
    "binary": (bytes(range(256)) * 20, "r.yaml:2: the recipe is not UTF-8 text"),
    "empty": ("", "r.yaml:1: the recipe is empty"),
    "list": ("- a\n", "r.yaml:1: a recipe is a mapping of keys"),
    "half a character": (RECIPE + 'name: "\\ud800"\n', "r.yaml:12: '\\\\ud800' holds a NUL or half a surrogate pair"),
    "NUL in a path": (RECIPE.replace("rows.jsonl", '"a\\0b"'), "r.yaml:6: 'a\\\\x00b' holds a NUL or half"),
    "escape in a path": (RECIPE.replace("rows.jsonl", '"a\\e[31m\\nb.jsonl"'), "r.yaml:6: no file matches a\\x1b[31m"),
    "missing data": (RECIPE.replace("rows.jsonl", "none.jsonl"), "r.yaml:6: there is no file or directory none.jsonl"),
    "no path": (RECIPE.replace("rows.jsonl", "''"), "r.yaml:6: `path` is empty; name a file"),
    "split of a file": (RECIPE.replace("rows.jsonl", "rows.jsonl\n      split: x"), "r.yaml:7: rows.jsonl names files"),
    "subset of a file": (RECIPE.replace("rows.jsonl", "rows.jsonl\n      subset: x"), "r.yaml:7: rows.jsonl is no Hub"),
    "missing evaluation data": (RECIPE.replace("  max_l", "  eval: [{path: e.json}]\n  max_l"), "r.yaml:7: there is"),
    "no evaluation data": (RECIPE.replace("  max_l", "  eval: []\n  max_l"), "r.yaml:7: `data.eval` must be a list of"),
    "short max_length": (RECIPE.replace("h: 64", "h: 3"), "r.yaml:7: max_length 3 is shorter than every prompt"),
    "missing model": (RECIPE.replace("path: model", "path: ./none"), "r.yaml:3: there is no directory ./none"),
    "Hub id without network": (RECIPE.replace("path: model", "path: org/none"), "r.yaml:3: org/none is not a"),
    "revision of a directory": (RECIPE.replace("path: model", "path: model\n  revision: x"), "r.yaml:4: model is a"),
    "unknown field of the model": (
        RECIPE.replace("path: model", "path: model\n  config:\n    hiden_size: 4"),
        "r.yaml:5: model.config.hiden_size is no field of llama; did you mean 'hidden_size'?",
    ),
    "unknown activation": (
        RECIPE.replace("path: model", "path: model\n  config: {hidden_act: zz}"),
        "r.yaml:4: transformers can build no llama of this configuration: it knows no 'zz'; correct model.config.",
    ),
    "no layers": (RECIPE.replace("path: model", "path: model\n  config: {num_hidden_layers: 0}"), "without layers"),
    "vocabulary": (
        RECIPE.replace("path: model", "init: random\n  tokenizer: model\n  config: {**}").replace(
            "{**}", json.dumps({**SIZES, "vocab_size": 100})
        ),
        "the model's vocabulary of 100 is smaller than the tokenizer's 300 tokens",
    ),
    "template without syntax": (RECIPE.replace("  max_l", "  chat_template: '{% if'\n  max_l"), "r.yaml:7: the chat"),
    "template that fails": (
        RECIPE.replace("  max_l", "  chat_template: '{{ messages[9].role }}'\n  max_l"),
        "rows.jsonl:1: the chat template fails on this conversation",
    ),
    "no such template": (RECIPE.replace("  max_l", "  chat_template: rag\n  max_l"), "r.yaml:7: data.chat_template is"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_a_bad_recipe_is_refused(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, words = RECIPES[case]
    assert words.replace("\\\\", "\\") in refusal(capsys, recipe)


def test_more_processes_than_devices_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "detect_machine", lambda: Machine(devices=2, device_bytes=1, cores=2))
    assert "command line: 3 processes are more than the 2 devices" in refusal(capsys, RECIPE, "cluster.processes=3")


def test_more_hosts_than_this_one_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "command line: 2 hosts, but nothing here says which" in refusal(capsys, RECIPE, "cluster.nodes=2")
    assert "command line: 2 hosts at least, but this is one" in refusal(capsys, RECIPE, "cluster.min_nodes=2")


def test_ten_thousand_wrong_keys_are_told_in_a_hundred_lines(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = refusal(capsys, RECIPE + "".join(f"key{i}: 1\n" for i in range(10_000))).splitlines()
    assert len(lines) == 101
    assert lines[-1] == "error: r.yaml:112: 9,900 more keys are wrong from here on; correct those above first."


def test_a_document_beyond_learned_positions_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    recipe = RECIPE.replace("path: model", f"init: random\n  tokenizer: model\n  config: {json.dumps(config)}")
    errors = refusal(capsys, recipe)
    assert re.search(r"r\.yaml:9: the longest example has \d+ tokens, but the model has positions for 8;", errors)
    assert train(recipe.replace('"n_positions": 8', '"n_positions": 64')) == 0


def shorten(name: str, keep: int) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:keep]) and None


def configure(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        stored = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**stored, **changes}))

    return change


def whole_numbers(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor.char() for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(content) and None


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "r.yaml:3: model has no weights (*.safetensors)"),
    "pickled weights": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        "r.yaml:3: model holds weights only in a format other than safetensors",
    ),
    "truncated weights": (shorten("model.safetensors", 9000), "model/model.safetensors: cannot be read as safetensors"),
    "no bytes of weights": (shorten("model.safetensors", 0), "model/model.safetensors: cannot be read as safetensors"),
    "whole numbers": (whole_numbers, "r.yaml:3: model holds whole numbers in"),
    "truncated configuration": (shorten("config.json", 40), "model/config.json: the file is not valid JSON"),
    "configuration that is a list": (write("config.json", "[]"), "model/config.json: the file must hold a JSON object"),
    "another size": (configure(hidden_size=32), "r.yaml:3: model does not fit its configuration"),
    "another depth": (configure(num_hidden_layers=2), "r.yaml:3: model lacks model.layers.1."),
    "unknown type": (configure(model_type=["x"]), "r.yaml:3: transformers knows no model_type ['x']"),
    "no causal model": (configure(model_type="clip"), "r.yaml:3: clip is no causal language model"),
    "wrong type of size": (configure(hidden_size="x"), "correct the model's config.json."),
    "index of numbers": (write("model.safetensors.index.json", '{"weight_map": {"a": 3}}'), "is not an index of saf"),
    "truncated generation defaults": (write("generation_config.json", "{"), "model/generation_config.json: holds no"),
    "truncated tokenizer": (shorten("tokenizer.json", 500), "r.yaml:3: model has no tokenizer that can be loaded"),
    "template that is no text": (
        write("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": 3}'),
        "r.yaml:3: the chat template of model is no text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_a_damaged_model_is_refused(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = MODELS[case]
    assert words in refusal(capsys, RECIPE, prepared=with_model(change))


def finished_run() -> None:
    Path("out/run/model").mkdir(parents=True)
    Path("out/run/.understudy-run.json").write_text("{}")
    Path("out/run/model/weights").write_text("mine")


@pytest.mark.parametrize(
    ("made", "arguments", "words"),
    [
        (lambda: Path("out").write_text("x"), [], "r.yaml:1: out/run cannot be created (Not a directory)"),
        (lambda: (Path("out").mkdir(), Path("out/run").write_text("x")), [], "r.yaml:1: out/run is a file"),
        (lambda: Path("out/run/x").mkdir(parents=True), ["--overwrite"], "r.yaml:1: out/run holds files that no run"),
        (finished_run, [], "r.yaml:1: out/run holds a finished run; replace it with --overwrite"),
        (finished_run, ["--overwrite", "zz=1"], "command line: unknown key `zz`"),
        (finished_run, ["--overwrite", "data.train.0.path=none.json"], "command line: there is no file"),
        (finished_run, ["--overwrite", "data.max_length=3"], "command line: max_length 3 is shorter than"),
        (lambda: None, ["output_dir=" + "x" * 300], "cannot be created (File name too long)"),
        (lambda: None, ["output_dir=\udcff"], "command line: '\\udcff' holds a NUL or half a surrogate pair"),
    ],
)
def test_an_output_directory_that_is_taken_is_refused_and_left_as_it_was(
    made: Callable[[], Any], arguments: list[str], words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, RECIPE, *arguments, prepared=made)


def test_the_directory_of_a_live_run_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claim_run_directory(Path("out/run"), SourceMap(), overwrite=False):
        errors = refusal(capsys, RECIPE, "--overwrite")
    assert f"r.yaml:1: out/run is in use by a running job (process {os.getpid()} " in errors


@pytest.mark.parametrize("blocked", ["tokens", "digests", ""])
def test_a_cache_that_cannot_be_written_is_refused(
    blocked: str, place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "cache" / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / "cache" / blocked).write_text("a file")
    assert "the cache cannot be written here" in refusal(capsys, RECIPE)


def full_disk(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "out/run/job.json")


@pytest.mark.parametrize("made", [lambda: None, finished_run])
def test_a_disk_that_is_full_as_the_run_begins_leaves_it_as_it_was(
    made: Callable[[], None], place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "write_job", full_disk)
    assert "out/run/job.json: no space is left on the disk" in refusal(capsys, RECIPE, "--overwrite", prepared=made)


def test_a_run_that_its_processes_refuse_leaves_the_one_it_would_have_replaced(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        assert not Path("out/run/model").exists()
        raise FailedRunError("r.yaml:3: no such model.", 2, refused=True)

    monkeypatch.setattr(start, "launch_local", refuse)
    refusal(capsys, RECIPE, "--overwrite", prepared=finished_run)
    monkeypatch.setattr(start, "launch_local", lambda *arguments, **options: None)
    assert train(RECIPE, "--overwrite") == 0
    assert sorted(path.name for path in Path("out/run").iterdir()) == [
        ".understudy-run.json",
        "job.json",
        "logs",
        "recipe.yaml",
    ]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "understudy", "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


@pytest.mark.parametrize(
    "text", ["zz: 1\n", RECIPE.replace("rows.jsonl", "none.jsonl"), RECIPE.replace("l\nd", "x\nd")]
)
def test_a_wrong_recipe_and_a_missing_file_are_told_before_anything_heavy_is_imported(
    text: str, place: Path, tmp_path: Path
) -> None:
    Path("r.yaml").write_text(text)
    done = run("r.yaml", cwd=tmp_path / "work")
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert done.returncode == 2
    assert imported
    assert imported.isdisjoint({"torch", "transformers", "datasets", "tokenizers", "deepspeed"})
    assert all(LOCATED.fullmatch(line) for line in lines if not line.startswith("import time:"))


# Properties

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just([]) | st.just({})
ANY_CASE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def keys_of(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [key for name, inner in inside for key in [(*path, name), *keys_of(inner, (*path, name))]]


@st.composite
def mutated_recipes(draw: st.DrawFn) -> str:
    """The right recipe after some keys were deleted, renamed or given another value, and lines repeated or lost."""
    values: Any = yaml.safe_load(RECIPE + "optimizer: {kind: adamw, betas: [0.9, 0.95]}\nstrategy: {kind: fsdp}\n")
    for _ in range(draw(st.integers(1, 3))):
        keys = keys_of(values)
        *way, last = draw(st.sampled_from(keys)) if keys else [None]
        holder = values
        for name in way:
            holder = holder[name]
        if last is None:
            break
        change = draw(st.sampled_from(["delete", "rename", "retype"]))
        if change == "retype":
            holder[last] = draw(SCALARS)
        elif change == "delete":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=5)) + str(last)] = holder.pop(last)
    lines = yaml.safe_dump(values, allow_unicode=True).splitlines(keepends=True)
    at = draw(st.integers(0, len(lines) - 1))
    return "".join(
        draw(st.sampled_from([lines, lines, lines[:at] + lines[at : at + 1] * 2 + lines[at + 1 :], lines[:at]]))
    )


@ANY_CASE
@given(recipe=mutated_recipes())
def test_a_mutated_recipe_trains_or_is_refused(recipe: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trains_or_is_refused(capsys, recipe.encode("utf-8", "surrogatepass"))


@st.composite
def mutated_data(draw: st.DrawFn) -> bytes:
    """The right data with a row changed, bytes put in between, or the end cut off."""
    rows: list[Any] = [dict(row) for row in ROWS[:3]]
    if draw(st.booleans()):
        row = rows[draw(st.integers(0, 2))]
        row[draw(st.sampled_from(["instruction", "output", "input", "history"]))] = draw(SCALARS)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    at = draw(st.integers(0, len(content)))
    return draw(st.sampled_from([content, content[:at], content[:at] + draw(st.binary(max_size=4)) + content[at:]]))


@ANY_CASE
@given(content=mutated_data(), name=st.sampled_from(["d.jsonl", "d.json"]))
def test_mutated_data_trains_or_is_refused(
    content: bytes, name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_bytes(content)
    trains_or_is_refused(capsys, RECIPE.replace("rows.jsonl", name).encode())


def trains_or_is_refused(capsys: pytest.CaptureFixture[str], recipe: bytes) -> None:
    status = train(recipe, "output_dir=out/run", "--overwrite")
    errors = capsys.readouterr().err
    assert status in (0, 2), errors
    assert status == 0 or all(LOCATED.fullmatch(line) for line in errors.splitlines()), errors
