"""New tokens: embeddings that grew are the same under every strategy, and a run with them goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed import small_run
from tests.distributed.forked import forked_workers
from understudy.models.weights import WeightReader
from understudy.training.parity import compare_strategies

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TOKENS = [f"<new {number}>" for number in range(8)]
TEMPLATE = "{% for m in messages %}<new 7>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("recipe", "strategies"), [("quickstart", ["fsdp", "zero3"]), ("quickstart-qlora", ["zero2", "zero3"])]
)
def test_embeddings_that_grew_train_the_same_under_every_strategy(
    recipe: str, strategies: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    overrides = [
        f"model.new_tokens={TOKENS}",
        f"data.chat_template={tmp_path / 'template.jinja'}",
        "data.train.0.max_samples=300",
        "data.eval=null",
        "evaluation.samples=0",
    ]
    lines: list[str] = []
    with forked_workers():
        found = list(compare_strategies(RECIPES / f"{recipe}.yaml", overrides, strategies, 2, 3, lines.append))
    assert [difference.strategy for difference, _ in found] == strategies
    assert all(difference.within(tolerance) for difference, tolerance in found), found
    [grown] = [path for path in (tmp_path / "cache" / "grown").iterdir() if path.is_dir()]
    # The tokenizer has 378 tokens, and the model rows for 384.
    assert WeightReader(grown)("model.embed_tokens.weight").shape == (386, 128)


def recipe_with_new_tokens(tmp_path: Path) -> dict[str, Any]:
    recipe = small_run.small_recipe(tmp_path)
    recipe["model"]["new_tokens"] = ["<a>", "<b>", "<c>", "<d>", "<turn>"]  # 13 tokens before, and 16 rows
    template = tmp_path / "template.jinja"
    template.write_text(small_run.TEMPLATE.replace("<{{ m['role'] }}>", "<turn> <{{ m['role'] }}>"))
    recipe["data"]["chat_template"] = str(template)
    recipe["training"]["max_steps"] = 6
    recipe["checkpoint"] = {"every": 3, "keep": 2}
    recipe["evaluation"] = {"samples": 0}
    return recipe


@pytest.mark.distributed
def test_a_run_with_new_tokens_goes_on_under_another_strategy(tmp_path: Path) -> None:
    recipe = recipe_with_new_tokens(tmp_path)
    file = small_run.write({**recipe, "strategy": "zero3"}, tmp_path)
    done = small_run.understudy(["train", str(file)], tmp_path)
    assert done.returncode == 0, done.stderr

    resume = tmp_path / "run" / "checkpoints" / "step-00000003"
    again = ["strategy=fsdp", f"output_dir={tmp_path / 'again'}", f"checkpoint.resume={resume}"]
    done = small_run.understudy(["train", str(file), *again], tmp_path)
    assert done.returncode == 0, done.stderr

    straight, resumed = (
        {row["step"]: row["loss"] for row in small_run.read_rows(tmp_path / name) if "loss" in row}
        for name in ("run", "again")
    )
    assert sorted(resumed) == [4, 5, 6]
    assert resumed == pytest.approx({step: straight[step] for step in resumed}, rel=1e-5)
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "again" / "model") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert model.config.vocab_size == len(tokenizer) == 18
    rows = model.get_input_embeddings().weight
    assert tokenizer.convert_tokens_to_ids("<turn>") == 17
    assert not torch.equal(rows[16], rows[17])  # `<d>` is nowhere in the data, and began as `<turn>` did
