"""A teacher's answers as data: what is asked, how it is drawn, what is kept on the way, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from tests import tiny_data
from tests.distributed import small_run
from understudy.cli.main import exit_status
from understudy.data.prompts import Prompt, Prompts, training_prompts
from understudy.errors import OutOfMemoryError, UserError
from understudy.recipe.source_map import SourceMap
from understudy.training.answer_parts import ABOUT, Answer, AnswerFile, AnswerKey, AnswerParts
from understudy.training.answerers import AnsweringModel, ModelAnswerer
from understudy.training.answering import Sampling, answer_all
from understudy.training.generation import Chance

pytestmark = pytest.mark.unit

SETTINGS = {ABOUT: "a test", "teacher": "A", "data": "B", "temperature": 0.5, "max_samples": None}


def asked(i: int) -> Prompt:
    return Prompt(0, i, [{"role": "user", "content": small_run.WORDS[i % 8]}])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    small_run.write_tokenizer(directory)
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=13, max_position_embeddings=64, initializer_range=0.3, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def answerer(teacher: Path, temperature: float = 1.0, max_new_tokens: int = 12) -> ModelAnswerer:
    model = AnsweringModel("teacher", teacher, teacher, None, torch.float32)
    return ModelAnswerer(model, 0, Sampling(max_new_tokens, temperature), seed=3, batch_tokens=10_000)


# What is asked


def prompts_of(tmp_path: Path, *rows: dict[str, Any], **source: Any) -> Prompts:
    file = tiny_data.write_lines(tmp_path / "rows.jsonl", rows)
    recipe = tiny_data.recipe({"path": str(file), **source})
    return training_prompts(recipe, SourceMap("recipe.yaml", {}), tmp_path / "cache", None, lambda line: None)


def turns(*said: str) -> list[dict[str, str]]:
    """u:words, a:words or s:words."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in said]


def test_a_conversation_asks_up_to_its_last_answer(tmp_path: Path) -> None:
    found = prompts_of(
        tmp_path,
        {"messages": turns("s:be kind", "u:one", "a:two", "u:three", "a:four")},
        {"messages": turns("s:be kind")},
        {"messages": turns("u:one", "a:two", "u:three")},
        {"messages": turns("a:one")},
        {"messages": turns("u:  ", "a:one")},
        {"messages": turns("u:one", "a:two"), "tools": [{"name": "clock"}]},
    )
    assert found.without == 3
    assert found.asked == [
        Prompt(0, 0, turns("s:be kind", "u:one", "a:two", "u:three")),
        Prompt(0, 2, turns("u:one", "a:two", "u:three")),
        Prompt(0, 5, turns("u:one"), [{"name": "clock"}]),
    ]


def test_other_formats_ask_too(tmp_path: Path) -> None:
    alpaca = {"instruction": "add", "input": "1 and 2", "output": "3", "system": "be brief"}
    assert prompts_of(tmp_path, alpaca).asked == [Prompt(0, 0, turns("s:be brief", "u:add\n1 and 2"))]
    plain = [{"prompt": "one ", "completion": "two"}, {"prompt": "", "completion": "two"}]
    found = prompts_of(tmp_path, *plain)
    assert (found.asked, found.without) == ([Prompt(0, 0, turns("u:one "))], 1)


def test_only_what_is_trained_on_is_asked(tmp_path: Path) -> None:
    file = tiny_data.write_lines(tmp_path / "rows.jsonl", [{"messages": turns(f"u:{i}", "a:x")} for i in range(50)])
    asked = {}
    for fraction in (0.0, 0.5):
        recipe = tiny_data.recipe(file, eval_fraction=fraction)
        found = training_prompts(recipe, SourceMap("recipe.yaml", {}), tmp_path, 20, lambda line: None)
        asked[fraction] = [prompt.row for prompt in found.asked]
    assert asked[0.0] == list(range(20))
    assert len(asked[0.5]) == 20
    assert set(asked[0.5]) - set(range(20))


def test_what_asks_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl is plain text, which asks nothing that could be answered"):
        prompts_of(tmp_path, {"text": "once upon a time"})
    with pytest.raises(UserError, match="no row of this data has a prompt"):
        prompts_of(tmp_path, {"messages": turns("a:one")})
    with pytest.raises(UserError, match="half of a surrogate pair"):
        prompts_of(tmp_path, {"messages": turns("u:\ud800", "a:x")})


