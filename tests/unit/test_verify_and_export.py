"""verify and export, and which model a directory stands for."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.small_run import write_tokenizer
from tests.small_checkpoints import make_config, make_weights, write_checkpoint
from understudy.checkpoint import made_whole, plain_model
from understudy.checkpoint.places import examine, find_model
from understudy.checkpoint.plain_model import export_model
from understudy.checkpoint.store import CheckpointStore
from understudy.cli.main import exit_status
from understudy.errors import UnderstudyError, UserError
from understudy.launch.run_lock import MARKER as RUN_MARKER

pytestmark = pytest.mark.unit

FINAL = 99
"""The weights of the final model, as of a step that has no checkpoint."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints and a final model in bf16."""
    run = tmp_path_factory.mktemp("runs") / "run"
    store = CheckpointStore(run / "checkpoints")
    for step in (10, 20):
        write_checkpoint(store, step)
    (run / RUN_MARKER).write_text("{}")
    model = AutoModelForCausalLM.from_config(make_config()).bfloat16()
    model.load_state_dict(make_weights(FINAL))
    model.save_pretrained(run / "model")
    write_tokenizer(run / "model")
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def unfinished(run: Path) -> Path:
    """The same run before its end."""
    shutil.rmtree(run / "model")
    return run


def weights_in(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Names, dtypes and bits."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype
        and torch.equal(tensor.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8))
        for name, tensor in first.items()
    )


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that is refused."""
    assert exit_status(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# Which model a directory stands for


def test_every_way_to_name_a_model_leads_to_its_directory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(path: Path) -> Path:
        return find_model(path, lambda line: None).directory

    step = run / "checkpoints" / "step-00000010"
    assert found(run) == found(run / "model") == run / "model"
    assert found(run / "checkpoints") == run / "checkpoints" / "step-00000020" / "model"
    assert found(step) == found(step / "model") == step / "model"
    monkeypatch.chdir(step / "model")
    assert found(Path()).resolve() == step / "model"
    monkeypatch.chdir(step)
    assert found(Path("model")).resolve() == found(Path()).resolve() == step / "model"


def test_the_checkpoint_around_a_model_is_known(run: Path, tmp_path: Path) -> None:
    step = run / "checkpoints" / "step-00000010"
    assert find_model(step / "model", lambda line: None).checkpoint == step
    assert find_model(run / "model", lambda line: None).checkpoint is None
    renamed = tmp_path / "good"
    shutil.copytree(step, renamed)
    assert find_model(renamed, lambda line: None) == find_model(renamed / "model", lambda line: None)
    assert examine(renamed).checkpoints == (renamed,)


def test_a_run_without_a_final_model_stands_for_its_newest_checkpoint_and_says_so(unfinished: Path) -> None:
    said: list[str] = []
    newest = unfinished / "checkpoints" / "step-00000020"
    assert find_model(unfinished, said.append).checkpoint == newest
    assert said == [f"the newest checkpoint of {unfinished} is taken: step-00000020"]
    said.clear()
    find_model(newest, said.append)
    find_model(newest / "model", said.append)
    assert said == []


def test_a_run_that_lost_its_marker_is_a_run(run: Path) -> None:
    (run / RUN_MARKER).unlink()
    assert examine(run).model == run / "model"
    assert len(examine(run).checkpoints) == 2
    shutil.rmtree(run / "model")
    assert len(examine(run).checkpoints) == 2


def test_a_damaged_checkpoint_is_known_by_its_name_and_a_plain_model_by_its_config(run: Path, tmp_path: Path) -> None:
    step = run / "checkpoints" / "step-00000010"
    for name in ("manifest.json", "COMMITTED"):
        (step / name).unlink()
    assert examine(step).checkpoints == examine(step / "model").checkpoints == (step,)
    foreign = tmp_path / "step-00000500"
    shutil.copytree(run / "model", foreign)
    assert examine(foreign).model == foreign


def test_what_holds_no_model_is_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    def says(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            examine(path)
        return str(caught.value)

    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    assert "there is no directory" in says(tmp_path / "absent")
    assert "is a file; name its directory" in says(run / "model" / "config.json")
    assert "neither a model (no config.json in it) nor a run" in says(empty)
    assert "neither a model" in says(run / "checkpoints" / "step-00000010" / "optimizer")
    assert "holds no committed checkpoint yet" in says(empty / "checkpoints")
    (empty / RUN_MARKER).write_text("{}")
    assert "a run without a final model (no model/ in it) and without a committed checkpoint" in says(empty)


def test_generate_takes_a_run_that_did_not_finish_and_its_checkpoints(
    unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = unfinished / "checkpoints"
    answers = {}
    for path in (unfinished, store, store / "step-00000020", store / "step-00000020" / "model"):
        assert exit_status(["generate", str(path), "--prompt", "three", "--max-new-tokens", "4"]) == 0
        answers[path] = capsys.readouterr()
    assert len({answer.out for answer in answers.values()}) == 1
    assert [bool(answer.err) for answer in answers.values()] == [True, True, False, False]
    assert "step-00000020" in answers[unfinished].err


# verify


def test_verify_checks_each_checkpoint_of_a_run_and_its_final_model(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(["verify", str(run)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        str(run / "checkpoints" / "step-00000010"),
        str(run / "checkpoints" / "step-00000020"),
        str(run / "model"),
    ]
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "step-00000020").rglob("*") if path.is_file())
    assert f"step 20, every byte as it was written, loads, {size:,} bytes in " in lines[1]
    assert "step" not in lines[2].removeprefix(str(run))


def test_verify_json_is_one_object(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["verify", str(run / "checkpoints"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["whole"] is True
    assert [row["step"] for row in result["verified"]] == [10, 20]
    assert all(row["bytes"] > 0 and row["seconds"] > 0 and row["problem"] is None for row in result["verified"])


def test_verify_names_every_damaged_file_and_checks_the_rest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = run / "checkpoints" / "step-00000010" / "optimizer" / "optimizer-00002-of-00002.safetensors"
    flip_a_bit(damaged)
    (run / "model" / "model.safetensors").write_bytes(b"short")
    assert exit_status(["verify", str(run)]) == 2
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert errors[0] == f"error: {damaged}: is not what was written: its SHA-256 differs."
    assert errors[1].startswith(f"error: {run / 'model'}: does not load with transformers")
    assert len(errors) == 2
    assert [line.split(": ")[0] for line in captured.out.splitlines()] == [str(run / "checkpoints" / "step-00000020")]
    assert exit_status(["verify", str(run), "--json"]) == 2
    result = json.loads(capsys.readouterr().out)
    assert result["whole"] is False
    assert [row["problem"] is None for row in result["verified"]] == [False, True, False]


def test_verify_takes_the_model_of_a_checkpoint_for_the_whole_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = run / "checkpoints" / "step-00000010"
    flip_a_bit(step / "state.json")
    for path in (step, step / "model"):
        assert f"error: {step / 'state.json'}" in refusal(["verify", str(path)], capsys)


def change_weights(directory: Path, changed: dict[str, Tensor | None]) -> None:
    file = directory / "model.safetensors"
    kept = {name: tensor for name, tensor in {**load_file(file), **changed}.items() if tensor is not None}
    save_file(kept, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model.norm.weight": None}, "missing_keys: ['model.norm.weight']"),
        ({"model.odd.weight": torch.ones(2)}, "unexpected_keys: ['model.odd.weight']"),
        ({"model.norm.weight": torch.ones(3)}, "does not load with transformers"),
    ],
)
def test_verify_refuses_a_model_that_does_not_load_as_a_whole(
    run: Path, changed: dict[str, Tensor | None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change_weights(run / "model", changed)
    assert words in refusal(["verify", str(run / "model")], capsys)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "has no tokenizer"), ("{", "has a tokenizer that does not load")]
)
def test_verify_refuses_a_model_without_a_tokenizer_that_loads(
    run: Path, content: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (run / "model" / file).unlink()
    if content is not None:
        (run / "model" / "tokenizer.json").write_text(content)
    assert words in refusal(["verify", str(run / "model")], capsys)


def test_verify_refuses_what_is_nothing_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a model" in refusal(["verify", str(tmp_path)], capsys)
    assert "there is no directory" in refusal(["verify", str(tmp_path / "absent")], capsys)


def test_a_checkpoint_that_a_job_removes_meanwhile_is_no_damage(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from understudy.checkpoint import verification

    verify = verification.verify_checkpoint

    def verify_after_removal(path: Path) -> Any:
        if path.name == "step-00000010":
            shutil.rmtree(path)
        return verify(path)

    monkeypatch.setattr(verification, "verify_checkpoint", verify_after_removal)
    assert exit_status(["verify", str(run / "checkpoints")]) == 0
    captured = capsys.readouterr()
    assert "step-00000010 was removed while it was verified" in captured.err
    assert "step-00000020" in captured.out


# export


def test_an_exported_checkpoint_has_its_weights_bit_for_bit_and_loads(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step, out = run / "checkpoints" / "step-00000010", tmp_path / "new" / "out"
    assert exit_status(["export", str(step), str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(f"{out}: {len(make_weights(10))} tensors of step 10 in float32, ")
    assert same(weights_in(out), make_weights(10))
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for file in out.iterdir():
        if file.name != "model.safetensors":
            assert file.read_bytes() == (step / "model" / file.name).read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert same(dict(model.state_dict()), make_weights(10))
    assert AutoTokenizer.from_pretrained(out)("three").input_ids


@pytest.mark.parametrize(
    ("part", "step"), [("", FINAL), ("model", FINAL), ("checkpoints", 20), ("checkpoints/step-00000010/model", 10)]
)
def test_each_source_gives_the_model_that_it_stands_for(run: Path, tmp_path: Path, part: str, step: int) -> None:
    assert exit_status(["export", str(run / part), str(tmp_path / "out")]) == 0
    expected = make_weights(step)
    if step == FINAL:
        expected = {name: tensor.bfloat16() for name, tensor in expected.items()}
    assert same(weights_in(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_weights_are_cast_and_the_configuration_says_so(
    run: Path, tmp_path: Path, name: str, dtype: torch.dtype, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run / "model" / "config.json").read_text())
    config[key] = config.pop("dtype")
    (run / "model" / "config.json").write_text(json.dumps(config))
    stored = weights_in(run / "model")
    assert exit_status(["export", str(run), str(tmp_path / "out"), "--dtype", name, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["dtypes"], result["step"], result["model"]) == (
        [str(dtype).removeprefix("torch.")],
        None,
        str(run / "model"),
    )
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert same(weights_in(tmp_path / "out"), {name: tensor.to(dtype) for name, tensor in stored.items()})
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {key: str(dtype).removeprefix("torch.")}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def export(source: Path, out: Path, **options: Any) -> list[str]:
    said: list[str] = []
    export_model(source, out, **{"dtype": None, "trust_remote_code": False, "report": said.append, **options})
    return said


def test_large_models_are_stored_in_several_files_of_at_most_the_size_allowed(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(run / "checkpoints" / "step-00000010", out, shard_bytes=600)
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 600
    assert same(weights_in(out), make_weights(10))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(make_weights(10))
    assert same(dict(AutoModelForCausalLM.from_pretrained(out).state_dict()), make_weights(10))


def test_whole_numbers_are_not_cast_and_not_a_number_is_kept(run: Path, tmp_path: Path) -> None:
    change_weights(run / "model", {"model.norm.weight": torch.full((8,), float("nan"), dtype=torch.bfloat16)})
    export(run, tmp_path / "same")
    assert same(weights_in(tmp_path / "same"), weights_in(run / "model"))
    export(run, tmp_path / "cast", dtype=torch.float32)
    assert weights_in(tmp_path / "cast")["model.norm.weight"].isnan().all()


def test_pickles_and_other_weights_are_left_out_and_named(run: Path, tmp_path: Path) -> None:
    model = run / "model"
    for name in ("training_args.bin", "optimizer.pt", "model.gguf", "extra/state.pkl"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"x")
    (model / "LICENSE").write_text("free")
    (model / "extra" / "notes.txt").write_text("good")
    (model / ".cache").mkdir()
    (model / ".cache" / "x.json").touch()
    said = export(run, tmp_path / "out")
    assert said == [
        f"left out: {model / name}" for name in ("extra/state.pkl", "model.gguf", "optimizer.pt", "training_args.bin")
    ]
    copied = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"LICENSE", "extra/notes.txt"} < copied
    assert not {name for name in copied if name.endswith((".bin", ".pt", ".gguf", ".pkl", "x.json"))}


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = run / "checkpoints" / "step-00000010"
    flip_a_bit(step / "optimizer" / "optimizer-00001-of-00002.safetensors")
    for source in (step, step / "model"):
        assert "its SHA-256 differs" in refusal(["export", str(source), str(tmp_path / "new" / "out")], capsys)
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten_and_nothing_put_into_the_source(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(source: Path, out: Path) -> str:
        before = sorted(run.rglob("*"))
        said = refusal(["export", str(source), str(out)], capsys)
        assert sorted(run.rglob("*")) == before
        return said

    step = run / "checkpoints" / "step-00000010"
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "alias").symlink_to(run)
    assert "exists, and nothing is overwritten" in says(run, tmp_path / "there")
    assert "exists, and nothing is overwritten" in says(run, tmp_path / "link")
    assert "is inside" in says(run, run / "exported")
    assert "is inside" in says(run, tmp_path / "alias" / "exported")
    assert "is inside" in says(step / "model", step / "exported")
    assert "is among the checkpoints" in says(step, run / "checkpoints" / "step-00000015")
    assert "there is no directory" in says(tmp_path / "absent", tmp_path / "out")
    assert "'int8' is not one of" in refusal(["export", str(run), str(tmp_path / "out"), "--dtype", "int8"], capsys)


@pytest.mark.parametrize("parents", [(), ("new", "deeper")])
def test_a_failure_leaves_nothing_behind(
    run: Path, tmp_path: Path, parents: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    change_weights(run / "model", {"model.odd.weight": torch.ones(2)})
    before = sorted(tmp_path.rglob("*"))
    assert "unexpected_keys" in refusal(["export", str(run), str(tmp_path.joinpath(*parents, "out"))], capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_values_too_large_for_the_dtype_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_weights(run / "model", {"model.norm.weight": torch.full((8,), 7e4, dtype=torch.bfloat16)})
    said = refusal(["export", str(run), str(tmp_path / "out"), "--dtype", "fp16"], capsys)
    assert "model.norm.weight has values up to 7.01e+04, too large for float16" in said
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_keeps_its_dtype(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    assert "of a quantized model" in refusal(["export", str(run), str(tmp_path / "out"), "--dtype", "bf16"], capsys)


def test_a_disk_without_room_is_a_sentence_with_the_bytes_needed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(made_whole.shutil, "disk_usage", lambda path: usage(10, 3, 7))
    said = refusal(["export", str(run), str(tmp_path / "new" / "out")], capsys)
    size = sum(path.stat().st_size for path in (run / "model").iterdir())
    needed = int(said.partition("needs ")[2].partition(" ")[0].replace(",", ""))
    assert size <= needed < size + 2**21
    assert f"error: {tmp_path}: the disk has no room" in said
    assert "7 are free" in said
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_while_it_is_written_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plain_model.Shards, "write_index", fill)
    assert "the disk has no room" in refusal(["export", str(run), str(tmp_path / "new" / "out")], capsys)
    assert not (tmp_path / "new").exists()


def test_a_weight_that_reads_back_otherwise_is_noticed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_model, "sync_tree", lambda partial: flip_a_bit(partial / "model.safetensors"))
    with pytest.raises(UnderstudyError, match=r"was not stored in .* as it was given"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_created_is_a_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert "cannot be read or written" in refusal(["export", str(run), str(tmp_path / "file" / "out")], capsys)


MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_ships_with_a_model_runs_only_on_request_and_comes_along(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = run / "model", tmp_path / "out"
    (model / "modeling_own.py").write_text(MODELING)
    config = json.loads((model / "config.json").read_text()) | {
        "model_type": "own",
        "architectures": ["Own"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"},
    }
    (model / "config.json").write_text(json.dumps(config))
    assert "allow it with --trust-remote-code" in refusal(["verify", str(model)], capsys)
    assert "allow it with --trust-remote-code" in refusal(["export", str(model), str(out)], capsys)
    assert exit_status(["verify", str(model), "--trust-remote-code"]) == 0
    assert exit_status(["export", str(model), str(out), "--trust-remote-code"]) == 0
    assert (out / "modeling_own.py").read_text() == MODELING
