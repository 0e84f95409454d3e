"""Rows of each format become conversations and documents, from every kind of file."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from understudy.data.column_names import rename
from understudy.data.examples import Conversation, Document
from understudy.data.formats.registry import formats, recognise
from understudy.data.sources import find_source
from understudy.errors import UserError
from understudy.recipe.schema import DataSource

pytestmark = pytest.mark.unit

ROWS = [{"instruction": "Add 1, 2.", "input": "", "output": "3\n"}, {"instruction": "é", "input": "x", "output": "ok"}]
CALL = {"name": "weather", "arguments": '{"city": "Bern"}'}


def parse(name: str, row: dict[str, Any]) -> Conversation | Document:
    return formats()[name].parse(row)


def roles(example: Conversation | Document) -> list[str]:
    assert isinstance(example, Conversation)
    return [message["role"] for message in example.messages]


def read(path: Path | str, tmp_path: Path, **options: Any) -> list[Any]:
    rows = find_source(DataSource(path=str(path), **options), cache_dir=tmp_path / "cache").rows(lambda count: None)
    return [(dict(row.columns()), row.line) for row in rows]


def test_alpaca_joins_instruction_and_input() -> None:
    example = parse("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]]})
    assert isinstance(example, Conversation)
    assert [message["content"] for message in example.messages] == ["a", "b", "Add.\n1 2", "3"]
    assert roles(parse("alpaca", {"instruction": "i", "output": "o", "system": "s"})) == ["system", "user", "assistant"]


def test_sharegpt_reads_speakers_tools_and_calls() -> None:
    turns = [("human", "?"), ("function_call", json.dumps(CALL)), ("observation", "rain"), ("gpt", "It rains.")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns], "system": "s", "tools": "[]"}
    example = parse("sharegpt", row)
    assert isinstance(example, Conversation)
    assert roles(example) == ["system", "user", "assistant", "tool", "assistant"]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    assert example.messages[2]["tool_calls"] == [call]
    assert example.tools is None


def test_messages_reads_openai_chats() -> None:
    row = {
        "messages": [
            {"role": "system", "content": "s", "tool_calls": None},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
            {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "weather"},
            {"role": "assistant", "content": "It rains.", "reasoning": "wet"},
        ],
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    }
    example = parse("messages", row)
    assert isinstance(example, Conversation)
    assert example.messages[0] == {"role": "system", "content": "s"}
    assert example.messages[1]["content"] == "ab"
    assert example.messages[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
    assert example.messages[3] == {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "weather"}
    assert example.messages[4]["reasoning_content"] == "wet"
    assert example.tools == row["tools"]


def test_prompt_and_completion_are_text_or_messages() -> None:
    assert parse("prompt_completion", {"prompt": "a", "completion": "bc"}) == Document("abc", prompt_length=1)
    user, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    example = parse("prompt_completion", {"prompt": [user, answer, user], "completion": [answer]})
    assert isinstance(example, Conversation)
    assert (roles(example), example.supervised_from) == (["user", "assistant", "user", "assistant"], 3)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["instruction", "input", "output"], "alpaca"),
        (["conversations", "id"], "sharegpt"),
        (["messages", "prompt", "completion"], "messages"),
        (["prompt", "completion"], "prompt_completion"),
        (["text", "url"], "text"),
    ],
)
def test_each_format_is_recognised_by_its_columns_and_by_no_other(columns: list[str], name: str) -> None:
    row = dict.fromkeys(columns)
    assert recognise(row).name == name
    assert [known.name for known in formats().values() if known.recognises(row)] == [name]


def test_unknown_columns_are_refused_with_the_formats() -> None:
    with pytest.raises(UserError, match=r"no format is recognised from the columns \(question, reply\)"):
        recognise({"question": 1, "reply": 2})


def test_columns_are_renamed() -> None:
    row = rename({"q": "a", "r": "b", "prompt": "c"}, {"prompt": "q", "completion": "r"})
    assert row == {"prompt": "a", "completion": "b"}
    with pytest.raises(UserError, match=r"no column 'x', which columns.prompt names"):
        rename({"q": "a"}, {"prompt": "x"})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "hi"}, "must be a list of messages, not a string"),
        ({"messages": []}, "holds no messages"),
        ({"messages": [{"role": "bot", "content": ""}]}, "message 1 .* has the role 'bot'; the roles are"),
        ({"messages": [{"content": ""}]}, "has no role"),
        ({"messages": [{"role": "user"}]}, "neither content nor tool calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]}, "only the assistant can make"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "must name the function"),
        ({"messages": [{"role": "assistant", "content": "x"}], "tools": "{"}, "not valid JSON"),
    ],
)
def test_a_bad_message_is_refused_in_a_sentence(row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse("messages", row)


def compressed(path: Path) -> list[Path]:
    content = path.read_bytes()
    writers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}
    for suffix, compress in writers.items():
        path.with_name(f"{path.name}.{suffix}").write_bytes(compress(content))
    return [path, *(path.with_name(f"{path.name}.{suffix}") for suffix in writers)]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, ROWS)).encode())
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    paths = sorted(path for path in tmp_path.iterdir() if path.is_file())
    for path in [path for each in paths for path in compressed(each)]:
        assert [row for row, _ in read(path, tmp_path)] == ROWS, path.name


def test_lines_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    assert [line for _, line in read(tmp_path / "a.json", tmp_path)] == [2, 7]
    (tmp_path / "a.csv").write_text('text\n"one\ntwo"\nthree\n')
    assert read(tmp_path / "a.csv", tmp_path) == [({"text": "one\ntwo"}, 2), ({"text": "three"}, 4)]
    (tmp_path / "a.txt").write_text("one\n\ntwo\r\n")
    assert read(tmp_path / "a.txt", tmp_path) == [({"text": "one"}, 1), ({"text": "two"}, 3)]


def test_a_directory_gives_its_files_of_the_split_in_order(tmp_path: Path) -> None:
    for name in ("train-00001.txt", "train-00000.txt", "test.txt"):
        (tmp_path / name).write_text(name)
    assert [row["text"] for row, _ in read(tmp_path, tmp_path)] == ["train-00000.txt", "train-00001.txt"]
    assert [row["text"] for row, _ in read(tmp_path, tmp_path, split="test")] == ["test.txt"]
    with pytest.raises(UserError, match="has the splits test, train but no 'validation'"):
        read(tmp_path, tmp_path, split="validation")
    assert len(read(tmp_path / "*.txt", tmp_path)) == 3
    assert len(read(tmp_path / "*.txt", tmp_path, max_samples=2)) == 2


def test_a_hub_data_set_is_read_through_datasets_at_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked: dict[str, Any] = {}

    def load(path: str, **options: Any) -> datasets.Dataset:
        asked.update(options, path=path)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: f"/snapshots/abc{len(name)}")
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("owner/name", tmp_path, split="test", subset="main", max_samples=1) == [(ROWS[0], None)]
    assert [asked[key] for key in ("path", "name", "revision", "split")] == ["owner/name", "main", "abc10", "test"]
    assert Path(asked["cache_dir"]).is_relative_to(tmp_path)
