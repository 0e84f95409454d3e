"""`understudy train` with a teacher that has another tokenizer and another chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tests import two_tokenizers
from tests.distributed.small_run import read_rows, understudy, write
from tests.divergence_formulas import universal_distance

pytestmark = pytest.mark.distributed

TEMPERATURE, WEIGHT = 2.0, 0.25
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
TEACHERS_TEMPLATE = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]{% else %}={{ m['content'] }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)
WORDS = ["née", " naïve", "日本", " language", " and", " a", "long er"]


def answer(i: int) -> str:
    """Something else for each i, with characters of several bytes."""
    return " ".join(WORDS[(i * step) % len(WORDS)].strip() for step in range(1, 3 + i % 3))


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    student = two_tokenizers.byte_level(["née", " naï", "日本", " language"], template=TEMPLATE)
    teacher = two_tokenizers.byte_level(
        [b"n\xc3", " naïve", " lang", "uage", " and", "日"], special=("</s>", "<s>"), template=TEACHERS_TEMPLATE
    )
    two_tokenizers.write(tmp_path / "student", student)
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    sizes["max_position_embeddings"] = 128
    for name, tokenizer, width, seed in (("student", student, 32, 1), ("teacher", teacher, 48, 2)):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(tokenizer) + 3, hidden_size=width, **sizes)  # three of padding
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        two_tokenizers.write(tmp_path / name, tokenizer)
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": answer(i)}]}
        for i in range(8)
    ]
    # An answer too long for the teacher, whose tokens are shorter there, and so cut off.
    rows[3]["messages"][1]["content"] = "née " * 20
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(tmp_path / "student")},
        "data": {"train": [{"path": str(tmp_path / "data.jsonl")}], "max_length": 64, "num_workers": 1},
        "objective": {
            "kind": "distillation",
            "teacher": {"kind": "resident", "path": str(tmp_path / "teacher")},
            "divergence": "uld",
            "temperature": TEMPERATURE,
            "cross_entropy_weight": WEIGHT,
        },
        "optimizer": {"learning_rate": 1.0e-2},
        "training": {"max_steps": 3, "global_batch_size": 8, "precision": "fp32"},
    }


def spelled(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], dict[bytes, tuple[int, bytes]]]:
    """The tokens of both, 64 at most, and which of them, standing for which bytes, comes after these bytes of `text`. A
    special token is the byte 255."""
    byte_of = {letter: bytes([byte]) for byte, letter in enumerate(two_tokenizers.letters())}
    tokens = tokenizer(prompt + text, add_special_tokens=False)["input_ids"][:64]
    said, found = b"", {}
    for place, token in enumerate(tokenizer.convert_ids_to_tokens(tokens)):
        special = token in tokenizer.get_added_vocab()
        stands_for = b"\xff" if special else b"".join(byte_of[letter] for letter in token)
        found[said] = place, stands_for
        said += stands_for
    head = prompt.replace("<s>", "\xff").replace("<end>", "\xff").encode("latin-1")
    return tokens, {at[len(head) :]: token for at, token in found.items() if at.startswith(head)}


def first_loss(tmp_path: Path) -> tuple[float, str]:
    """Of all examples, which the first step takes, in fp64 and one by one; and what the run should say of them."""
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64) for name in ("student", "teacher")
    ]
    student, teacher = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("student", "teacher"))
    theirs = {token: number for token, number in teacher.get_vocab().items() if token not in teacher.get_added_vocab()}
    matched = [(number, theirs[token]) for token, number in student.get_vocab().items() if token in theirs]
    matched.append((student.eos_token_id, teacher.eos_token_id))
    supervised = aligned = same = total = 0
    for line in (tmp_path / "data.jsonl").read_text().splitlines():
        asked, answered = (message["content"] for message in json.loads(line)["messages"])
        tokens, ours = spelled(student, f"user:\n{asked}<end>assistant:\n", f"{answered}<end>")
        read, others = spelled(teacher, f"<s>[{asked}]=", f"{answered}</s>")
        with torch.no_grad():
            said, told = (model(torch.tensor([ids])).logits[0] for model, ids in zip(models, (tokens, read)))
        for before, (place, stands_for) in ours.items():
            apart = 0.0
            if before in others:
                its_place, its = others[before]
                p = (told[its_place - 1, : len(teacher)] / TEMPERATURE).softmax(0)
                q = (said[place - 1, : len(student)] / TEMPERATURE).softmax(0)
                apart = float(universal_distance(p, q, matched if its == stands_for else ()))
                aligned, same = aligned + 1, same + (its == stands_for)
            entropy = -float(said[place - 1].log_softmax(0)[tokens[place]])
            total += (1 - WEIGHT) * TEMPERATURE**2 * apart + WEIGHT * entropy
            supervised += 1
    share = (
        f"reads {aligned / supervised:.1%} of the supervised tokens' beginnings alike, and {same / supervised:.1%} of "
    )
    share += "whole tokens"
    return total / supervised, f"{share}; {len(matched)} of {len(student)} tokens are in both vocabularies"


def test_strategies_and_kinds_of_teachers_agree_with_one_process(tmp_path: Path, recipe: dict[str, Any]) -> None:
    expected, words = first_loss(tmp_path)
    seen = {}
    for strategy, kind, processes in (("ddp", "resident", 1), ("fsdp", "sharded", 2)):
        recipe["objective"]["teacher"]["kind"] = kind
        recipe |= {"strategy": strategy, "output_dir": str(tmp_path / strategy), "cluster": {"processes": processes}}
        done = understudy(["train", str(write(recipe, tmp_path))], tmp_path)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
        seen[strategy] = [row["loss"] for row in read_rows(tmp_path / strategy) if "loss" in row]
    assert seen["ddp"][0] == pytest.approx(expected, rel=1e-5)
    assert len(seen["ddp"]) == 3
    assert seen["fsdp"] == pytest.approx(seen["ddp"], rel=1e-5)
