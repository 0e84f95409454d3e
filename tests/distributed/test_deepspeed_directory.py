"""Checkpoints that DeepSpeed's engine saved, at every stage, give back what its own helpers said when it saved them."""

from __future__ import annotations

import argparse
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.distributed.processes import run_processes
from understudy.checkpoint.deepspeed_directory import DeepSpeedCheckpoint, match_names, open_deepspeed_checkpoint
from understudy.errors import UserError

pytestmark = pytest.mark.distributed

STEPS = 3
MOMENTS = ("exp_avg", "exp_avg_sq")
FROZEN = ["model.embed_tokens", "model.layers.0"]
HOST = {"offload_optimizer": {"device": "cpu"}}


def case(stage: int, *, tied: bool = False, bf16: bool = False, **zero: Any) -> dict[str, Any]:
    return {
        "model": "tied" if tied else "untied",
        "zero": {"stage": stage, **zero},
        "bf16": bf16,
        "optimizer": "cpu_adam" if "offload_optimizer" in zero else "adamw",
        "moments": MOMENTS,
        "frozen": [],
    }


CASES = {
    "stage 1, fp32, tied": case(1, tied=True),
    "stage 1, bf16": case(1, bf16=True),
    "stage 1, round robin": case(1, round_robin_gradients=True),
    "stage 2, bf16, tied": case(2, tied=True, bf16=True),
    "stage 2, host optimizer, tied": case(2, tied=True, bf16=True, **HOST),
    "stage 2, round robin": case(2, bf16=True, round_robin_gradients=True),
    "stage 2, frozen": {**case(2, bf16=True), "frozen": FROZEN},
    "stage 3, fp32, tied, groups split": case(3, tied=True, sub_group_size=4000),
    "stage 3, bf16": case(3, bf16=True),
    "stage 3, host optimizer": case(3, bf16=True, **HOST),
    "stage 3, frozen": {**case(3, bf16=True), "frozen": FROZEN},
}
WITHOUT_MOMENTS = {"sgd": {**case(2), "optimizer": "sgd", "moments": ()}}


def converts(stage: int) -> bool:
    return stage < 3 or version("deepspeed") != "0.14.4"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with each case's checkpoint in a directory of its name."""
    # Patterns must not be made of these characters.
    directory = tmp_path_factory.mktemp("saved [by] an+engine (2)")
    for tied in (True, False):
        write_model(directory / "models" / ("tied" if tied else "untied"), tied=tied)
    cases = {
        name: {**case, "model": str(directory / "models" / case["model"])}
        for name, case in {**CASES, **WITHOUT_MOMENTS}.items()
        if converts(case["zero"]["stage"])
    }
    script = Path(__file__).parent / "deepspeed_directory_worker.py"
    run_processes(script, 2, directory, {"cases": cases})
    return directory


def write_model(directory: Path, *, tied: bool) -> None:
    """A random two-layer Llama. Odd sizes: neither a parameter nor a group divides by two ranks, so both are padded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=33,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def read_all(checkpoint: DeepSpeedCheckpoint) -> dict[str, Tensor]:
    tensors = {}
    for name in checkpoint.names():
        tensors[name] = checkpoint.weight(name)
        tensors.update({f"{name}.{key}": moment for key, moment in checkpoint.moments(name).items()})
    return tensors


def files(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path in directory.rglob("*") for stat in [path.stat()]}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_moments_are_those_of_the_engine_to_the_last_bit(
    saved: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if not converts(CASES[name]["zero"]["stage"]):
        pytest.skip("this release of DeepSpeed does not convert ZeRO stage 3")
    before = files(saved)
    checkpoint = open_deepspeed_checkpoint(saved / name, tmp_path)
    found = read_all(checkpoint)
    true = load_file(saved / name / "true.safetensors")
    true.update(
        {f"{name}.step": torch.tensor(float(STEPS)) for name in checkpoint.names() if f"{name}.exp_avg" in true}
    )
    assert found.keys() == true.keys()
    for key, tensor in true.items():
        assert found[key].dtype == torch.float32
        assert found[key].shape == tensor.shape, key
        assert torch.equal(found[key], tensor), key
    assert checkpoint.step == STEPS
    assert files(saved) == before, "the checkpoint is only read"
    assert capfd.readouterr() == ("", ""), "DeepSpeed's own output is kept away"


@pytest.mark.parametrize("tied", [True, False])
def test_names_match_those_of_the_model_that_was_trained(saved: Path, tmp_path: Path, tied: bool) -> None:
    name = "stage 2, bf16, tied" if tied else "stage 1, bf16"
    checkpoint = open_deepspeed_checkpoint(saved / name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(saved / "models" / ("tied" if tied else "untied"))
    ours = [name for name, _ in model.named_parameters()]
    assert ("lm_head.weight" in ours) is not tied
    assert match_names(ours, checkpoint.names(), {}, file=checkpoint.tag) == {name: name for name in ours}


def test_an_optimizer_without_adams_moments_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"global_step3: DeepSpeed .* optimizer must have Adam's moments") as refused:
        open_deepspeed_checkpoint(saved / "sgd", tmp_path)
    assert "exp_avg" in str(refused.value)


def copy_of(saved: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "copy"
    shutil.copytree(saved / "stage 1, bf16", directory)
    return directory / "global_step3"


def refusal(tag: Path, tmp_path: Path) -> str:
    (tmp_path / "scratch").mkdir()
    with pytest.raises(UserError) as refused:
        open_deepspeed_checkpoint(tag.parent, tmp_path / "scratch")
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_rank_whose_file_is_missing_is_noticed(saved: Path, tmp_path: Path) -> None:
    tag = copy_of(saved, tmp_path)
    (tag / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert f"{tag}: holds optimizer states of 1 ranks, and 2 wrote it" in refusal(tag, tmp_path)


def test_a_damaged_optimizer_file_is_a_sentence(saved: Path, tmp_path: Path) -> None:
    tag = copy_of(saved, tmp_path)
    file = tag / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:5000])
    assert f"{tag}: DeepSpeed {version('deepspeed')} could not convert it (" in refusal(tag, tmp_path)


def test_objects_among_the_model_states_are_refused_before_they_are_made(saved: Path, tmp_path: Path) -> None:
    tag = copy_of(saved, tmp_path)
    file = tag / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(file, weights_only=True), "args": argparse.Namespace(seed=1)}, file)
    assert f"{file}: holds more than tensors and plain values" in refusal(tag, tmp_path)


def test_tensor_parallel_checkpoints_are_refused(saved: Path, tmp_path: Path) -> None:
    tag = copy_of(saved, tmp_path)
    shutil.copy(tag / "mp_rank_00_model_states.pt", tag / "mp_rank_01_model_states.pt")
    assert f"{tag}: was saved with tensor or pipeline parallelism" in refusal(tag, tmp_path)


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = copy_of(saved, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    assert "has 1,000 bytes free, and converting" in refusal(tag, tmp_path)
    assert not any((tmp_path / "scratch").iterdir())