# How it is answered


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_tokens_are_drawn_as_often_as_the_model_says(teacher: Path, temperature: float, top_p: float) -> None:
    count = 2000
    given = answerer(teacher)
    prompt = given._reading.tokens(asked(3))
    chance = Chance(temperature, top_p, [(5, i) for i in range(count)])
    drawn = answer_all(
        given._network, given._reading.tokenizer, [prompt] * count, [1] * count,
        ends=frozenset(), batch_tokens=10**9, chance=chance,
    )  # fmt: skip
    found = torch.bincount(torch.tensor([tokens[0] for _, tokens in drawn]), minlength=13) / count
    network = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.softmax(network(torch.tensor([prompt])).logits[0, -1] / temperature, dim=0)
    falling = wanted.sort(descending=True).values
    least = falling[int((falling.cumsum(0) < top_p).sum().clamp(max=12))]
    wanted = torch.where(wanted >= least, wanted, 0.0)
    wanted /= wanted.sum()
    assert found[wanted == 0].sum() == 0
    assert (found - wanted).abs().max() < 4 * (0.25 / count) ** 0.5


def test_an_answer_depends_on_seed_and_example_alone(teacher: Path) -> None:
    together = answerer(teacher)
    prompts = [asked(i) for i in (0, 8, 3, 16)]
    answers = dict(together.answers(prompts))
    for i, prompt in enumerate(prompts):
        assert dict(together.answers([prompt])) == {0: answers[i]}
    # The same words, in other rows.
    assert len({answers[i].text for i in (0, 1, 3)}) == 3
    likeliest = dict(answerer(teacher, temperature=0.0).answers(prompts))
    assert likeliest[0] == likeliest[1] == likeliest[3]


def test_an_answer_says_whether_it_ended_and_leaves_the_end_out(teacher: Path) -> None:
    prompts = [asked(i) for i in range(24)]
    answers = [answer for _, answer in answerer(teacher, max_new_tokens=6).answers(prompts)]
    assert {answer.finished for answer in answers} == {True, False}
    for answer in answers:
        assert "<end>" not in answer.text
        assert answer.tokens == 6 or answer.finished


