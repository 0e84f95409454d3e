"""generate, chat and evaluate, on a tiny random model with a byte-level tokenizer."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from understudy.cli.main import exit_status
from understudy.launch.run_lock import MARKER
from understudy.training.answering import Answered, Sampling, answer_all, answer_stream
from understudy.training.inference import Conversation, LoadedModel, load_model
from understudy.training.scoring import rouge_l

pytestmark = pytest.mark.unit

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|eos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
POSITIONS = 256


def write_tokenizer(directory: Path, template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, so that any text is known and characters beyond ASCII span several tokens."""
    vocabulary = {
        token: number for number, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|eos|>", additional_special_tokens=SPECIAL[1:], chat_template=template
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = write_tokenizer(directory, TEMPLATE)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return load_model(str(model))


def likeliest(directory: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by whole forward passes in fp64, without a cache."""
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(network(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def encode(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer.encode(text))


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that is refused."""
    assert exit_status(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# Answers


def test_a_greedy_answer_is_the_likeliest_token_each_time(model: Path, loaded: LoadedModel) -> None:
    prompt = encode(loaded, "Once upon")
    answered = loaded.answer(prompt, Sampling(12), lambda text: None)
    expected = likeliest(model, prompt, 12)
    assert not loaded.ends & set(expected)
    assert list(answered.tokens) == expected
    assert answered.finish == "length"


def test_an_answer_stops_at_an_end_token_and_does_not_show_it(model: Path, loaded: LoadedModel) -> None:
    prompt = encode(loaded, "Once upon")
    expected = likeliest(model, prompt, 12)
    end = expected[4]
    answered = answer_stream(
        loaded.network, loaded.tokenizer, prompt, Sampling(12), frozenset({end}), lambda text: None
    )
    assert list(answered.tokens) == expected[: expected.index(end) + 1]
    assert answered.finish == "stop"


def test_ends_are_those_of_tokenizer_template_and_generation_config(model: Path, tmp_path: Path) -> None:
    assert load_model(str(model)).ends == {0, SPECIAL.index("<|end|>")}
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 77]}))
    assert load_model(str(other)).ends == {0, SPECIAL.index("<|end|>"), 77}


def test_streamed_pieces_join_to_the_answer_and_never_split_a_character(loaded: LoadedModel) -> None:
    said = "naïve 東京\n  indented 🎭 end"
    pieces: list[str] = []
    answered = answer_stream(
        _Parrot(encode(loaded, said)), loaded.tokenizer, [5], Sampling(99), loaded.ends, pieces.append
    )
    assert answered.text == said
    assert "".join(pieces) == said
    assert len(pieces) == len(said)


