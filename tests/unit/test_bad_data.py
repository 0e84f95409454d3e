"""Bad data ends in one sentence with file and line, and nothing is written."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny_data import prepare, recipe, write_lines, write_tokenizer
from understudy.data import builder
from understudy.data.formats.registry import formats, recognise
from understudy.data.readers import KINDS, read_rows
from understudy.errors import UserError

pytestmark = pytest.mark.unit

GOOD = '{"instruction": "i", "output": "o"}\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def refusal(made: Any, tokenizer: Path, tmp_path: Path, **options: Any) -> UserError:
    """The error that preparing ends in; checks that it is one line and that nothing was built."""
    with pytest.raises(UserError) as caught:
        prepare(made, tokenizer, tmp_path / "cache", **options)
    assert "\n" not in str(caught.value)
    tokens = tmp_path / "cache" / "tokens"
    assert not tokens.exists() or all(path.suffix == ".lock" for path in tokens.iterdir())
    return caught.value


FILES: dict[str, tuple[str, bytes, int | None, str]] = {
    "empty file": ("a.json", b"", None, "the file is empty"),
    "empty list": ("a.json", b"[]", None, "the file is empty"),
    "truncated list": ("a.json", b'[\n{"instruction": "i",\n "output": "o"},\n{"instru', 4, "ends in the middle"),
    "truncated after a row": ("a.json", b'[\n{"text": "a"}\n', 3, "ends in the middle"),
    "truncated line": ("a.jsonl", GOOD.encode() + b'{"instruction": "i", "out', 2, "not valid JSON, or cut off"),
    "bytes in a line": ("a.jsonl", GOOD.encode() * 2 + b'{"instruction": "\xff"}', 3, "not UTF-8"),
    "bytes in a list": ("a.json", b'[\n{"text": "a"},\n{"text": "\xe9"}]', 3, "not UTF-8"),
    "bytes in text": ("a.txt", b"one\ntwo \xff\n", 2, "not UTF-8"),
    "bytes in csv": ("a.csv", b"text\none\n\xfe\n", 3, "not UTF-8"),
    "UTF-16": ("a.jsonl", GOOD.encode("utf-16"), 1, "not UTF-8"),
    "wrong columns": ("a.jsonl", b'{"question": "q"}\n', 1, "no format is recognised"),
    "wrong columns later": ("a.jsonl", GOOD.encode() + b'{"instruction": "q"}\n', 2, "no column 'output'"),
    "wrong type": ("a.jsonl", GOOD.encode() + b'{"instruction": 1, "output": "o"}', 2, "must hold text, but holds 1"),
    "no object": ("a.jsonl", GOOD.encode() + b'["instruction", "output"]', 2, "must be an object"),
    "no object in a list": ("a.json", b'[\n{"text": "a"},\n3]', 3, "must be an object"),
    "uneven csv": ("a.csv", b"instruction,output\na,b\nc\n", 3, "1 cells, but the header names 2"),
    "half a surrogate": ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', 2, "surrogate"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:-20], None, "damaged or cut off"),
    "no parquet": ("a.parquet", b"PAR1 nothing", None, "cannot be read as parquet"),
    "no arrow": ("a.arrow", b"ARROW1 nothing at all", None, "cannot be read as arrow"),
    "unanswered": ("a.jsonl", b'{"messages": [{"role": "usr", "content": "x"}]}', 1, "has the role 'usr'"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_refused_with_its_line(case: str, tokenizer: Path, tmp_path: Path) -> None:
    name, content, line, words = FILES[case]
    (tmp_path / name).write_bytes(content)
    error = refusal(recipe(tmp_path / name), tokenizer, tmp_path)
    assert (error.file, error.line) == (str(tmp_path / name), line)
    assert words in error.message


def test_a_row_of_a_columnar_file_is_named_by_its_number(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "i", "output": "o"}, {"instruction": "i", "output": None, "history": "x"}]
    schema = pa.schema([(name, pa.string()) for name in ("instruction", "output", "history")])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet")
    error = refusal(recipe(tmp_path / "a.parquet"), tokenizer, tmp_path)
    assert str(error).startswith(f"{tmp_path / 'a.parquet'}: in row 2, the column 'history'")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere/rows.json", "there is no file or directory nowhere/rows.json"),
        ("nowhere/*.json", "no file matches nowhere/*.json"),
        ("/nowhere/rows", "there is no file or directory /nowhere/rows"),
        ("/" + "long" * 200, "cannot be read (File name too long)"),
    ],
)
def test_a_missing_file_is_named_at_the_recipes_line(path: str, words: str, tokenizer: Path, tmp_path: Path) -> None:
    error = refusal(recipe(path), tokenizer, tmp_path)
    assert (error.file, error.line) == ("recipe.yaml", 5)
    assert words in error.message


def test_a_directory_without_data_or_of_several_kinds_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "holds no data files" in refusal(recipe(folder), tokenizer, tmp_path).message
    (folder / "a.txt").write_text("a")
    (folder / "b.jsonl").write_text(GOOD)
    assert "several kinds (jsonl, txt)" in refusal(recipe(folder), tokenizer, tmp_path).message


def test_a_directory_where_only_some_files_name_a_split_is_refused_not_half_read(
    tokenizer: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("more.jsonl", "train.jsonl"):
        (folder / name).write_text(GOOD)
    assert "others that name none (more.jsonl)" in refusal(recipe(folder), tokenizer, tmp_path).message
    (tmp_path / "a.pdf").write_text("a")
    assert "no known kind of data" in refusal(recipe(tmp_path / "a.pdf"), tokenizer, tmp_path).message


@pytest.mark.parametrize("format_name", ["auto", "text"])
def test_an_unknown_field_in_columns_is_refused(format_name: str, tokenizer: Path, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "a.jsonl", [{"x": "y", "text": "z"}])
    source = {"path": str(rows), "format": format_name, "columns": {"txt": "x"}}
    assert "the format text has no field 'txt'; it has text" in refusal(recipe(source), tokenizer, tmp_path).message


def test_a_bad_row_met_by_a_worker_is_named_the_same(tokenizer: Path, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "a.jsonl", [{"text": "a"}] * 4200 + [{"text": 1}])
    error = refusal(recipe(rows, num_workers=2), tokenizer, tmp_path)
    assert str(error) == f"{rows}:4201: the column 'text' must hold text, but holds 1."


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "not valid Jinja"),
        ("{{ raise_exception('only tuesdays') }}", "only tuesdays"),
        ("{{ messages[9].content }}", "the chat template fails on this conversation"),
    ],
)
def test_a_template_that_fails_names_the_row(template: str, words: str, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    error = refusal(recipe(tmp_path / "a.jsonl", chat_template=template), tokenizer, tmp_path)
    assert words in error.message
    assert error.file is not None


def test_a_conversation_without_a_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    bare = write_tokenizer(tmp_path / "bare", chat_template=None)
    error = refusal(recipe(tmp_path / "a.jsonl"), bare, tmp_path)
    assert (error.file, error.line) == (str(tmp_path / "a.jsonl"), 1)
    assert "set data.chat_template" in error.message
    completions = write_lines(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}])
    prepare(recipe(completions), bare, tmp_path / "cache")


def test_max_length_shorter_than_every_prompt_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD * 3)
    error = refusal(recipe(tmp_path / "a.jsonl", max_length=3), tokenizer, tmp_path)
    assert (error.file, error.line) == ("recipe.yaml", 9)
    assert "max_length 3 is shorter than every prompt" in error.message
    error = refusal(recipe(tmp_path / "a.jsonl", max_length=3, overflow="drop"), tokenizer, tmp_path)
    assert "every example is longer than max_length 3" in error.message


def test_data_without_a_supervised_token_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    error = refusal(recipe(rows), tokenizer, tmp_path)
    assert (error.file, error.line) == ("recipe.yaml", 4)
    assert "no token of this data is supervised" in error.message


@pytest.mark.parametrize("cached", [False, True])
def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(cached: bool, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    if cached:
        prepare(recipe(tmp_path / "a.jsonl"), tokenizer, tmp_path / "cache", vocab_size=300)
    with pytest.raises(UserError, match="vocabulary of 100 is smaller than the tokenizer's 300 tokens") as caught:
        prepare(recipe(tmp_path / "a.jsonl"), tokenizer, tmp_path / "cache", vocab_size=100)
    assert (caught.value.file, caught.value.line) == ("recipe.yaml", 2)


def test_an_evaluation_share_of_too_few_rows_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match=r"eval_fraction 0\.01 leaves no example for the evaluation data"):
        prepare(recipe(tmp_path / "a.jsonl", eval_fraction=0.01), tokenizer, tmp_path / "cache")


def test_a_full_disk_is_refused_and_leaves_nothing(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.jsonl").write_text(GOOD)
    monkeypatch.setattr(builder.os, "fsync", full)
    assert "no space is left" in refusal(recipe(tmp_path / "a.jsonl"), tokenizer, tmp_path).message


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted({column for known in formats().values() for column in known.columns}))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "tool", "bot"]) | JSON_VALUES,
            "from": st.sampled_from(["human", "gpt", "function_call"]) | JSON_VALUES,
            "content": st.text(max_size=4) | JSON_VALUES,
            "value": JSON_VALUES,
            "tool_calls": JSON_VALUES
            | st.lists(st.dictionaries(st.sampled_from(["function", "name", "id"]), JSON_VALUES)),
        },
    ),
    max_size=3,
)
TURNS = MESSAGES | JSON_VALUES


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(FIELDS, TURNS, max_size=4))
def test_a_malformed_row_raises_nothing_but_a_users_error(row: dict[str, Any]) -> None:
    assert_only_user_errors([lambda: recognise(row)], placed=False)
    assert_only_user_errors([lambda known=known: known.parse(row) for known in formats().values()], placed=False)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    compression=st.sampled_from(["", ".gz", ".zst", ".bz2", ".xz"]),
    content=st.binary(max_size=60) | st.text(alphabet='[{"a:,\\u1}]\n 0', max_size=40).map(str.encode),
)
def test_a_malformed_file_raises_nothing_but_a_users_error(
    kind: str, compression: str, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / f"file.{kind}{compression}"
    path.write_bytes(content)
    assert_only_user_errors([lambda: [row.columns() for row in read_rows(path, kind, 0, lambda count: None)]])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(FIELDS, JSON_VALUES, min_size=1, max_size=3), min_size=1, max_size=4),
    cut=st.integers(0, 80),
)
def test_a_truncated_json_file_raises_nothing_but_a_users_error(
    rows: list[dict[str, Any]], cut: int, tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    content = json.dumps(rows)
    path.write_text(content[: max(1, len(content) - cut)])
    assert_only_user_errors([lambda: [row.columns() for row in read_rows(path, "json", 0, lambda count: None)]])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries({"messages": MESSAGES}), min_size=1, max_size=3))
def test_preparing_malformed_rows_raises_nothing_but_a_users_error(
    rows: list[Any], tokenizer: Path, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", rows)
    assert_only_user_errors([lambda: prepare(recipe(path), tokenizer, tmp_path / "cache")])


def assert_only_user_errors(attempts: Sequence[Callable[[], object]], *, placed: bool = True) -> None:
    """Each attempt succeeds or raises a `UserError` of one line, with a file where it is `placed`."""
    for attempt in attempts:
        refusal: UserError | None = None
        try:
            attempt()
        except UserError as error:
            refusal = error
        assert refusal is None or ("\n" not in str(refusal) and (refusal.file is not None or not placed))