def test_what_memory_does_not_hold_together_is_answered_in_parts(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, prompts, sizes = answerer(teacher), [asked(i) for i in range(7)], []
    expected = dict(given.answers(prompts))
    generate = given._network.generate

    def scarce(tokens: torch.Tensor, **others: Any) -> Any:
        sizes.append(len(tokens))
        if len(tokens) > most:
            raise torch.OutOfMemoryError("out of memory")
        return generate(tokens, **others)

    monkeypatch.setattr(given._network, "generate", scarce)
    most = 2
    assert dict(given.answers(prompts)) == expected
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    most = 0
    with pytest.raises(OutOfMemoryError, match="over a single answer"):
        list(given.answers(prompts))


# What is kept on the way


def kept(parts: AnswerParts, process: int, *rows: int) -> None:
    file = AnswerFile(parts, process)
    file.add({AnswerKey(0, row): Answer(f"answer\n{row} ü", row, finished=row % 2 == 0) for row in rows})
    file.close()


def test_answers_come_back_and_a_line_that_was_cut_off_counts_for_nothing(tmp_path: Path) -> None:
    parts = AnswerParts(tmp_path / "deep" / "answers.jsonl")
    with parts.claimed(SETTINGS):
        kept(parts, 0, 2, 4)
        kept(parts, 1, 1, 3)
        (file,) = parts.directory.glob("*-1.jsonl.part")
        whole = file.read_bytes()
        first = whole.index(b"\n") + 1
        for end in range(first, len(whole) - 1):
            file.write_bytes(whole[:end])
            assert sorted(key.row for key in parts.answers()) == [1, 2, 4]
        kept(parts, 1, 5)
        assert sorted(key.row for key in parts.answers()) == [1, 2, 4, 5]
        assert parts.answers()[AnswerKey(0, 5)] == Answer("answer\n5 ü", 5, finished=False)


def test_only_the_same_settings_go_on_and_what_differs_is_named(tmp_path: Path) -> None:
    parts = AnswerParts(tmp_path / "answers.jsonl")
    with parts.claimed(SETTINGS):
        kept(parts, 0, 1)
    with parts.claimed({**SETTINGS, ABOUT: "otherwise"}):
        assert len(parts.answers()) == 1
    differing = [
        ({"teacher": "C", "data": "D"}, "another teacher, other data;"),
        ({"temperature": 0.0}, r"temperature 0\.5 instead of 0\.0;"),
        ({"max_samples": 5, "data": "D"}, "max_samples none instead of 5;"),
    ]
    for changed, said in differing:
        with pytest.raises(UserError, match=f"begun with {said} .*or remove it, or name another"):  # noqa: SIM117
            with parts.claimed({**SETTINGS, **changed}):
                pass
    (parts.directory / "settings.yaml").write_text("{")
    with pytest.raises(UserError, match=r"settings\.yaml: is not the settings"), parts.claimed(SETTINGS):
        pass


def test_two_commands_do_not_write_the_same_file(tmp_path: Path) -> None:
    with AnswerParts(tmp_path / "answers.jsonl").claimed(SETTINGS):  # noqa: SIM117
        with pytest.raises(UserError, match="another command is writing"):
            with AnswerParts(tmp_path / "answers.jsonl").claimed(SETTINGS):
                pass


def test_the_file_appears_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    parts = AnswerParts(tmp_path / "answers.jsonl")
    with parts.claimed(SETTINGS):
        kept(parts, 0, 1)
        parts.output.write_text("somebody else's")
        with pytest.raises(UserError, match="has come to be there meanwhile"):
            parts.finish([{"a": "ü"}])
        parts.output.unlink()
        assert len(parts.answers()) == 1
        assert parts.finish([{"a": "ü"}, {"b": 1}]) == 2
    assert parts.output.read_text() == '{"a": "ü"}\n{"b": 1}\n'
    assert list(tmp_path.iterdir()) == [parts.output]


# What is refused


def test_wrong_input_ends_in_a_sentence_and_leaves_nothing(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    data = tiny_data.write_lines(tmp_path / "rows.jsonl", [small_run.conversation(i) for i in range(4)])
    text = tiny_data.write_lines(tmp_path / "text.jsonl", [{"text": "one two"}])
    long = tiny_data.write_lines(tmp_path / "long.jsonl", [{"messages": turns("u:" + "one " * 70, "a:x")}])
    bare = tmp_path / "bare"
    small_run.write_tokenizer(bare)
    (bare / "chat_template.jinja").unlink()
    picky = tmp_path / "picky"
    small_run.write_tokenizer(picky)
    (picky / "chat_template.jinja").write_text("{{ raise_exception('users are not welcome') }}")
    for directory, name in itertools.product((bare, picky), ("config.json", "model.safetensors")):
        (directory / name).write_bytes((teacher / name).read_bytes())
    resident = {"kind": "resident", "path": str(teacher)}
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(teacher)},
        "data": {"train": [{"path": str(data)}], "num_workers": 1},
        "objective": {"kind": "distillation", "teacher": resident},
        "cluster": {"processes": 1},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    several = json.dumps({"kind": "several", "teachers": [resident, resident]})
    before = sorted(tmp_path.iterdir())
    cases = [
        (["objective=causal_lm"], "this recipe names no teacher that could answer; say `objective: {kind:"),
        ([f"objective.teacher={several}"], "a teacher of the kind several cannot be asked for answers; name one"),
        (["objective.teacher.path=/nowhere/at/all"], "there is no directory /nowhere/at/all; correct the path."),
        ([f"objective.teacher.path={bare}"], "has no chat template, so it answers no conversations; name a model"),
        ([f"objective.teacher.path={picky}"], "rows.jsonl, row 1: the chat template of"),
        ([f"objective.teacher.path={picky}"], "refuses the roles user: users are not welcome; change the row, or name"),
        ([f"data.train.0.path={text}"], "text.jsonl is plain text, which asks nothing that could be answered"),
        ([f"data.train.0.path={tmp_path}/no.jsonl"], "there is no file or directory"),
        ([f"data.train.0.path={long}"], "no prompt leaves room for an answer in the 64 positions"),
        (["-o", str(data)], f"{data} is there already, and is never written over; remove it, or name another file."),
        (["-o", str(tmp_path / "answers.csv")], "let its name end in .jsonl"),
        (["-o", str(data / "deeper" / "answers.jsonl")], "nothing can be written there (Not a directory); name"),
        (["-o", "/proc/answers.jsonl"], "/proc/answers.jsonl: nothing can be written there (No such file or"),
        (["--top-p", "0.5"], "--top-p narrows a random draw, and there is none without --temperature above 0."),
        (["--max-samples", "0"], "0 is not in the range x>=1"),
    ]  # fmt: skip
    for arguments, said in cases:
        output = [] if "-o" in arguments else ["-o", str(tmp_path / "new" / "answers.jsonl")]
        assert exit_status(["teacher", "generate", str(file), *arguments, *output]) == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
    assert sorted(path for path in tmp_path.iterdir() if path.name != "cache") == before