def test_an_interrupt_ends_the_answer_and_keeps_what_came(loaded: LoadedModel) -> None:
    shown: list[str] = []

    def interrupt_at_the_third(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    parrot = _Parrot(encode(loaded, "abcdef"))
    answered = answer_stream(parrot, loaded.tokenizer, [5], Sampling(99), loaded.ends, interrupt_at_the_third)
    assert (answered.text, answered.finish) == ("abc", "interrupted")


def test_answers_in_padded_batches_are_those_given_one_at_a_time(model: Path, loaded: LoadedModel) -> None:
    prompts = [
        encode(loaded, text) for text in ("a", "something longer", "mid one", "another text that is longer still")
    ]
    room = [6, 9, 3, 7]
    batched = dict(
        answer_all(loaded.network, loaded.tokenizer, prompts, room, ends=loaded.ends, batch_tokens=POSITIONS)
    )
    for i, prompt in enumerate(prompts):
        alone = loaded.answer(prompt, Sampling(room[i]), lambda text: None)
        assert batched[i] == list(alone.tokens)


def test_a_seed_repeats_a_random_answer(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        arguments = ["generate", str(model), "--prompt", "x", "--temperature", "1", "--max-new-tokens", "20"]
        assert exit_status([*arguments, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


# generate


def test_generate_prints_the_answer_to_a_chat_prompt(
    model: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(model), "--system", "Be kind.", "--prompt", "Hi", "--max-new-tokens", "8"]
    assert exit_status(arguments) == 0
    prompt = encode(loaded, "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>")
    expected = loaded.tokenizer.decode(likeliest(model, prompt, 8), skip_special_tokens=True)
    assert capsys.readouterr() == (expected + "\n", "")


def test_generate_raw_completes_the_text_and_json_says_how(
    model: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Once upön".encode())))
    assert exit_status(["generate", str(model), "--raw", "--prompt", "-", "--max-new-tokens", "8", "--json"]) == 0
    prompt = encode(loaded, "Once upön")
    assert json.loads(capsys.readouterr().out) == {
        "model": str(model),
        "prompt": "Once upön",
        "text": loaded.tokenizer.decode(likeliest(model, prompt, 8), skip_special_tokens=True),
        "prompt_tokens": 10,
        "new_tokens": 8,
        "finish": "length",
    }


def test_a_run_directory_stands_for_its_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MARKER).write_text("{}")
    arguments = ["generate", str(tmp_path / "run"), "--prompt", "Hi", "--max-new-tokens", "4"]
    assert "without a final model" in refusal(arguments, capsys)
    shutil.copytree(model, tmp_path / "run" / "model")
    assert exit_status(arguments) == 0


def test_an_answer_ends_where_the_models_positions_do(loaded: LoadedModel) -> None:
    answered = loaded.answer([9] * (POSITIONS - 3), Sampling(50), lambda text: None)
    assert len(answered.tokens) <= 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "x" * 300], "leaves no room for an answer"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--prompt", "x", "--raw", "--system", "y"], "no place for --system"),
        (["--prompt", "x", "--max-new-tokens", "-1"], "--max-new-tokens"),
        (["--prompt", "x", "--max-new-tokens", "9" * 30], "--max-new-tokens"),
        (["--prompt", "x\udcff"], "--prompt holds bytes that are not UTF-8"),
        (["--prompt", "x", "--temperature", "-0.5"], "--temperature"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature must be a finite number"),
        (["--prompt", "x", "--temperature", "1", "--seed", "9" * 30], "--seed"),
        (["--prompt", "x", "--top-p", "0.5"], "--top-p narrows a random draw"),
        (["--prompt", "x", "--temperature", "1", "--top-p", "1.5"], "--top-p"),
        ([], "--prompt"),
    ],
)
def test_generate_refuses_in_a_sentence(
    model: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(["generate", str(model), *arguments], capsys)


def test_what_is_no_model_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(directory: Path) -> str:
        return refusal(["generate", str(directory), "--prompt", "x"], capsys)

    assert "there is no directory" in says(tmp_path / "absent")
    assert "no config.json" in says(tmp_path)
    for name, damage, words in (
        ("weightless", lambda d: (d / "model.safetensors").unlink(), "has no weights"),
        ("truncated", lambda d: (d / "model.safetensors").write_bytes(b"\x01\x02"), "cannot be loaded"),
        ("unreadable", lambda d: (d / "config.json").write_text("{"), "cannot be loaded"),
        ("speechless", lambda d: [(d / f).unlink() for f in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    ):
        shutil.copytree(model, tmp_path / name)
        damage(tmp_path / name)
        assert words in says(tmp_path / name)


# chat


def test_a_conversation_remembers_turns_until_it_is_reset(loaded: LoadedModel) -> None:
    recorder = _Recorder(loaded)
    conversation = Conversation(recorder, Sampling(3), system="S")
    first = conversation.ask("one", lambda text: None)
    conversation.ask("two", lambda text: None)
    conversation.reset()
    conversation.ask("three", lambda text: None)
    opening = "<|system|>S<|end|>"
    assert [loaded.tokenizer.decode(tokens) for tokens in recorder.prompts] == [
        f"{opening}<|user|>one<|end|><|assistant|>",
        f"{opening}<|user|>one<|end|><|assistant|>{first.text}<|end|><|user|>two<|end|><|assistant|>",
        f"{opening}<|user|>three<|end|><|assistant|>",
    ]


def test_chat_on_a_pipe_answers_each_line_until_exit(
    model: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\n/reset\nHi\n/exit\nnever\n"))
    assert exit_status(["chat", str(model), "--max-new-tokens", "5"]) == 0
    answer = loaded.answer(loaded.prompt_of([{"role": "user", "content": "Hi"}]), Sampling(5), lambda text: None).text
    assert capsys.readouterr() == (f"{answer}\n{answer}\n", "")


def test_chat_ends_with_its_input(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert exit_status(["chat", str(model)]) == 0


def test_chat_refuses_a_model_without_a_template(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").unlink()
    assert "no chat template" in refusal(["chat", str(bare)], capsys)
    assert "no chat template" in refusal(["generate", str(bare), "--prompt", "x", "--system", "y"], capsys)
    assert exit_status(["generate", str(bare), "--prompt", "x", "--max-new-tokens", "2"]) == 0


def test_a_template_that_refuses_a_role_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = tmp_path / "strict"
    shutil.copytree(model, strict)
    (strict / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
    )
    assert "no system here" in refusal(["chat", str(strict), "--system", "y"], capsys)


# evaluate


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe for another model, with six held-out questions; a cache of its own and no traces in the environment."""
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that undoing it removes what the command sets
        monkeypatch.delenv(name)
    rows = [{"instruction": f"What is {n}?", "output": f"It is {'n' * n}, I think."} for n in range(1, 7)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        "model: {path: some/other-model}\n"
        "data:\n"
        f"  train: [{{path: {tmp_path}/absent.jsonl}}]\n"
        f"  eval: [{{path: {tmp_path}/eval.jsonl, format: alpaca}}]\n"
        "  max_length: 64\n"
        "training: {micro_batch_tokens: 100, precision: fp32}\n"
    )
    return tmp_path / "recipe.yaml"


def evaluation(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    assert exit_status(["evaluate", *arguments, "--json"]) == 0
    values: dict[str, float] = json.loads(capsys.readouterr().out)
    return values


def test_the_loss_is_that_of_transformers_over_each_example_alone(
    model: Path, loaded: LoadedModel, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = evaluation([str(model), str(recipe)], capsys)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    loss, count, correct = 0.0, 0, 0
    for line in (recipe.parent / "eval.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = encode(loaded, f"<|user|>{row['instruction']}<|end|><|assistant|>")
        tokens = torch.tensor([prompt + encode(loaded, row["output"] + "<|end|>")])
        with torch.no_grad():
            predicted = network(tokens).logits[0, len(prompt) - 1 : -1]
        answer = tokens[0, len(prompt) :]
        loss += float(torch.nn.functional.cross_entropy(predicted, answer, reduction="sum"))
        correct += int((predicted.argmax(-1) == answer).sum())
        count += len(answer)
    assert (scores["examples"], scores["supervised_tokens"]) == (6, count)
    assert scores["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert scores["token_accuracy"] == pytest.approx(correct / count, rel=1e-6)


def test_answers_are_compared_with_the_references(
    model: Path, loaded: LoadedModel, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """References are made from the model's own answers: the first two as they are, the third with a word more."""
    rows = []
    for n in range(3):
        prompt = loaded.prompt_of([{"role": "user", "content": f"{n}"}])
        said = loaded.answer(prompt, Sampling(8), lambda text: None)
        assert said.finish == "length"
        rows.append({"instruction": f"{n}", "output": said.text})
    rows[2]["output"] += " more"
    (recipe.parent / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = evaluation([str(model), str(recipe), "--samples", "9", "--max-new-tokens", "8"], capsys)
    assert scores["samples"] == 3
    assert scores["exact_match"] == pytest.approx(2 / 3)
    third = rouge_l(rows[2]["output"].removesuffix(" more"), rows[2]["output"])
    assert scores["rouge_l"] == pytest.approx((2 + third) / 3)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_words() -> None:
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(3 / 4)  # Lin, 2004, section 3
    assert rouge_l("the gunman kill police", "police kill the gunman") == pytest.approx(2 / 4)
    assert rouge_l("A, b!", "a b c d") == pytest.approx(2 * 2 / (2 + 4))
    assert rouge_l("", "") == 1.0
    assert rouge_l("", "a") == rouge_l("a", "b") == 0.0


def test_evaluate_prints_a_table(model: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["evaluate", str(model), str(recipe), "--samples", "1", "--max-new-tokens", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["examples", "supervised tokens", "loss", "perplexity", "token accuracy", "calibration error"]
    assert [line[:18].strip() for line in lines] == [*names, "answers", "exact match", "ROUGE-L F1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.eval=null"], "has no evaluation data"),
        (["--samples", "-1"], "--samples"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["data.evil=1"], "did you mean `eval`"),
    ],
)
def test_evaluate_refuses_in_a_sentence(
    model: Path, recipe: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(["evaluate", str(model), str(recipe), *arguments], capsys)
    assert not (recipe.parent / "cache").exists()


class _Parrot:
    """A network whose `generate` says fixed tokens."""

    device = torch.device("cpu")

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def generate(self, inputs: torch.Tensor, *, streamer: object, **_: object) -> None:
        streamer.put(inputs)  # type: ignore[attr-defined]
        for token in self._tokens:
            streamer.put(torch.tensor([token]))  # type: ignore[attr-defined]
        streamer.end()  # type: ignore[attr-defined]


class _Recorder(LoadedModel):
    """A loaded model that keeps the prompts it was given."""

    prompts: list[list[int]]

    def __init__(self, model: LoadedModel) -> None:
        super().__init__(model.name, model.network, model.tokenizer, model.ends)
        object.__setattr__(self, "prompts", [])

    def answer(self, tokens, sampling, on_text) -> Answered:  # type: ignore[no-untyped-def]
        self.prompts.append(list(tokens))
        return super().answer(tokens, sampling, on_text)
