"""A teacher's server is asked once before the run: what would go wrong later is a located sentence now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.teacher_server import TeacherServer, changing, failing
from tests.tiny_data import write_lines, write_tokenizer
from understudy.cli.main import exit_status
from understudy.models.initialization import materialize_random
from understudy.objectives.teachers import server_client
from understudy.recipe.schema import Model
from understudy.training import start
from understudy.training.job import TeacherPlace, read_job

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
objective:
  kind: distillation
  teacher:
    kind: server
    path: model
    model: teacher
    endpoints: [ADDRESS]
    timeout: 5.0
    retries: 1
training:
  max_steps: 2
  global_batch_size: 4
cluster: {processes: 1}
"""
SIZES = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = materialize_random(Model(init="random", config=SIZES), 0, tmp_path_factory.mktemp("models"))
    return write_tokenizer(directory)


@pytest.fixture(scope="module")
def network(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)


@pytest.fixture
def server(network: Any) -> Iterator[TeacherServer]:
    with TeacherServer(network) as server:
        yield server


@pytest.fixture(autouse=True)
def place(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a model and data; training itself is left out, and counts as success."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(start, "launch_local", lambda *arguments, **options: None)
    monkeypatch.setattr(server_client, "FIRST_WAIT_SECONDS", 0.01)
    Path("model").symlink_to(model)
    write_lines(Path("rows.jsonl"), [{"instruction": f"number {i}", "output": "fine" * i} for i in range(8)])


def train(recipe: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    Path("r.yaml").write_text(recipe)
    status = exit_status(["train", "r.yaml"])
    return (status, *capsys.readouterr())


def test_a_server_that_answers_is_found(server: TeacherServer, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = train(RECIPE.replace("ADDRESS", server.address), capsys)
    assert (status, errors) == (0, "")
    (longest,) = server.prompts
    assert len(longest) > 20, "it was asked about the example that asks most of it"
    (found,) = read_job(Path("out/run/job.json")).teachers
    assert found == TeacherPlace(None, None, found.shared_classes, endpoints=(server.address,), classes=300)
    assert found.shared_classes == 300


def test_an_endpoint_that_is_gone_is_left_out_with_a_line(
    server: TeacherServer, network: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with TeacherServer(network) as gone:
        pass
    status, said, errors = train(RECIPE.replace("ADDRESS", f"{gone.address}, {server.address}"), capsys)
    assert (status, errors) == (0, "")
    assert f"going on without an endpoint of the teacher: {gone.address} cannot be reached (" in said
    (found,) = read_job(Path("out/run/job.json")).teachers
    assert found.endpoints == (server.address,)


@pytest.mark.parametrize(
    ("changed", "options", "line", "said"),
    [
        (("/v1", "/v1"), {"gone": True}, 15, "cannot be reached ([Errno 111] Connection refused) (2 attempts). Start"),
        (("http:", "https:"), {}, 15, "does not speak TLS; say http:// in place of https:// (2 attempts). Start its"),
        (("/v1", ""), {}, 11, "refuses with status 404 (Not Found); correct the address, which usually ends in /v1."),
        (("model: teacher", "model: other"), {}, 11, "(The model `other` does not exist.); say in `model` under what"),
        (("retries: 1", "k: 30"), {}, 11, "greater than max allowed: 20); ask for a smaller `k`, or start it with"),
        (("retries: 1", "retries: 0"), {"fault": failing(500)}, 15, "answered with status 500 (busy) (1 attempt)."),
        (
            ("retries: 1", "retries: 0"),
            {"fault": changing(lambda choice: choice.pop("prompt_logprobs"))},
            15,
            "gave no log-probabilities of the prompt (prompt_logprobs), as vLLM's server does (1 attempt).",
        ),
        (("retries: 1", "retries: 0"), {"key": "a-key"}, 11, "set the environment variable UNDERSTUDY_TEACHER_API_KEY"),
        (("[ADDRESS]", "[127.0.0.1:8000/v1]"), {}, 15, "is '127.0.0.1:8000/v1', which does not begin with http://"),
    ],
    ids=["gone", "https", "no /v1", "model", "k", "500", "no log-probabilities", "key", "no address"],
)
def test_what_would_fail_later_is_refused_now(
    network: Any,
    capsys: pytest.CaptureFixture[str],
    changed: tuple[str, str],
    options: dict[str, Any],
    line: int,
    said: str,
) -> None:
    fault = options.get("fault")
    with TeacherServer(network, key=options.get("key"), fault=lambda number: fault) as server:
        if options.get("gone"):
            server.close()
        address = server.address.replace(*changed)
        status, _, errors = train(RECIPE.replace(*changed).replace("ADDRESS", address), capsys)
    assert status == 2
    assert errors.startswith(f"error: r.yaml:{line}: ")
    assert errors.count("\n") == 1
    assert said in errors
    assert not Path("out").exists()


def test_a_trained_model_is_held_to_its_teacher(server: TeacherServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Here to itself."""
    recipe = RECIPE.replace("ADDRESS", server.address) + "evaluation: {samples: 0}\n"
    Path("r.yaml").write_text(recipe.replace("  max_length: 64\n", "  eval: [{path: rows.jsonl}]\n  max_length: 64\n"))
    assert exit_status(["evaluate", "model", "r.yaml", "--json", "training.precision=fp32"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["divergence"] == pytest.approx(0.0, abs=1e-6)
    assert scores["teacher_agreement"] == 1.0
    assert len(server.prompts) == 1 + 8


def test_the_key_is_the_environments_and_written_nowhere(
    network: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_TEACHER_API_KEY", "a-secret\n")
    with TeacherServer(network, key="a-secret") as server:
        status, said, errors = train(RECIPE.replace("ADDRESS", server.address), capsys)
    assert (status, errors) == (0, "")
    assert "a-secret" not in said
    assert not any(b"a-secret" in file.read_bytes() for file in Path("out").rglob("*") if file.is_file())
    monkeypatch.setenv("UNDERSTUDY_TEACHER_API_KEY", "a secrét\nand more")
    status, _, errors = train(RECIPE.replace("ADDRESS", server.address).replace("out/run", "out/other"), capsys)
    assert (status, errors.count("\n")) == (2, 1)
    assert "UNDERSTUDY_TEACHER_API_KEY has characters that no key has" in errors


def test_a_teacher_with_another_tokenizer_is_refused_before_its_server_is_asked(
    server: TeacherServer, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(Path("other"))
    file = Path("other/tokenizer.json")
    file.write_text(file.read_text().replace("<|header|>", "<|title|>"))
    recipe = RECIPE.replace("ADDRESS", server.address).replace("    path: model\n", "    path: other\n")
    status, _, errors = train(recipe, capsys)
    assert status == 2
    assert errors.startswith("error: r.yaml:11: the teacher other has another tokenizer than the student: token ")
    assert server.prompts == []


def test_one_of_several_teachers_is_named_by_its_line(
    server: TeacherServer, capsys: pytest.CaptureFixture[str]
) -> None:
    section = f"{{kind: server, path: model, model: other, endpoints: ['{server.address}']}}"
    head, _, tail = RECIPE.partition("  teacher:\n")
    several = (
        f"  teacher:\n    kind: several\n    teachers:\n      - {{kind: resident, path: model}}\n      - {section}\n"
    )
    status, _, errors = train(head + several + tail[tail.index("training:") :], capsys)
    assert status == 2
    assert errors.startswith("error: r.yaml:15: the teacher cannot be asked: ")
