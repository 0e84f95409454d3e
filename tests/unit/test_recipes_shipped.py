"""The recipes that ship: they load, and the quickstart's files are what its script makes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from understudy.recipe.load import load_recipe

pytestmark = pytest.mark.unit

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
QUICKSTART = RECIPES / "quickstart"


def conversations(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (QUICKSTART / name).read_text().splitlines()]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe, _ = load_recipe(path)
    assert recipe.name == path.stem


def test_the_quickstart_finds_its_files_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, _ = load_recipe(RECIPES / "quickstart.yaml")
    assert recipe.data.eval is not None
    paths = [recipe.data.train[0].path, recipe.data.eval[0].path, str(recipe.model.tokenizer)]
    assert all(Path(path).exists() for path in paths)


def test_no_evaluation_question_or_date_of_the_quickstart_is_trained_on() -> None:
    trained, held_out = conversations("train.jsonl"), conversations("eval.jsonl")
    for message in (0, 1):
        seen = {conversation[message]["content"] for conversation in trained}
        assert seen.isdisjoint(conversation[message]["content"] for conversation in held_out)
    assert (len(trained), len(held_out)) == (len({row[0]["content"] for row in trained}), 200)


def test_the_noisy_examples_are_training_examples_with_some_answers_of_others() -> None:
    answers = {row[0]["content"]: row[1]["content"] for row in conversations("train.jsonl")}
    noisy = [(row[0]["content"], row[1]["content"]) for row in conversations("noisy.jsonl")]
    wrong = sum(answers[question] != answer for question, answer in noisy)
    assert len(noisy) == 500
    assert 0.25 < wrong / len(noisy) < 0.35


def test_the_quickstart_script_makes_its_files_byte_for_byte(tmp_path: Path) -> None:
    script = runpy.run_path(str(QUICKSTART / "make.py"))
    script["main"](tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shipped = {
        path.relative_to(QUICKSTART): path.read_bytes()
        for path in QUICKSTART.rglob("*")
        if path.is_file() and path.suffix in (".json", ".jsonl")
    }
    assert made == shipped


def test_the_quickstart_is_small() -> None:
    assert sum(path.stat().st_size for path in QUICKSTART.rglob("*.json*")) < 700_000


def test_the_quickstart_tokenizer_renders_system_user_and_assistant_and_reads_any_text_back() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "tokenizer")
    messages = [
        {"role": "system", "content": "Dates in ISO 8601."},
        {"role": "user", "content": "4 juillet 1976 — 日"},
        {"role": "assistant", "content": "1976-07-04"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == (
        "<|im_start|>system\nDates in ISO 8601.<|im_end|>\n<|im_start|>user\n4 juillet 1976 — 日<|im_end|>\n"
        "<|im_start|>assistant\n1976-07-04<|im_end|>\n"
    )
    assert tokenizer.decode(tokenizer(rendered)["input_ids"]) == rendered
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)
    assert tokenizer.eos_token == "<|im_end|>"
    recipe, _ = load_recipe(RECIPES / "quickstart.yaml")
    assert len(tokenizer) <= recipe.model.config["vocab_size"]
