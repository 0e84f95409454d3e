"""Where a run goes on from, and when it must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.small_checkpoints import write_checkpoint, write_companions
from understudy.checkpoint.store import CheckpointStore
from understudy.errors import RecipeError, UserError
from understudy.launch.run_claim import claim_run_directory
from understudy.launch.run_directory import RunDirectory
from understudy.recipe.schema import Recipe
from understudy.recipe.source_map import SourceMap
from understudy.training.checkpointing import most_checkpoints
from understudy.training.resume import Resumption, choose_checkpoint, determinants

SOURCES = SourceMap("r.yaml", {"optimizer": 4})


def recipe(resume: str = "auto", **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "r",
        "output_dir": "runs/r",
        "model": {"path": "m"},
        "data": {"train": [{"path": "a"}]},
        "checkpoint": {"resume": resume},
        "training": {"precision": "fp32"},
        **changes,
    }
    return Recipe.model_validate(values)


def saved(store: CheckpointStore, step: int, by: Recipe | None = None) -> Path:
    return write_checkpoint(store, step, recipe=determinants(by or recipe()), data_digest="data")


def chosen(
    store: CheckpointStore, by: Recipe, *, begun_from: str | None = "auto", going_on: bool = True, steps: int = 100
) -> tuple[Resumption | None, list[str]]:
    said: list[str] = []
    found = choose_checkpoint(
        by,
        SOURCES,
        store,
        data_digest="data",
        total_steps=steps,
        begun_from=begun_from,
        going_on=going_on,
        say=said.append,
    )
    return found, said


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def test_auto_takes_the_newest_of_its_own_run(store: CheckpointStore) -> None:
    saved(store, 10)
    newest = saved(store, 20)
    found, said = chosen(store, recipe())
    assert found is not None
    assert (found.checkpoint, found.progress.step, said) == (newest, 20, [])


def test_auto_begins_at_the_start_without_a_checkpoint_and_in_a_directory_that_is_replaced(
    store: CheckpointStore,
) -> None:
    assert chosen(store, recipe())[0] is None
    saved(store, 10)
    assert chosen(store, recipe(), going_on=False)[0] is None
    assert chosen(store, recipe("never"))[0] is None


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(store: CheckpointStore) -> None:
    good, bad = saved(store, 10), saved(store, 20)
    (bad / "state.json").write_text("{}")
    found, said = chosen(store, recipe())
    assert found is not None
    assert found.checkpoint == good
    assert len(said) == 1
    assert "step-00000020" in said[0]
    assert "state.json" in said[0]


def test_a_run_with_damaged_checkpoints_only_is_refused_not_begun_anew(store: CheckpointStore) -> None:
    (saved(store, 10) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint of .* can be used.*manifest\.json: is missing.*--overwrite"):
        chosen(store, recipe())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": {"learning_rate": 1e-3}}, "optimizer.learning_rate was 2e-05 and is 0.001"),
        ({"training": {"precision": "bf16"}}, 'training.precision was "fp32" and is "bf16"'),
        ({"training": {"precision": "fp32", "seed": 1}}, "training.seed was 42 and is 1"),
        ({"training": {"precision": "fp32", "global_batch_size": 8}}, "training.global_batch_size was 32 and is 8"),
        ({"data": {"train": [{"path": "a", "weight": 2.0}]}}, "data.train.0.weight was 1.0 and is 2.0"),
        ({"model": {"path": "other"}}, 'model.path was "m" and is "other"'),
    ],
)
def test_auto_refuses_what_would_change_the_course(store: CheckpointStore, changes: dict[str, Any], words: str) -> None:
    path = saved(store, 10)
    with pytest.raises(UserError) as caught:
        chosen(store, recipe(**changes))
    assert words in str(caught.value)
    assert f"checkpoint.resume={path}" in str(caught.value)


def test_auto_refuses_other_data(store: CheckpointStore) -> None:
    write_checkpoint(store, 10, recipe=determinants(recipe()), data_digest="other data")
    with pytest.raises(UserError, match="the training data, its tokenizer or its template is not what it was"):
        chosen(store, recipe())


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "zero3-offload"},
        {"model": {"path": "moved/to/m", "tokenizer": "moved/to/tokenizer", "attention": "eager"}},
        {"cluster": {"processes": 4}},
        {"training": {"precision": "fp32", "micro_batch_tokens": 4096, "activation_checkpointing": "full"}},
        {"logging": {"every": 10}, "checkpoint": {"resume": "auto", "keep": 5}, "name": "other"},
        {"data": {"train": [{"path": "moved/elsewhere"}], "eval": [{"path": "b"}]}},
    ],
)
def test_auto_goes_on_whatever_the_strategy_the_processes_and_the_logging(
    store: CheckpointStore, changes: dict[str, Any]
) -> None:
    path = saved(store, 10)
    found, _ = chosen(store, recipe(**changes))
    assert found is not None
    assert found.checkpoint == path


def taught(**server: Any) -> dict[str, Any]:
    """By a server alone and as one of two."""
    section = {"kind": "server", "path": "t", "endpoints": ["http://a/v1"], **server}
    several = {"kind": "several", "teachers": [section, {"kind": "resident", "path": "r"}]}
    return {"alone": {"kind": "distillation", "teacher": section}, "both": {"kind": "distillation", "teacher": several}}


@pytest.mark.parametrize("which", ["alone", "both"])
def test_a_teacher_may_be_reached_otherwise_but_not_be_asked_otherwise(store: CheckpointStore, which: str) -> None:
    path = saved(store, 10, recipe(objective=taught()[which]))
    moved = taught(endpoints=["http://b/v1", "http://c/v1"], model="served", timeout=5.0, retries=9)
    found, _ = chosen(store, recipe(objective=moved[which]))
    assert found is not None
    assert found.checkpoint == path
    with pytest.raises(RecipeError, match=r"objective\.teacher\.(teachers\.0\.)?k was 20 and is 30"):
        chosen(store, recipe(objective=taught(k=30)[which]))


def test_a_named_checkpoint_goes_on_with_another_recipe_and_says_what_changed(
    store: CheckpointStore, tmp_path: Path
) -> None:
    path = saved(store, 10)
    fresh = CheckpointStore(tmp_path / "other" / "checkpoints")
    by = recipe(str(path), optimizer={"learning_rate": 1e-3})
    found, said = chosen(fresh, by, begun_from=None, going_on=False)
    assert found is not None
    assert found.checkpoint == path
    assert "optimizer.learning_rate was 2e-05 and is 0.001" in said[0]


@pytest.mark.parametrize("part", ["", "checkpoints"])
def test_a_run_may_be_named_for_its_newest_checkpoint(store: CheckpointStore, part: str) -> None:
    path = saved(store, 10)
    found, _ = chosen(store, recipe(str(store.directory.parent / part)))
    assert found is not None
    assert found.checkpoint == path


def test_the_same_command_goes_on_with_what_it_began(store: CheckpointStore, tmp_path: Path) -> None:
    elsewhere = saved(CheckpointStore(tmp_path / "first" / "checkpoints"), 10)
    own = saved(store, 20)
    found, _ = chosen(store, recipe(str(elsewhere)), begun_from=str(elsewhere))
    assert found is not None
    assert found.checkpoint == own


def test_a_checkpoint_of_another_course_is_refused_where_newer_ones_are(store: CheckpointStore, tmp_path: Path) -> None:
    older = saved(store, 10)
    saved(store, 20)
    with pytest.raises(UserError, match=r"also holds step-00000020, .*choose a new output_dir"):
        chosen(store, recipe(str(older)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "lion"}, "has the moments of adamw, which lion cannot go on with"),
        ({"training": {"precision": "pure_bf16"}}, "was written in fp32, whose weights and moments have another dtype"),
    ],
)
def test_a_named_checkpoint_is_refused_where_its_moments_mean_nothing(
    store: CheckpointStore, changes: dict[str, Any], words: str
) -> None:
    path = saved(store, 10)
    with pytest.raises(UserError, match=words):
        chosen(store, recipe(str(path), **changes))


def test_a_run_shorter_than_its_checkpoint_is_refused(store: CheckpointStore) -> None:
    saved(store, 10)
    with pytest.raises(UserError, match="is at step 10, past the 9 steps of this run"):
        chosen(store, recipe(), steps=9)


def test_what_is_no_checkpoint_is_said_to_be_none(store: CheckpointStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no directory"):
        chosen(store, recipe(str(tmp_path / "nothing")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is neither a model .* nor a run, a checkpoint"):
        chosen(store, recipe(str(tmp_path / "empty")))
    (tmp_path / "plain").mkdir()
    write_companions(tmp_path / "plain")
    with pytest.raises(UserError, match="has no checkpoint in it, only a model"):
        chosen(store, recipe(str(tmp_path / "plain")))


def test_the_model_of_a_checkpoint_stands_for_it(store: CheckpointStore) -> None:
    path = saved(store, 10)
    found, _ = chosen(store, recipe(str(path / "model")))
    assert found is not None
    assert found.checkpoint == path


@pytest.mark.parametrize("named", ["checkpoint", "run"])
def test_a_named_checkpoint_may_be_asked_for_again_until_the_run_has_come_further(
    store: CheckpointStore, named: str
) -> None:
    path = saved(store, 10)
    other = recipe(str(path if named == "checkpoint" else store.directory.parent), optimizer={"learning_rate": 1e-3})
    found, said = chosen(store, other, begun_from=other.checkpoint.resume)
    assert found is not None
    assert "optimizer.learning_rate was 2e-05 and is 0.001" in said[0]
    newer = saved(store, 20, by=other)
    found, said = chosen(store, other, begun_from=other.checkpoint.resume)
    assert found is not None
    assert (found.checkpoint, said) == (newer, [])


def test_the_advice_stands_once_beside_all_changes(store: CheckpointStore) -> None:
    saved(store, 10)
    with pytest.raises(RecipeError) as caught:
        chosen(store, recipe(optimizer={"learning_rate": 1e-3}, training={"precision": "bf16", "seed": 1}))
    assert len(str(caught.value).splitlines()) == 4
    assert str(caught.value).count("--overwrite") == 1


def test_a_key_that_another_release_knows_is_no_change(store: CheckpointStore) -> None:
    known = determinants(recipe())
    del known["training.seed"]
    write_checkpoint(store, 10, recipe={**known, "training.once": 1}, data_digest="data")
    assert chosen(store, recipe())[0] is not None


def test_what_a_user_keeps_among_checkpoints_is_no_run_of_ours(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with claim_run_directory(tmp_path, SOURCES, overwrite=False) as claim:
        claim.begin("checkpoint: {resume: auto}")
        (directory.checkpoints / "step-00000010").mkdir(parents=True)
        (directory.checkpoints / "notes.txt").write_text("mine")
        (directory.checkpoints / "kept-10").mkdir()
    with claim_run_directory(tmp_path, SOURCES, overwrite=True) as claim:
        claim.begin("checkpoint: {resume: auto}")
    assert sorted(path.name for path in directory.checkpoints.iterdir()) == ["kept-10", "notes.txt"]


def test_going_on_that_is_refused_leaves_recipe_and_rows_as_they_were(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with claim_run_directory(tmp_path, SOURCES, overwrite=False) as claim:
        claim.begin("checkpoint: {resume: auto}")
        directory.job.write_text("{}")
        directory.metrics.write_text('{"step": 1}\n{"step": 2}\n')
    with claim_run_directory(tmp_path, SOURCES, overwrite=False, resume="auto") as claim:
        claim.go_on("checkpoint: {resume: other}", 1)
        directory.job.write_text("[]")
        claim.withdraw()
    assert directory.recorded_resume == "auto"
    assert directory.job.read_text() == "{}"
    assert len(directory.metrics.read_text().splitlines()) == 2


def test_a_run_holds_no_more_checkpoints_than_it_writes_or_keeps() -> None:
    settings = recipe().checkpoint
    assert most_checkpoints(settings, 100) == 1
    assert most_checkpoints(settings.model_copy(update={"every": 50}), 100) == 2
    assert most_checkpoints(settings.model_copy(update={"every": 60}), 100) == 2
    assert most_checkpoints(settings.model_copy(update={"every": 1}), 100) == 3
    assert most_checkpoints(settings.model_copy(update={"every": 0.1, "keep_best": True}), 100) == 4


def test_going_on_drops_the_rows_past_the_checkpoint_and_keeps_the_rest(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with claim_run_directory(tmp_path, SOURCES, overwrite=False) as claim:
        claim.begin("checkpoint: {resume: auto}")
    rows = [
        {"step": 0, "eval_loss": 3.0},
        *({"step": step, "loss": 1.0} for step in (1, 2, 3)),
        {"step": 2, "eval_loss": 2},
    ]
    directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    with claim_run_directory(tmp_path, SOURCES, overwrite=False, resume="auto") as claim:
        claim.go_on("checkpoint: {resume: auto}", 2)
    assert [json.loads(line) for line in directory.metrics.read_text().splitlines()] == [
        row for row in rows if row["step"] <= 2
    ]


def test_a_finished_run_is_refused_and_goes_on_only_once_from_a_named_checkpoint(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with claim_run_directory(tmp_path, SOURCES, overwrite=False) as claim:
        claim.begin("checkpoint: {resume: auto}")
        directory.model.mkdir()
    for resume in ("auto", "never"):
        with (
            pytest.raises(UserError, match=r"holds a finished run; .*--overwrite.*checkpoint\.resume=PATH"),
            claim_run_directory(tmp_path, SOURCES, overwrite=False, resume=resume),
        ):
            pass
    with claim_run_directory(tmp_path, SOURCES, overwrite=False, resume="PATH") as claim:
        claim.go_on("checkpoint: {resume: PATH}", 2)
        assert not directory.model.exists()
        assert directory.previous_model.exists()
        directory.unproven_model.mkdir()
        directory.accept_model()
    assert directory.model.exists()
    assert not directory.previous_model.exists()
    with (
        pytest.raises(UserError, match="holds a finished run"),
        claim_run_directory(tmp_path, SOURCES, overwrite=False, resume="PATH"),
    ):
        pass


def test_a_finished_model_is_put_back_when_going_on_is_withdrawn(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with claim_run_directory(tmp_path, SOURCES, overwrite=False) as claim:
        claim.begin("checkpoint: {resume: auto}")
        directory.model.mkdir()
    with claim_run_directory(tmp_path, SOURCES, overwrite=False, resume="PATH") as claim:
        claim.go_on("checkpoint: {resume: PATH}", 2)
        claim.withdraw()
    assert directory.model.exists()
