"""The token cache: named by content, built once, shared, rebuilt where damaged, read without torch."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chat_templates import CHATML
from tests.tiny_data import cache_of, prepare, recipe, write_lines, write_tokenizer
from understudy.data.cache import DamagedCacheError, TokenCache
from understudy.data.identity import FileDigests
from understudy.errors import UserError

pytestmark = pytest.mark.unit

ROWS = [{"instruction": f"Say {n}.", "output": f"I say {n}, said the fox."} for n in range(40)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", ROWS)


def test_examples_come_back_as_they_were_written(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, [([1, 2, 3], [0, 1, 1]), ([4, 5], [1, 0]), ([6] * 9, [1] * 9)])
    assert [cache.tokens(i).tolist() for i in range(3)] == [[1, 2, 3], [4, 5], [6] * 9]
    assert [cache.supervised(i).tolist() for i in range(2)] == [[0, 1, 1], [1, 0]]
    assert (cache.lengths.tolist(), cache.num_supervised.tolist()) == ([3, 2, 9], [2, 0, 8])
    assert (cache.source.tolist(), cache.row.tolist()) == ([0, 1, 0], [0, 1, 2])
    assert cache.digest == "key"


def test_prepared_data_decodes_to_the_conversation(tmp_path: Path, tokenizer: Path, rows: Path) -> None:
    from transformers import AutoTokenizer

    cache = TokenCache.open(prepare(recipe(rows), tokenizer, tmp_path / "cache").train)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    for i in (0, 39):
        messages = [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": ROWS[i]["output"]}]
        expected = loaded.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert cache.tokens(i).tolist() == expected
        supervised = cache.tokens(i)[cache.supervised(i).astype(bool)].tolist()
        assert loaded.decode(supervised) == ROWS[i]["output"] + "<|im_end|>"


def test_workers_give_what_one_process_gives(tmp_path: Path, tokenizer: Path) -> None:
    rows = write_lines(tmp_path / "many.jsonl", [{"text": f"the fox {n}"} for n in range(4200)])
    one, two = (
        TokenCache.open(prepare(recipe(rows, num_workers=n), tokenizer, tmp_path / f"cache{n}").train) for n in (1, 2)
    )
    assert one.digest == two.digest
    assert len(one) == len(two) == 4200
    assert all(np.array_equal(one.tokens(i), two.tokens(i)) for i in range(0, 4200, 97))
    assert one.statistics == two.statistics


@pytest.mark.parametrize(
    "change", [{"max_length": 64}, {"overflow": "drop"}, {"train_on_prompt": True}, {"chat_template": CHATML + " "}]
)
def test_what_changes_the_tokens_changes_the_key(
    tmp_path: Path, tokenizer: Path, rows: Path, change: dict[str, Any]
) -> None:
    cache = tmp_path / "cache"
    assert prepare(recipe(rows), tokenizer, cache).digest != prepare(recipe(rows, **change), tokenizer, cache).digest


def test_the_key_is_of_contents_not_of_places(tmp_path: Path, tokenizer: Path, rows: Path) -> None:
    moved = write_lines(tmp_path / "moved.jsonl", ROWS)
    other = write_tokenizer(tmp_path / "elsewhere")
    first = prepare(recipe(rows), tokenizer, tmp_path / "cache")
    assert prepare(recipe({"path": str(moved), "weight": 2.0}), other, tmp_path / "cache") == first
    write_lines(moved, ROWS[:-1])
    assert prepare(recipe(moved), tokenizer, tmp_path / "cache").digest != first.digest


def test_an_unchanged_file_is_not_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    path.write_text("abc")
    digests = FileDigests(tmp_path / "memory")
    before, status = digests(path), path.stat()
    path.write_text("abd")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests(path) == before
    path.write_text("abcd")
    assert digests(path) != before


def test_the_evaluation_share_is_the_same_each_time_and_apart_from_training(
    tmp_path: Path, tokenizer: Path, rows: Path
) -> None:
    found = prepare(recipe(rows, eval_fraction=0.25), tokenizer, tmp_path / "cache")
    assert found.evaluation is not None
    train, held_out = (set(TokenCache.open(path).row.tolist()) for path in (found.train, found.evaluation))
    assert train | held_out == set(range(40))
    assert not train & held_out
    assert 4 <= len(held_out) <= 16
    longer = write_lines(tmp_path / "longer.jsonl", [*ROWS, *ROWS])
    again = prepare(recipe(longer, eval_fraction=0.25), tokenizer, tmp_path / "cache")
    assert again.evaluation is not None
    assert {row for row in TokenCache.open(again.evaluation).row.tolist() if row < 40} == held_out
    reseeded = prepare(recipe(rows, eval_fraction=0.25, seed=7), tokenizer, tmp_path / "cache")
    assert reseeded.evaluation == found.evaluation


def test_overflow_truncates_drops_or_splits(tmp_path: Path, tokenizer: Path) -> None:
    rows = write_lines(tmp_path / "long.jsonl", [{"text": "x" * 25}, {"text": "y" * 4}])
    lengths = {
        overflow: TokenCache.open(
            prepare(recipe(rows, overflow=overflow, max_length=10), tokenizer, tmp_path / "cache").train
        ).lengths.tolist()
        for overflow in ("truncate", "drop", "split")
    }
    assert lengths == {"truncate": [10, 5], "drop": [5], "split": [10, 10, 6, 5]}


def test_examples_cut_to_their_prompt_are_dropped_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    rows = write_lines(tmp_path / "r.jsonl", [{"prompt": "q" * n, "completion": "a" * 5} for n in (3, 50)])
    found = prepare(recipe(rows, max_length=20), tokenizer, tmp_path / "cache")
    assert TokenCache.open(found.train).row.tolist() == [0]
    assert (found.train_statistics["truncated"], found.train_statistics["cut_to_prompt"]) == (1, 1)


def test_train_on_prompt_supervises_all_but_the_first_token(tmp_path: Path, tokenizer: Path, rows: Path) -> None:
    cache = TokenCache.open(prepare(recipe(rows, train_on_prompt=True), tokenizer, tmp_path / "cache").train)
    assert (cache.num_supervised == cache.lengths - 1).all()


def test_text_ends_in_eos_and_begins_in_bos_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "r.jsonl", [{"text": "fox"}, {"text": "<s>fox"}])
    for add_bos in (False, True):
        directory = write_tokenizer(tmp_path / f"bos{add_bos}", add_bos=add_bos)
        cache = TokenCache.open(prepare(recipe(rows), directory, tmp_path / "cache").train)
        assert [cache.tokens(i)[0] == 0 for i in range(2)] == [add_bos, True]
        assert all(cache.tokens(i)[-1] == 1 and cache.supervised(i)[-1] for i in range(2))
        assert cache.lengths[1] - cache.lengths[0] == (0 if add_bos else 1)


def test_a_template_that_renders_bos_is_not_given_another(tmp_path: Path, rows: Path) -> None:
    directory = write_tokenizer(tmp_path / "bos", chat_template="{{ bos_token }}" + CHATML, add_bos=True)
    cache = TokenCache.open(prepare(recipe(rows), directory, tmp_path / "cache").train)
    assert cache.tokens(0)[:2].tolist() == [0, 2]


def test_duplicates_are_counted(tmp_path: Path, tokenizer: Path) -> None:
    rows = write_lines(tmp_path / "r.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "a"}])
    assert prepare(recipe(rows), tokenizer, tmp_path / "cache").train_statistics["duplicates"] == 1


@pytest.mark.parametrize("damage", ["shorter", "no index", "not json"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, tokenizer: Path, rows: Path, damage: str) -> None:
    path = prepare(recipe(rows), tokenizer, tmp_path / "cache").train
    if damage == "shorter":
        os.truncate(path / "examples.arrow", 100)
    elif damage == "no index":
        (path / "cache.json").unlink()
    else:
        (path / "cache.json").write_text("[")
    with pytest.raises(DamagedCacheError):
        TokenCache.open(path)
    said: list[str] = []
    assert prepare(recipe(rows), tokenizer, tmp_path / "cache", report=said.append).train == path
    assert len(TokenCache.open(path)) == 40
    assert any("built again" in line for line in said)


def test_a_failed_build_leaves_nothing(tmp_path: Path, tokenizer: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text"')
    with pytest.raises(UserError):
        prepare(recipe(bad), tokenizer, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


def build_slowly(root: str, barrier: Any, answers: Any) -> None:
    """Fills an entry, counting how often; run in two processes at once."""
    import time

    from understudy.data.builder import open_or_build

    said: list[str] = []

    def fill(writer: Any) -> dict[str, Any]:
        (Path(root) / f"built-by-{os.getpid()}").touch()
        time.sleep(0.5)
        return {}

    barrier.wait()
    entry = open_or_build(Path(root), "shared", fill, said.append)
    answers.put((len(entry), said))


def test_of_two_builders_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=build_slowly, args=(str(tmp_path), barrier, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert len(list(tmp_path.glob("built-by-*"))) == 1
    assert [count for count, _ in found] == [0, 0]
    assert sorted(len(said) for _, said in found) == [0, 1]


def test_a_second_start_imports_neither_torch_nor_transformers(tmp_path: Path, tokenizer: Path, rows: Path) -> None:
    prepare(recipe(rows, eval_fraction=0.2), tokenizer, tmp_path / "cache")
    script = f"""
import json, sys
for name in ("torch", "transformers", "datasets"):
    sys.modules[name] = None  # importing it now fails
from pathlib import Path
from tests.tiny_data import prepare, recipe
from understudy.data.cache import TokenCache
made = prepare(recipe({str(rows)!r}, eval_fraction=0.2), Path({str(tokenizer)!r}), Path({str(tmp_path / "cache")!r}))
print(json.dumps([len(TokenCache.open(made.train)), len(TokenCache.open(made.evaluation))]))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(done.stdout)) == 40
