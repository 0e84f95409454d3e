"""A damaged checkpoint is never taken for a good one: every kind of damage to every kind of file is refused by name."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_checkpoints import write_checkpoint
from understudy.checkpoint.manifest import MANIFEST, MARKER, DamagedCheckpointError, write_marker
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint

pytestmark = pytest.mark.unit

TRIALS = 200
SEED = 20240229
PREVIOUS, NEWEST = 10, 20
SHARD = "{}-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `checkpoints` directory with two committed checkpoints."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (PREVIOUS, NEWEST):
        write_checkpoint(CheckpointStore(directory), step)
    return directory


Damage = Callable[[Path, str, Path, random.Random], "set[str] | None"]
"""Damages the file named, or what it wants, in a checkpoint that has another one beside it. Returns the files that are
then not what was written, one of which must be named; None when nothing changed."""


def flip_a_bit(checkpoint: Path, name: str, other: Path, draw: random.Random) -> set[str]:
    content = bytearray((checkpoint / name).read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    (checkpoint / name).write_bytes(content)
    return {name}


def truncate(checkpoint: Path, name: str, other: Path, draw: random.Random) -> set[str]:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: draw.randrange(len(content))])
    return {name}


def remove(checkpoint: Path, name: str, other: Path, draw: random.Random) -> set[str]:
    (checkpoint / name).unlink()
    return {name}


def swap(checkpoint: Path, name: str, other: Path, draw: random.Random) -> set[str] | None:
    partner = draw.choice([each for each in files_in(checkpoint) if each != name])
    first, second = (checkpoint / name).read_bytes(), (checkpoint / partner).read_bytes()
    (checkpoint / name).write_bytes(second)
    (checkpoint / partner).write_bytes(first)
    return {name, partner} if first != second else None


def take_from_other_step(checkpoint: Path, name: str, other: Path, draw: random.Random) -> set[str] | None:
    same = (checkpoint / name).read_bytes() == (other / name).read_bytes()
    shutil.copy(other / name, checkpoint / name)
    return {name} if not same else None


def add_a_file(checkpoint: Path, name: str, other: Path, draw: random.Random) -> set[str]:
    """One that loading would find by its name, beside `name`; what it holds is sound."""
    if (checkpoint / name).parent == checkpoint:
        extra, content = "model.safetensors", other / "model" / SHARD.format("model")
    else:
        extra, content = draw.choice(
            [
                (f"{Path(name).parent}/model.safetensors", other / "model" / SHARD.format("model")),
                (f"{Path(name).parent}/model-00003-of-00002.safetensors", other / "model" / SHARD.format("model")),
                (f"{Path(name).parent}/zero.safetensors", other / "optimizer" / SHARD.format("optimizer")),
                ("model/adapter_config.json", other / "model" / "config.json"),
                ("optimizer/model.safetensors.index.json", other / "model" / "model.safetensors.index.json"),
            ]
        )
    shutil.copy(content, checkpoint / extra)
    return {extra}


def rename_to_other_step(checkpoint: Path, name: str, other: Path, draw: random.Random) -> set[str]:
    checkpoint.rename(checkpoint.with_name(f"step-{draw.randrange(NEWEST + 1, 10**8):08}"))
    return {"state.json"}


DAMAGES: tuple[Damage, ...] = (
    flip_a_bit,
    truncate,
    remove,
    swap,
    take_from_other_step,
    add_a_file,
    rename_to_other_step,
)


def files_in(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def kind_of(name: str) -> str:
    """So that each kind is drawn as often as another, however many files it has."""
    if name.endswith(".safetensors"):
        return f"{name.partition('/')[0]} shard"
    if name.endswith(".index.json"):
        return f"{name.partition('/')[0]} index"
    return "tokenizer" if "token" in name or name.endswith(".jinja") else name


def test_the_small_checkpoint_has_every_kind_of_file_and_verifies(pristine: Path) -> None:
    checkpoint = CheckpointStore(pristine).path(NEWEST)
    assert verify_checkpoint(checkpoint).step == NEWEST
    assert {kind_of(name) for name in files_in(checkpoint)} == {
        "model shard",
        "model index",
        "model/config.json",
        "model/generation_config.json",
        "tokenizer",
        "optimizer shard",
        "state.json",
        MANIFEST,
        MARKER,
    }


def test_each_of_200_random_damages_is_refused_by_name_and_the_previous_checkpoint_used(
    pristine: Path, tmp_path: Path
) -> None:
    draw = random.Random(SEED)
    by_kind: dict[str, list[str]] = {}
    for name in files_in(CheckpointStore(pristine).path(NEWEST)):
        by_kind.setdefault(kind_of(name), []).append(name)
    unnoticed, trials = [], Counter[tuple[str, str]]()
    while trials.total() < TRIALS:
        damage = DAMAGES[trials.total() % len(DAMAGES)]
        kind = draw.choice(sorted(by_kind))
        name = draw.choice(by_kind[kind])
        store = CheckpointStore(tmp_path / str(trials.total()) / "checkpoints")
        shutil.copytree(pristine, store.directory)
        damaged = damage(store.path(NEWEST), name, store.path(PREVIOUS), draw)
        if damaged is not None:
            trials[damage.__name__, kind] += 1
            if problem := how_it_was_missed(store, damaged):
                unnoticed.append(f"{damage.__name__} of {name}: {problem}")
        shutil.rmtree(store.directory)
    assert unnoticed == []
    assert {damage for damage, _ in trials} == {damage.__name__ for damage in DAMAGES}
    assert {kind for _, kind in trials} == set(by_kind)


def how_it_was_missed(store: CheckpointStore, damaged: set[str]) -> str | None:
    [bad] = [path for path in store.committed() if path != store.path(PREVIOUS)]
    try:
        verify_checkpoint(bad)
    except DamagedCheckpointError as error:
        message = str(error)
    else:
        return "taken for a good one"
    if not any(str(bad / name) in message or (name == MARKER and name in message) for name in damaged):
        return f"another file is named: {message}"
    said: list[str] = []
    found = store.newest(said.append)
    if found is None or found[0] != store.path(PREVIOUS) or found[1].step != PREVIOUS:
        return f"not the previous checkpoint, but {found}"
    if len(said) != 1 or bad.name not in said[0] or message not in said[0]:
        return f"said {said}"
    return None


def test_files_that_nothing_reads_do_no_harm(pristine: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / f"step-{NEWEST:08}"
    shutil.copytree(CheckpointStore(pristine).path(NEWEST), checkpoint)
    (checkpoint / "model" / ".nfs0001").touch()
    (checkpoint / "notes.md").write_text("the good one")
    assert verify_checkpoint(checkpoint).step == NEWEST


def test_several_bad_checkpoints_are_each_named_on_the_way_to_a_good_one(pristine: Path, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    shutil.copytree(pristine, store.directory)
    write_checkpoint(store, 30)
    (store.path(30) / "state.json").unlink()
    (store.path(NEWEST) / MARKER).unlink()
    said: list[str] = []
    found = store.newest(said.append)
    assert found is not None
    assert found[0] == store.path(PREVIOUS)
    assert [line.split(":")[0] for line in said] == [f"skipped checkpoint step-{step:08}" for step in (30, NEWEST)]


def test_only_bad_checkpoints_are_an_error_and_not_a_fresh_start(pristine: Path, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    shutil.copytree(pristine, store.directory)
    for path in store.committed():
        (path / "state.json").write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=r"step-00000010/state\.json"):
        store.newest(lambda line: None)
    assert CheckpointStore(tmp_path / "absent").newest(lambda line: None) is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (MANIFEST, b'{"format_version": 2, "files": {}}', "has format 2, and this release reads 1"),
        (MANIFEST, b"[]", "is not a manifest"),
        (MARKER, b"yes", "is not a commit marker"),
    ],
)
def test_what_another_program_wrote_is_refused_in_a_sentence(
    pristine: Path, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    checkpoint = tmp_path / f"step-{NEWEST:08}"
    shutil.copytree(CheckpointStore(pristine).path(NEWEST), checkpoint)
    (checkpoint / name).write_bytes(content)
    if name == MANIFEST:
        write_marker(checkpoint)
    with pytest.raises(DamagedCheckpointError, match=words):
        verify_checkpoint(checkpoint)
