"""A teacher with another tokenizer, as far as one process prepares it: what is said of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPT2Config

from tests import two_tokenizers
from tests.tiny_data import cache_of
from understudy.cli.main import exit_status
from understudy.contracts import IGNORED, Batch
from understudy.errors import UserError
from understudy.objectives.targets import DenseTargets
from understudy.objectives.teachers.aligned_documents import (
    AlignedDocument,
    AlignedDocuments,
    AlignmentCounts,
    write_aligned_documents,
)
from understudy.objectives.teachers.aligned_teacher import AlignedTeacher
from understudy.objectives.teachers.cache_format import example_key
from understudy.training import start
from understudy.training.job import read_job

pytestmark = pytest.mark.unit

TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<end>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant:{% endif %}"
SHOUTED = TEMPLATE.replace("m['content']", "m['content'] | upper")


def write_model(directory: Path, tokenizer: Any, positions: int) -> None:
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=positions)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    two_tokenizers.write(directory, tokenizer)


def write_teacher(template: str | None = TEMPLATE, positions: int = 64) -> None:
    teacher = two_tokenizers.byte_level(
        [" wor", "fine"], special=("</s>",), template=template and template.replace("<end>", "</s>")
    )
    write_model(Path("teacher"), teacher, positions)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a student and data; training itself is left out, and counts as success."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(start, "launch_local", lambda *arguments, **options: None)
    write_model(Path("student"), two_tokenizers.byte_level(["fine", " world"], template=TEMPLATE), 64)
    answers = ["fine world", "a fine world", "fine"]
    turns = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": a}] for i, a in enumerate(answers)]
    Path("rows.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    return tmp_path


def train(**objective: Any) -> int:
    recipe = {
        "output_dir": "run",
        "model": {"path": "student"},
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": 48, "num_workers": 1},
        "objective": {
            "kind": "distillation",
            "divergence": "uld",
            "teacher": {"kind": "resident", "path": "teacher"},
            **objective,
        },
        "training": {"max_steps": 1, "global_batch_size": 2},
    }
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    return exit_status(["train", "r.yaml"])


def test_what_two_tokenizers_have_in_common_is_said_and_found_by_the_processes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_teacher()
    assert train() == 0, capsys.readouterr().err
    # fine| world|END against fine| wor|l|d|END, and what comes before them a byte a token.
    said = (
        "reads 100.0% of the supervised tokens' beginnings alike, and 80.0% of whole tokens; 263 of 265 tokens are in"
    )
    assert said in capsys.readouterr().out
    (teacher,) = read_job(Path("run/job.json")).teachers
    assert teacher.alignment is not None
    found = AlignedDocuments(teacher.alignment)
    assert found.counts == AlignmentCounts(
        supervised=10, aligned=10, same=8, matched=263, student_classes=265, teacher_classes=263
    )
    assert len(teacher.examples) == 1


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "nothing in common": (
        lambda: write_teacher(SHOUTED),
        {},
        "r.yaml:11: the teacher teacher reads 0.0% of the supervised tokens' beginnings as the student does, too few",
    ),
    "no template": (
        lambda: write_teacher(None),
        {},
        "rows.jsonl:1: the teacher teacher cannot read this with its own tokenizer and chat template: this is a "
        "conversation, but the tokenizer has no chat template; name a teacher that can.",
    ),
    "too few positions": (lambda: write_teacher(positions=8), {}, "and the teacher has positions for 8;"),
    "another divergence": (
        write_teacher,
        {"divergence": "forward_kl"},
        "name a teacher of the same family, or set `objective.divergence: uld` with a resident or sharded one.",
    ),
    "a cache": (
        write_teacher,
        {"teacher": {"kind": "cache", "path": "teacher"}},
        "and a cache has none; name one that",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_that_cannot_be_aligned_is_refused(
    case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, objective, words = REFUSED[case]
    made()
    capsys.readouterr()
    assert train(**objective) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert not Path("run").exists()


class Recorder:
    """A teacher whose logits tell what they are about: token and position."""

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []

    def targets(self, batch: Batch) -> DenseTargets:
        self.lengths.append(batch.document_offsets.diff().tolist())
        logits = torch.stack([batch.tokens, batch.positions], 1)[batch.labels != IGNORED]
        return DenseTargets(lambda rows: logits[rows], len(logits))


def test_each_document_is_read_as_the_teacher_has_it(tmp_path: Path) -> None:
    """Documents in any order, equal ones too; one that has no counterpart is not read, and an empty batch asks of
    nothing."""
    examples = [([5, 6, 7, 8], [0, 0, 1, 1]), ([9] * 7, [0] * 7), ([1, 2, 3], [0, 1, 1])]
    cache = cache_of(tmp_path, examples)
    one, two, three = (torch.tensor(tokens) for tokens in ([1, 2, 3], [4, 5, 6, 7], [8, 9]))
    labels = [torch.tensor(values) for values in ([2, 3, IGNORED], [IGNORED, 6, 7, IGNORED], [9, IGNORED])]

    def document(example: int, rows: list[int], positions: list[int], same: list[bool]) -> AlignedDocument:
        return AlignedDocument(
            example, np.array(rows, np.int32), np.array(positions, np.int32), np.array(same, np.bool_)
        )

    documents = {
        example_key(one, labels[0] != IGNORED): document(0, [0, 1], [1, 2], [True, False]),
        example_key(two, labels[1] != IGNORED): document(2, [1], [0], [True]),
        example_key(three, labels[2] != IGNORED): document(-1, [], [], []),
    }
    counts = AlignmentCounts(5, 3, 2, 1, 10, 10)
    write_aligned_documents(tmp_path, documents, np.array([[3, 4]]), counts)
    model = Recorder()
    teacher = AlignedTeacher(model, AlignedDocuments(tmp_path), cache.tokens, torch.device("cpu"))

    batch = Batch.of([(two, labels[1]), (three, labels[2]), (one, labels[0]), (two, labels[1])])
    targets = teacher.targets(batch)
    assert len(targets) == 7
    assert targets.rows.tolist() == [1, 3, 4, 6]
    assert targets.same.tolist() == [True, True, False, True]
    assert targets.told.logits(slice(0, 4)).tolist() == [[1, 0], [6, 1], [7, 2], [1, 0]]
    assert targets.vocabulary.student_of_teacher.tolist() == [-1, -1, -1, -1, 3, -1, -1, -1, -1, -1]
    assert (len(teacher.targets(Batch.of([]))), model.lengths) == (0, [[3, 4, 3], [1]])

    with pytest.raises(UserError, match="examples of the recipe's data alone"):
        teacher.targets(Batch.of([(one, torch.tensor([2, IGNORED, IGNORED]))]))
