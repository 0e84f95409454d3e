"""A disk that fills while a checkpoint is written: the run ends in a sentence, and nothing committed is lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.forked import run_command
from tests.distributed.full_disk_train import fill_disk_while_training
from tests.distributed.full_disk_worker import PLAN_VARIABLE, WriteNote, fill
from tests.distributed.small_run import environment, rows, small_recipe, understudy, write
from tests.small_checkpoints import write_checkpoint
from understudy.checkpoint.manifest import MANIFEST, MARKER
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint
from understudy.errors import UserError

pytestmark = pytest.mark.distributed

EXIT_SECONDS = 10.0
PAGE_BYTES = os.sysconf("SC_PAGESIZE")
SENTENCE = r"the disk is full: a checkpoint needs [\d,]{8,} bytes and [\d,]+ are free; free some space, [^\n]*"
RUN_MEBIBYTES = 80
"""Room for the run as it is planned, 64 MiB of it for small files."""


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of so many MiB, in memory."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}m,mode=0700", "tmpfs", str(directory)]
    try:
        refused = subprocess.run(mount, capture_output=True, text=True).stderr.strip()
    except FileNotFoundError as error:
        refused = str(error)
    if refused:
        reason = f"a file system of its own cannot be mounted here: {refused.splitlines()[0]}"
        (pytest.fail if "CI" in os.environ else pytest.skip)(reason)
    try:
        yield directory
    finally:
        if subprocess.run(["umount", str(directory)]).returncode != 0:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.parametrize("disk", [1], indirect=True)
def test_wherever_a_save_finds_the_disk_full_the_checkpoint_before_is_the_newest(disk: Path) -> None:
    store = CheckpointStore(disk / "run" / "checkpoints")
    write_checkpoint(store, 10)
    note, failed_at, refused = WriteNote(), [], []
    free_pages = 0
    while True:
        fill(disk / "filler", free_pages * PAGE_BYTES)
        try:
            write_checkpoint(store, 20)
            break
        except UserError as error:
            refused.append(str(error))
        failed_at.append(note.latest.partition(".partial/")[2])
        assert [path.name for path in store.committed()] == ["step-00000010"]
        (disk / "filler").unlink()
        found = store.newest(lambda line: None)
        assert found is not None
        assert found[1].step == 10
        store.clean()
        assert [path.name for path in store.directory.iterdir()] == ["step-00000010"]
        free_pages += 1
    note.stop()
    assert verify_checkpoint(store.path(20)).step == 20
    sentence = re.compile(f"{re.escape(str(store.directory))}: {SENTENCE}")
    assert [message for message in refused if not sentence.fullmatch(message)] == []
    reached = {re.sub(r"\d+", "N", name).removesuffix(".partial").removesuffix(".writing") for name in failed_at}
    assert reached >= {
        "model/model-N-of-N.safetensors",
        "optimizer/optimizer-N-of-N.safetensors",
        "parts/rank-N",
        "model/chat_template.jinja",
        "model/tokenizer_config.json",
        "model/model.safetensors.index.json",
        "state.json",
        MANIFEST,
        MARKER,
    }


@pytest.mark.parametrize("disk", [1], indirect=True)
def test_once_all_ranks_have_written_a_failed_commit_gives_all_its_room_back(disk: Path) -> None:
    """Else the processes could not write down why they end."""
    store = CheckpointStore(disk / "run" / "checkpoints")
    write_checkpoint(store, 10)
    note, given_back = WriteNote(), []
    for free_pages in range(16):
        fill(disk / "filler", free_pages * PAGE_BYTES)
        try:
            write_checkpoint(store, 20)
        except UserError:
            if note.latest.endswith((MARKER, ".json", ".jinja")):
                given_back.append(os.statvfs(disk).f_bavail == free_pages)
        (disk / "filler").unlink()
        store.clean()
    note.stop()
    assert len(given_back) >= 4
    assert all(given_back)


CASES = {
    "no room when the save looks": ({"background": True}, {"before_check": True, "leave_bytes": 40 * 2**20}, None),
    "full in the shards": ({"background": True}, {"before_check": False, "leave_bytes": 40 * 2**10}, r"model/.*"),
    "full in the commit": (
        {"background": False},
        {"before_check": False, "leave_bytes": 284 * 2**10},
        r"model/.*\.(json|jinja)|state\.json|manifest\.json|COMMITTED",
    ),
}
"""`checkpoint` of the recipe; how the disk fills at the second save; the file that was being written then."""


@pytest.mark.parametrize("disk", [RUN_MEBIBYTES], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_a_run_whose_disk_fills_ends_soon_in_a_sentence_and_goes_on_later(
    tmp_path: Path, disk: Path, case: str
) -> None:
    checkpoint, filling, written = CASES[case]
    recipe = small_recipe(tmp_path)
    recipe["output_dir"] = str(disk / "run")
    recipe["training"]["max_steps"] = 12
    recipe["data"]["eval"] = None
    recipe["evaluation"] = {}
    recipe["logging"] = {"sinks": ["jsonl"]}
    recipe["checkpoint"] = {"every": 4, **checkpoint}
    arguments = ["train", str(write(recipe, tmp_path))]
    notes = tmp_path / "notes"
    notes.mkdir()
    plan = {"save": 2, "filler": str(disk / "filler"), "notes": str(notes), **filling}

    variables = {**environment(tmp_path), PLAN_VARIABLE: json.dumps(plan)}
    ended = run_command(arguments, variables, prepare=fill_disk_while_training)
    seconds = time.time() - float((notes / "filled").read_text())

    store = CheckpointStore(disk / "run" / "checkpoints")
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(f"error: {re.escape(str(store.directory))}: {SENTENCE}\n", ended.stderr)
    assert seconds < EXIT_SECONDS
    failed_at = [path.read_text() for path in notes.glob("failed-*")]
    assert bool(failed_at) == (written is not None)
    assert all(re.fullmatch(rf"({written})(\.partial)?", name) for name in failed_at), failed_at
    assert [path.name for path in store.committed()] == ["step-00000004"]
    verify_checkpoint(store.path(4))

    (disk / "filler").unlink()
    done = understudy(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going on from {store.path(4)} (step 4)" in done.stdout
    assert sorted(path.name for path in store.directory.iterdir()) == ["step-00000008", "step-00000012"]
    assert [verify_checkpoint(path).step for path in store.committed()] == [12, 8]
    assert [row["step"] for row in rows(disk)] == list(range(1, 13))
