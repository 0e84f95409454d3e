"""The run directory: who may write there, and what is cleared."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from understudy.errors import UserError
from understudy.launch import run_lock
from understudy.launch.run_claim import Claim, claim_run_directory, require_space
from understudy.launch.run_directory import REPLACED
from understudy.launch.run_lock import MARKER, still_owned
from understudy.recipe.source_map import SourceMap

pytestmark = pytest.mark.unit

SOURCES = SourceMap("recipe.yaml", {"output_dir": 3})


@contextmanager
def claimed(path: Path, *, overwrite: bool = False) -> Iterator[Claim]:
    with claim_run_directory(path, SOURCES, overwrite=overwrite) as claim:
        yield claim


def refusal(path: Path, *, overwrite: bool = False) -> str:
    with pytest.raises(UserError) as caught, claimed(path, overwrite=overwrite):
        pass
    assert (caught.value.file, caught.value.line) == ("recipe.yaml", 3)
    return caught.value.message


def finished_run(path: Path) -> None:
    with claimed(path) as claim:
        run = claim.begin("name: x\n")
        run.model.mkdir()
        (run.model / "config.json").write_text("{}")


def test_a_claim_that_is_never_begun_leaves_no_trace(tmp_path: Path) -> None:
    with claimed(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_given_up_by_an_error_leaves_an_existing_directory_as_it_was(tmp_path: Path) -> None:
    def fail_in_preparation() -> None:
        with claimed(tmp_path):
            raise UserError("bad data")

    with pytest.raises(UserError, match="bad data"):
        fail_in_preparation()
    assert list(tmp_path.iterdir()) == []


def test_beginning_writes_the_resolved_recipe(tmp_path: Path) -> None:
    with claimed(tmp_path / "a") as claim:
        claim.begin("name: x\n")
    assert (tmp_path / "a" / "recipe.yaml").read_text() == "name: x\n"


def test_a_run_that_is_withdrawn_leaves_no_trace(tmp_path: Path) -> None:
    with claimed(tmp_path / "a") as claim:
        claim.begin("name: x\n")
        claim.withdraw()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    finished_run(tmp_path / "a")
    message = refusal(tmp_path / "a")
    assert "a finished run" in message
    assert "--overwrite" in message
    assert "another output_dir" in message
    assert (tmp_path / "a" / "model" / "config.json").exists()


def test_a_run_that_did_not_finish_is_refused_too(tmp_path: Path) -> None:
    with claimed(tmp_path / "a") as claim:
        claim.begin("name: x\n")
    assert "did not finish" in refusal(tmp_path / "a")


def test_files_that_no_run_wrote_are_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    assert "recipe.yaml" in refusal(tmp_path, overwrite=True)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    assert not (tmp_path / MARKER).exists()


def test_overwrite_clears_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    finished_run(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with claimed(tmp_path / "a", overwrite=True) as claim:
        assert (tmp_path / "a" / "model").exists(), "nothing may be cleared before the run begins"
        claim.begin("name: y\n")
    assert not (tmp_path / "a" / "model").exists()
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "a" / "recipe.yaml").read_text() == "name: y\n"


def test_overwriting_that_fails_before_it_begins_keeps_the_earlier_run(tmp_path: Path) -> None:
    finished_run(tmp_path / "a")
    with claimed(tmp_path / "a", overwrite=True):
        pass
    assert "a finished run" in refusal(tmp_path / "a")


def test_a_directory_in_use_is_refused_naming_the_process(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from understudy.launch.run_claim import claim_run_directory\n"
        "from understudy.recipe.source_map import SourceMap\n"
        "with claim_run_directory(Path(sys.argv[1]), SourceMap(), overwrite=False):\n"
        "    sys.stdout.write('held\\n'); sys.stdout.flush(); sys.stdin.read()\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "a")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        message = refusal(tmp_path / "a", overwrite=True)
        holder.kill()
        holder.wait()
    assert f"process {holder.pid} " in message
    with claimed(tmp_path / "a"):  # the lock died with its holder
        pass


def taken_over(path: Path) -> bytes:
    """Another run owns `path` now, as after this process was suspended for long."""
    content = replace(run_lock._this_process(), host="elsewhere").encode()
    (path / MARKER).write_bytes(content)
    return content


def test_a_run_taken_over_before_it_begins_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    finished_run(tmp_path / "a")

    def begin() -> None:
        with claimed(tmp_path / "a", overwrite=True) as claim:
            assert still_owned(tmp_path / "a", claim.token)
            taken_over(tmp_path / "a")
            assert not still_owned(tmp_path / "a", claim.token)
            claim.begin("name: y\n")

    with pytest.raises(UserError, match=r"in use by a running job \(process \d+ on elsewhere"):
        begin()
    assert (tmp_path / "a" / "recipe.yaml").read_text() == "name: x\n"


def test_a_run_taken_over_after_it_began_clears_nothing_any_more(tmp_path: Path) -> None:
    finished_run(tmp_path / "a")
    with claimed(tmp_path / "a", overwrite=True) as claim:
        run = claim.begin("name: y\n")
        marker = taken_over(tmp_path / "a")
        claim.withdraw()
        claim.settle()
        assert run.recipe.exists()
    assert (tmp_path / "a" / REPLACED / "model").exists()
    assert (tmp_path / "a" / MARKER).read_bytes() == marker


def test_a_directory_left_by_a_run_on_another_host_is_free_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_run(tmp_path / "a")
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    for _ in range(2):  # the second after a claim that was never begun
        lines: list[str] = []
        with claim_run_directory(tmp_path / "a", SOURCES, overwrite=True, report=lines.append):
            assert lines == []


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    assert "is a file" in refusal(tmp_path / "a")
    assert "cannot be created" in refusal(tmp_path / "a" / "b")


def test_too_little_space_is_refused_with_both_numbers(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "the model", SOURCES)
    with pytest.raises(UserError, match=r"the model needs 1,\d{3},.* bytes but .* bytes free"):
        require_space(tmp_path, 10**18 + 10**18 // 2, "the model", SOURCES)


def test_importing_it_needs_no_torch() -> None:
    script = "import sys; sys.modules['torch'] = None; import understudy.launch.local"
    subprocess.run([sys.executable, "-c", script], check=True)
