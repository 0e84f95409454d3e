"""Which checkpoints are there: commit, retention, and what a process that dies between two steps leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.small_checkpoints import make_progress, write_checkpoint
from understudy.checkpoint.manifest import MARKER, describe_file, write_manifest, write_marker
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint

pytestmark = pytest.mark.unit


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def commit(store: CheckpointStore, step: int, eval_loss: float | None = None) -> Path:
    """A committed checkpoint of nothing but its state."""
    partial = store.partial(step, "token")
    store.begin(partial)
    for name in ("model", "optimizer", "parts"):
        (partial / name).rmdir()
    (partial / "state.json").write_bytes(make_progress(step, eval_loss).to_json())
    write_manifest(partial, {"state.json": describe_file(partial / "state.json")})
    write_marker(partial)
    return store.commit(partial, step)


def steps(store: CheckpointStore) -> list[int]:
    return [verify_checkpoint(path).step for path in store.committed()]


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def newest_step(store: CheckpointStore) -> int:
    found = store.newest(lambda line: None)
    assert found is not None
    return found[1].step


def test_a_committed_checkpoint_verifies_and_the_newest_is_found_by_number(store: CheckpointStore) -> None:
    for step in (5, 123456789, 99999999):
        commit(store, step)
    assert steps(store) == [123456789, 99999999, 5]
    assert newest_step(store) == 123456789


def test_a_checkpoint_is_found_only_once_it_is_committed(store: CheckpointStore) -> None:
    partial = store.partial(5, "token")
    store.begin(partial)
    assert store.committed() == []
    assert store.newest(lambda line: None) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_retention_keeps_the_newest_and_no_fewer(store: CheckpointStore, keep: int) -> None:
    for count, step in enumerate(range(10, 60, 10), start=1):
        commit(store, step)
        store.retain(keep, best=False)
        assert steps(store) == list(range(10, 60, 10))[max(0, count - keep) : count][::-1]
    assert len(names(store)) == keep


def test_the_best_is_kept_beside_the_newest(store: CheckpointStore) -> None:
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 1.5)):
        commit(store, step, loss)
        store.retain(1, best=True)
    assert steps(store) == [50, 20]
    commit(store, 60, 1.0)
    store.retain(1, best=True)
    assert steps(store) == [60]  # as good, and newer


def test_a_loss_that_is_no_number_is_not_the_best(store: CheckpointStore) -> None:
    for step, loss in ((10, 2.0), (20, float("nan")), (30, float("inf")), (40, 3.0)):
        write_checkpoint(store, step, eval_loss=loss)
    store.retain(1, best=True)
    assert [path.name for path in store.committed()] == ["step-00000040", "step-00000010"]


def test_without_evaluations_there_is_no_best_to_keep(store: CheckpointStore) -> None:
    for step in (10, 20, 30):
        commit(store, step)
    store.retain(2, best=True)
    assert steps(store) == [30, 20]


def test_a_checkpoint_of_the_same_step_takes_the_place_of_a_damaged_one(store: CheckpointStore) -> None:
    commit(store, 10)
    (commit(store, 20) / "state.json").write_bytes(b"{")
    assert newest_step(store) == 10
    commit(store, 20)
    assert newest_step(store) == 20
    assert (store.path(20).with_name("step-00000020.damaged") / "state.json").read_bytes() == b"{"


def test_damaged_checkpoints_lose_their_names_but_stay_until_the_next_commit(store: CheckpointStore) -> None:
    for step in (10, 20, 30):
        commit(store, step)
    for step in (20, 30):
        (store.path(step) / "state.json").unlink()
    store.set_aside_after(10)
    store.clean()
    assert names(store) == ["step-00000010", "step-00000020.damaged", "step-00000030.damaged"]
    assert newest_step(store) == 10
    commit(store, 20)
    assert names(store) == ["step-00000010", "step-00000020", "step-00000020.damaged", "step-00000030.damaged"]
    store.retain(2, best=False)
    assert names(store) == ["step-00000010", "step-00000020"]


def test_setting_aside_leaves_the_checkpoint_that_training_goes_on_from(store: CheckpointStore) -> None:
    for step in (10, 20):
        commit(store, step)
    store.set_aside_after(20)
    assert steps(store) == [20, 10]


def test_cleaning_removes_what_killed_attempts_left_and_nothing_else(store: CheckpointStore) -> None:
    commit(store, 10)
    store.begin(store.partial(20, "first"))
    store.begin(store.partial(20, "second"))
    commit(store, 5).rename(store.directory / "step-00000005.retired")
    (store.directory / "notes").mkdir()
    store.clean()
    assert names(store) == ["notes", "step-00000010"]


def test_a_new_attempt_at_a_step_begins_empty(store: CheckpointStore) -> None:
    partial = store.partial(20, "token")
    store.begin(partial)
    (partial / "model" / "half.safetensors").touch()
    store.begin(partial)
    assert sorted(path.name for path in partial.rglob("*")) == ["model", "optimizer", "parts"]


def test_attempts_at_a_step_write_in_different_places(store: CheckpointStore) -> None:
    assert store.partial(20, "first") != store.partial(20, "second")


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_removal_cut_short_is_not_taken_for_a_checkpoint(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        write_checkpoint(store, step)

    def remove_one_file(path: Path) -> None:
        assert not (path / MARKER).exists()
        next(path.rglob("*.safetensors")).unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", remove_one_file)
    with pytest.raises(Killed):
        store.retain(1, best=False)
    monkeypatch.undo()
    assert 30 in steps(store)
    assert set(steps(store)) < {10, 20, 30}
    store.clean()
    store.retain(1, best=False)
    assert names(store) == ["step-00000030"]


def test_between_two_names_of_the_same_step_the_previous_checkpoint_is_found(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store, 10)
    commit(store, 20)
    rename = Path.rename

    def die_before_the_name_is_given(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", die_before_the_name_is_given)
    with pytest.raises(Killed):
        commit(store, 20)
    monkeypatch.undo()
    assert newest_step(store) == 10


def test_only_the_user_may_read_what_is_written(store: CheckpointStore) -> None:
    store.begin(store.partial(10, "token"))
    assert store.directory.stat().st_mode & 0o077 == 0
