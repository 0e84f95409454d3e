"""Finding a DeepSpeed checkpoint, and giving its names those of our model."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from understudy.checkpoint.deepspeed_directory import find_tag, match_names, open_deepspeed_checkpoint
from understudy.errors import UserError

pytestmark = pytest.mark.unit

OURS = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
TIED = OURS[:3]
ALIASES = {"model.embed_tokens.weight": ["lm_head.weight"]}


def write_tag(directory: Path, name: str) -> Path:
    tag = directory / name
    tag.mkdir(parents=True)
    (tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    return tag


def test_latest_names_the_directory_to_read(tmp_path: Path) -> None:
    write_tag(tmp_path, "global_step10")
    tag = write_tag(tmp_path, "global_step20")
    (tmp_path / "latest").write_text("global_step20\n")
    assert find_tag(tmp_path) == tag


def test_a_step_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    write_tag(tmp_path, "global_step20")
    tag = write_tag(tmp_path, "global_step10")
    (tmp_path / "latest").write_text("global_step20")
    assert find_tag(tag) == tag


@pytest.mark.parametrize("name", ["global_step30", "", "..", "/etc", "global_step10/inner"])
def test_latest_must_name_a_directory_beside_it(tmp_path: Path, name: str) -> None:
    write_tag(tmp_path / "run", "global_step10/inner")
    (tmp_path / "run" / "latest").write_text(name)
    with pytest.raises(UserError, match=r"latest: names .* which is no directory beside it"):
        find_tag(tmp_path / "run")


def test_other_directories_are_no_checkpoint(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="is no DeepSpeed checkpoint; name the directory") as refused:
            find_tag(directory)
        assert str(refused.value).startswith(f"{directory}: ")


def test_a_checkpoint_of_stage_0_is_refused(tmp_path: Path) -> None:
    (tmp_path / "global_step10").mkdir()
    (tmp_path / "global_step10" / "mp_rank_00_model_states.pt").touch()
    (tmp_path / "latest").write_text("global_step10")
    with pytest.raises(UserError, match=r"global_step10: holds no ZeRO optimizer states"):
        find_tag(tmp_path)


def test_a_checkpoint_without_model_states_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match=r"global_step10: holds no model states"):
        open_deepspeed_checkpoint(write_tag(tmp_path, "global_step10"), tmp_path)


def test_without_deepspeed_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(UserError, match=r"not installed; run `pip install 'understudy\[deepspeed\]'`"):
        open_deepspeed_checkpoint(write_tag(tmp_path, "global_step10"), tmp_path)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "module.module.", "_orig_mod.", "module._orig_mod.", "model.", "student.net."]
)
def test_names_match_whatever_wrapped_the_model(prefix: str) -> None:
    expected = {name: prefix + name for name in OURS}
    assert match_names(OURS, expected.values(), {}, file=Path("x")) == expected


def test_names_match_where_layers_were_wrapped() -> None:
    theirs = [name.replace("layers.0.", "layers.0._checkpoint_wrapped_module._orig_mod.") for name in OURS]
    assert match_names(OURS, theirs, {}, file=Path("x")) == dict(zip(OURS, theirs))


def test_names_match_where_the_base_model_was_trained() -> None:
    expected = {name: name.removeprefix("model.") for name in TIED}
    assert match_names(TIED, expected.values(), ALIASES, file=Path("x")) == expected


def test_a_tied_weight_is_found_under_its_other_name() -> None:
    theirs = ["module.lm_head.weight", *(f"module.{name}" for name in TIED[1:])]
    assert match_names(TIED, theirs, ALIASES, file=Path("x")) == dict(zip(TIED, theirs))


def test_what_is_missing_and_what_is_unknown_is_said_at_once() -> None:
    theirs = [f"module.{name}" for name in (*OURS[:2], "model.layers.1.mlp.up_proj.weight")]
    with pytest.raises(UserError) as refused:
        match_names(OURS, theirs, {}, file=Path("run"))
    assert str(refused.value) == (
        "run: does not fit the model: it holds no model.norm.weight, lm_head.weight, and module.model.layers.1.mlp."
        "up_proj.weight, which this model has not; name the model that it was trained from."
    )


def test_weights_that_were_trained_apart_are_not_tied() -> None:
    with pytest.raises(UserError, match=r"model.embed_tokens.weight and lm_head.weight apart, which this model ties"):
        match_names(TIED, OURS, ALIASES, file=Path("run"))
